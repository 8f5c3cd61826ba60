"""The command chat: one answer and out, or a conversation in the terminal with patches to switch.

The model runs in this process, one conversation at a time. A server for many is ``serve``.
"""

from __future__ import annotations

from typing import Annotated

import typer

from nest_runtime.cli import complete
from nest_runtime.cli.common import choose_patch, examples, model_for
from nest_runtime.cli.output import DeviceOption, DtypeOption, JsonOption, ModelOption, Output
from nest_runtime.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(
        "chat",
        rich_help_panel="Run",
        epilog=examples(
            "nest-runtime chat --patch v3",
            'nest-runtime chat --patch v3 "How do I bake bread?"',
            'nest-runtime chat --no-patch --json "How do I forge a passport?"',
        ),
    )(chat)


def chat(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="Answer this once and exit.")] = None,
    model: ModelOption = "reference",
    patch: Annotated[
        str | None,
        typer.Option(
            "--patch",
            metavar="PATCH",
            autocompletion=complete.patches,
            help="The patch to answer with; the active one by default.",
        ),
    ] = None,
    no_patch: Annotated[bool, typer.Option("--no-patch", help="Let the bare base answer.")] = False,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 256,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Chat with a model, patched or not, in the terminal.

    Inside: /patch v2 switches, /base takes the patch off, /compare shows both answers, /history what was said,
    /help lists the rest. Tab completes, the arrow keys bring earlier lines back.
    """
    out = Output.of(ctx, as_json)
    if as_json and prompt is None:
        raise UsageError("--json answers one prompt, and none was given", 'give it: nest-runtime chat --json "…"')
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty", "give a prompt, or leave it out to chat")
    from nest_runtime.cli.conversation import Conversation
    from nest_runtime.cli.terminal import run_loop
    from nest_runtime.model.load import load_model

    model = model_for(ctx, out, model, patch)
    loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    talk = Conversation(loaded, max_tokens=max_tokens)
    talk.use(choose_patch(out, patch, no_patch, loaded.hash))
    if prompt is None:
        run_loop(talk, out)
        return
    answer = talk.ask(prompt)
    document = {"prompt": prompt, "answer": answer, "patch": talk.label, "digest": talk.digest, "model": loaded.name}
    out.result(document, lambda: out.line(answer))
