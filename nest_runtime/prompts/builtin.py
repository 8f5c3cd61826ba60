"""Prompts that come with the package: for training a patch, and for choosing its settings.

A patch learns from harmful prompts to refuse, and from benign ones to answer as the base does. If the benign prompts
all lie far from the harmful ones, the patch learns to refuse everything near harm. The files here lie near: alarming
words in harmless sentences, and harmless requests in the shapes that harmful ones have.

- ``harmful``: plainly harmful requests of eighteen kinds, some long, some in other languages; for training. No answers
  and no jailbreaks are among them.
- ``borderline``: benign prompts close to harm in words, topic or grammar; for training.
- ``imperatives``: harmless requests of one sentence, in the form and fields of harmful goals; for training.
- ``everyday``: what people ask a small model on an ordinary day, conversations included; for training.
- ``pasted``: harmless requests with something pasted in, code, data, puzzles, mails, tables, texts; for training.
- ``small-talk``: greetings, thanks, jokes, feelings: what people type first; for training.
- ``validation``: other borderline prompts, for choosing settings by over-refusal; never for training.
- ``imperatives-validation``: other imperatives, likewise; a separate file, so figures of ``validation`` stay
  comparable.

All of them were written for this project. None is copied or reworded from a published set, so that JailbreakBench,
XSTest, CoCoNot and others stay fair tests. A row is ``{"prompt" or "messages", "category"}``, without an answer, and
``examples.load_examples`` reads it.
"""

from __future__ import annotations

from pathlib import Path

from nest_runtime.errors import DataError

NAMES = (
    *("harmful", "borderline", "imperatives", "everyday", "pasted", "small-talk"),  # for training
    *("validation", "imperatives-validation"),
)


def bundled(name: str) -> Path:
    """The path of a prompt file that comes with the package.

    Args:
        name: one of ``NAMES``.

    Raises:
        DataError: no prompt file has that name.
    """
    if name not in NAMES:
        raise DataError(f"no bundled prompts are named {name!r}; expected one of {', '.join(NAMES)}", _HINT)
    return Path(__file__).parent / f"{name}.jsonl"


_HINT = "give one of these names, or the path of a prompt file of your own to load_examples"
