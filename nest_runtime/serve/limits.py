"""Parts of what a server is started with: what it takes on, what clients may do, and which channel it follows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nest_runtime.settings import check, described, required, setting


@described
@dataclass(frozen=True)
class Limits:
    """What one server takes on; what goes beyond is refused with an OpenAI-shaped error."""

    running: int = setting(64, "Sequences in one batch of the engine.", low=1, flag="--max-running", metavar="N")
    max_body_bytes: int = setting(
        4 * 1024 * 1024,
        "Bytes of a request's body; more get 413.",
        low=1,
        flag="--max-body",
        metavar="BYTES",
    )
    max_values: int = setting(
        131_072,
        "Values in the lists and objects of a body.",
        more="A prompt of token ids has one for each. More get 400.",
        low=1,
        flag="--max-values",
        metavar="N",
    )
    max_prompt_tokens: int | None = setting(
        None,
        "Tokens of a prompt; the context's.",
        more="More get 400.",
        low=1,
        flag="--max-prompt-tokens",
        metavar="N",
    )
    max_tokens: int | None = setting(
        None,
        "New tokens of an answer; what is left.",
        more="More get 400.",
        low=1,
        flag="--max-tokens",
        metavar="N",
    )
    max_choices: int = setting(
        32,
        "Answers to one request: prompts times n.",
        more="More get 400.",
        low=1,
        flag="--max-choices",
        metavar="N",
    )
    request_seconds: float = setting(
        600.0, "Seconds for one request; then 504.", above=0, flag="--request-timeout", metavar="SECONDS"
    )
    drain_seconds: float = setting(
        30.0, "Seconds for what runs when the server is stopped.", low=0, flag="--drain-timeout", metavar="SECONDS"
    )
    connections: int | None = setting(
        None,
        "Connections of clients; by the open files that are allowed.",
        low=1,
        flag="--max-connections",
        metavar="N",
    )
    header_seconds: float = setting(
        10.0,
        "Seconds for the head of a request to come whole.",
        more="The connection is closed then.",
        above=0,
        flag="--header-timeout",
        metavar="SECONDS",
    )
    idle_seconds: float = setting(
        30.0,
        "Seconds for a client to ask again, or take its answer.",
        more="The connection is closed then.",
        above=0,
        flag="--idle-timeout",
        metavar="SECONDS",
    )
    cache_tokens: int | None = setting(
        None,
        "Tokens whose keys and values are kept; by the model.",
        more="They are counted over all running sequences.",
        low=1,
        flag="--cache-tokens",
        metavar="N",
    )
    batch_tokens: int = setting(512, "Tokens in one pass of the model.", low=1, flag="--batch-tokens", metavar="N")
    context: int | None = setting(
        None,
        "Tokens of a prompt and its answer; what the model holds.",
        low=1,
        flag="--context",
        metavar="N",
    )

    def __post_init__(self) -> None:
        check(self, "the limit")


@described
@dataclass(frozen=True)
class Allowed:
    """What a client may do that weakens what a patch does; nothing, unless the operator says so (threat-model.md)."""

    completions: bool = setting(
        False, "Answer /v1/completions, which goes around the chat template.", flag="--allow-completions"
    )
    prefill: bool = setting(False, "Take conversations that end with the assistant's turn.", flag="--allow-prefill")
    special_tokens: bool = setting(
        False, "Read control tokens in prompts as such, and not as text.", flag="--allow-special-tokens"
    )
    schemas: bool = setting(
        False,
        "Let clients hold answers to a JSON schema (response_format).",
        more="The model then says the schema's own texts.",
        flag="--allow-json-schema",
    )


@described
@dataclass(frozen=True)
class FollowConfig:
    """What ``--follow`` asks for. Raises UsageError if values make no sense."""

    ref: str = required(
        "Keep to what a channel names: hf://org/repo@stable.",
        more="Or a mirror's.",
        flag="--follow",
        metavar="REPO@CHANNEL",
    )
    every: float = setting(60.0, "How often to look: 30s, 5m.", above=0, duration=True, flag="--every", metavar="TIME")
    stale_after: float | None = setting(
        None,
        "Seconds without an answer after which the server says that it is stale; a few polls.",
        above=0,
    )
    admission_probes: Path | None = setting(
        None,
        'Prompts to try patches with, as JSON: {"harmful": […], "benign": […]}; built-in by default.',
        flag="--admission-probes",
        metavar="FILE",
    )
    admission_min_refused: float = setting(
        0.75, "Share of harmful probes a new patch must refuse.", low=0, high=1, flag="--admission-min-refused"
    )
    admission_max_refused: float = setting(
        0.25, "Share of benign probes it may refuse.", low=0, high=1, flag="--admission-max-refused"
    )
    admission_test: bool = setting(
        True,
        "Switch to followed patches without trying them.",
        flag="--no-admission-test",
    )

    def __post_init__(self) -> None:
        check(self, "following:")
