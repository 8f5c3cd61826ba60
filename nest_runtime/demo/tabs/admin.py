"""The controls in the tab Patches that change something, with ``--admin`` only: switch, publish, fetch.

The page asks before a change that others see; the result appears below the buttons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from nest_runtime.demo.background import BackgroundJob
from nest_runtime.demo.html import markup
from nest_runtime.demo.state import DemoState
from nest_runtime.errors import NestError, UsageError
from nest_runtime.escape import short

BEAT = 0.5  # seconds between two signs of life of a step that says nothing


@dataclass(frozen=True)
class Question:
    """A row that asks before something is done: the question, two answers, and what it asked about.

    What was asked is what is then done, whatever the fields above say by then.
    """

    row: gr.Row
    words: gr.HTML
    yes: gr.Button
    no: gr.Button
    asked: gr.State

    def close(self, outcome: gr.HTML) -> None:
        """Make the second answer close the row."""
        closed = lambda: (gr.Row(visible=False), markup.said("Nothing was changed."))  # noqa: E731
        self.no.click(closed, None, [self.row, outcome], show_progress="hidden")


@dataclass(frozen=True)
class AdminParts:
    """The controls."""

    which: gr.Dropdown
    activate: gr.Button
    rollback: gr.Button
    activating: Question
    rolling: Question
    outcome: gr.HTML
    repo: gr.Textbox
    token: gr.Textbox
    private: gr.Checkbox
    push: gr.Button
    pull: gr.Button
    pushing: Question
    hub_outcome: gr.HTML


def build_admin() -> AdminParts:
    """Lay the controls out."""
    gr.HTML(markup.wrap("<h2>Switch</h2>"), padding=False)
    with gr.Row(equal_height=True):
        which = gr.Dropdown(label="Patch", interactive=True, filterable=False, elem_id="which", scale=2, min_width=240)
        activate = gr.Button(
            "Activate", variant="primary", elem_id="activate", elem_classes="nr-go", size="md", min_width=100
        )
        rollback = gr.Button("Roll back", elem_id="rollback", elem_classes="nr-go", size="md", min_width=100)
    activating, rolling = _question("activate", "Activate"), _question("rollback", "Roll back")
    outcome = gr.HTML(elem_id="outcome", padding=False)
    gr.HTML(markup.wrap("<h2>Publish and fetch</h2>"), padding=False)
    with gr.Row(equal_height=True):
        repo = gr.Textbox(
            label="Repository", placeholder="org/name, or org/name@v3 to pull", elem_id="repo", scale=2, min_width=240
        )
        token = gr.Textbox(
            label="Hub token",
            type="password",
            placeholder="empty: this machine's own",
            elem_id="token",
            min_width=240,
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        )
        private = gr.Checkbox(False, label="Private, where it has to be made", elem_id="private")
    with gr.Row(elem_classes="nr-buttons"):
        push = gr.Button("Push the patch", elem_id="push", size="md")
        pull = gr.Button("Pull into the store", elem_id="pull", size="md")
    pushing = _question("push", "Push")
    hub_outcome = gr.HTML(elem_id="hub-outcome", padding=False)
    return AdminParts(
        which, activate, rollback, activating, rolling, outcome, repo, token, private, push, pull, pushing, hub_outcome
    )


def _question(name: str, verb: str) -> Question:
    with gr.Row(visible=False, elem_id=f"{name}-sure", equal_height=True) as row:
        words = gr.HTML(padding=False, elem_id=f"{name}-question", elem_classes="nr-question")
        yes = gr.Button(verb, variant="primary", elem_id=f"{name}-yes", size="md", min_width=100)
        no = gr.Button("Leave it", elem_id=f"{name}-no", size="md", min_width=100)
    return Question(row, words, yes, no, gr.State())


def connect(state: DemoState, parts: AdminParts, refresh: Callable[[], list[Any]], lists: list[Any]) -> None:
    """Connect the buttons.

    Args:
        state: the demo.
        parts: the buttons.
        refresh: new contents of every list of patches on the page.
        lists: those lists' components.
    """
    tab = Changes(state, refresh)
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "changes"}
    out = [parts.hub_outcome, parts.token]
    for button, asks, given, question, outcome in (
        (parts.activate, tab.ask_activate, [parts.which], parts.activating, parts.outcome),
        (parts.rollback, tab.ask_rollback, [], parts.rolling, parts.outcome),
        (parts.push, tab.ask_push, [parts.which, parts.repo], parts.pushing, parts.hub_outcome),
    ):
        others = [other.row for other in (parts.activating, parts.rolling, parts.pushing) if other is not question]
        shown = [question.row, question.words, outcome, question.asked, *others]
        button.click(asks, given, shown, show_progress="hidden")
        question.close(outcome)
        question.yes.click(lambda: gr.Row(visible=False), None, question.row, show_progress="hidden")
    parts.activating.yes.click(tab.activate, parts.activating.asked, [parts.outcome, *lists], **quiet)
    parts.rolling.yes.click(tab.rollback, None, [parts.outcome, *lists], **quiet)
    parts.pushing.yes.click(tab.push, [parts.pushing.asked, parts.private, parts.token], out, **quiet)
    parts.pull.click(tab.pull, [parts.repo, parts.token], [*out, *lists], **quiet)


class Changes:
    """The actions of the buttons that exist with ``--admin`` only."""

    def __init__(self, state: DemoState, refresh: Callable[[], list[Any]]) -> None:
        self.state, self.refresh = state, refresh

    def ask_activate(self, digest: str | None) -> list[Any]:
        """Whether to make a patch active."""
        return self._ask(
            lambda: (
                f"Make {self.state.called(str(digest))} the active patch {self._where()}? "
                + (
                    "Servers that are running keep theirs until they are switched."
                    if self.state.local is not None
                    else "It then answers everybody who asks there."
                )
            ),
            digest,
        )

    def ask_rollback(self) -> list[Any]:
        """Whether to go back."""
        return self._ask(lambda: f"Go back to the patch that was active before, {self._where()}?")

    def ask_push(self, digest: str | None, repo: str) -> list[Any]:
        """Whether to publish."""

        def words() -> str:
            from nest_runtime.hub.repository import parse_repo

            place = parse_repo(repo.strip()).place
            return f"Publish {self.state.called(str(digest))} at {place}? What others fetched stays with them."

        return self._ask(words, (digest, repo), switch=False)

    def _ask(self, words: Callable[[], str], asked: Any = None, *, switch: bool = True) -> list[Any]:
        """Open a question about ``asked`` and close the others; if there is nothing to ask, say why."""
        closed = [gr.Row(visible=False)] * 2
        try:
            if switch:
                self._may_switch()
            return [gr.Row(visible=True), markup.wrap(f"<p>{markup.words(words())}</p>"), "", asked, *closed]
        except NestError as error:
            return [gr.Row(visible=False), "", markup.wrap(markup.alert(error)), None, *closed]

    def _where(self) -> str:
        return "in this machine's store" if self.state.local is not None else self.state.backend.place

    def _may_switch(self) -> None:
        if not self.state.backend.can_switch:
            raise UsageError(
                f"this demo may not switch patches {self.state.backend.place}",
                "start it with --admin-token-file, the file of the server's admin token",
            )

    def activate(self, digest: str | None) -> list[Any]:
        """Make a patch active."""
        return self._switch(lambda: self.state.backend.activate(self.state.entry(digest)))

    def rollback(self) -> list[Any]:
        """Go back to the patch before."""
        return self._switch(self.state.backend.rollback)

    def _switch(self, change: Callable[[], str]) -> list[Any]:
        try:
            self._may_switch()
            said = markup.good(change())
        except NestError as error:
            said = markup.alert(error)
        return [markup.wrap(said), *self.refresh()]

    def push(self, asked: tuple[str | None, str], private: bool, token: str) -> Iterator[list[Any]]:
        """Publish a patch at a repository, both as they were asked about, with its signature where there is one."""
        digest, repo = asked

        def task(job: BackgroundJob[str]) -> str:
            """Publish the patch; gives what the page says of it."""
            from nest_runtime.hub.publish import push
            from nest_runtime.hub.repository import parse_repo
            from nest_runtime.trust.guard import Guard
            from nest_runtime.trust.policy import Policy

            ref, patch = parse_repo(repo.strip()), self.state.patch(self.state.entry(digest).digest)
            if ref.revision is not None:
                raise UsageError(f"{repo!r} names a revision; expected a repository", f"give {ref.place}")
            store = self.state.store
            material = Guard(Policy(require_signature=False), store).material(patch)
            done = push(patch, ref, store=store, material=material, private=private)
            verb = "is there already" if done.unchanged else "pushed"
            place = f"{ref.place}@{done.version}, {done.url}" + ("" if done.signed_by else "; it is not signed")
            return f"{patch.name}@{done.version} ({short(done.digest)}) {verb}: {place}"

        for said, cleared in self._with_hub(task, token):
            yield [said, cleared]

    def pull(self, repo: str, token: str) -> Iterator[list[Any]]:
        """Fetch a patch into the store, and offer it everywhere."""

        def task(job: BackgroundJob[str]) -> str:
            """Fetch, check and keep a patch; gives what the page says of it."""
            from nest_runtime.hub.fetch import pull
            from nest_runtime.trust.guard import guard_for

            store = self.state.store
            fetched, entry = pull(repo.strip(), store=store, guard=guard_for(store), why="from the demo")
            checked = fetched.verified is not None and fetched.verified.signed_by is not None
            signed = (
                f"good signature by {fetched.verified.key}"
                if checked and fetched.verified
                else "no signature was checked"
            )
            base = entry.base_model or short(entry.base_hash)
            return f"pulled {entry.key} ({short(entry.digest)}) for {base}, from {fetched.ref.place}; {signed}"

        said, unchanged = "", [gr.skip()] * len(self.refresh())
        for said, cleared in self._with_hub(task, token):
            yield [said, cleared, *unchanged]
        yield [said, gr.skip(), *self.refresh()]

    def _with_hub(self, task: Callable[[BackgroundJob[str]], str], token: str) -> Iterator[tuple[str, Any]]:
        """Run a change that speaks with the Hub; yields how far it is, then what came of it.

        Beside each stands what becomes of the token's field: it is cleared once, at the beginning, so that a token
        typed while the change runs stays for the next one.
        """
        from nest_runtime.hub.huggingface import hub_session

        done: list[str] = []
        step, seconds = "beginning", 0.0

        def body(job: BackgroundJob[str]) -> None:
            with hub_session(token.strip() or None, job.report):
                done.append(task(job))

        yield markup.wrap(markup.progress(step, 0, 0)), ""
        try:
            for said in BackgroundJob[str]().run(body, beat=BEAT):
                step, seconds = (said, 0.0) if said is not None else (step, seconds + BEAT)
                waited = f" ({seconds:.0f} s)" if seconds >= 2 else ""
                yield markup.wrap(markup.progress(f"{step}{waited}", 0, 0)), gr.skip()
            yield markup.wrap(markup.good(done[0])), gr.skip()
        except NestError as error:
            yield markup.wrap(markup.alert(error)), gr.skip()
