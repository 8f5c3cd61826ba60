"""Words of others (names, versions, file names, errors) on their way to a terminal, a log or a page.

Whoever writes them may want to steer the terminal, forge a second line or turn the direction of writing.
"""

from __future__ import annotations

import re

# C0 and C1 controls (with them ANSI and OSC sequences), line and paragraph separators, marks that turn the direction
# of writing or are not seen at all, and halves of surrogate pairs, which no output can encode. The joiners U+200C and
# U+200D stay: scripts and emoji are written with them.
_UNSEEN = "\xad\u180e\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
_STEERING = f"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\u200e\u200f\u061c\ud800-\udfff{_UNSEEN}"
_CONTROL = re.compile(f"[{_STEERING}]")
_BREAKING = re.compile(f"[{_STEERING}\t\n]")


def clean(text: str) -> str:
    """Text of several lines without what could steer the terminal; tabs and newlines stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def visible(text: object, limit: int | None = None) -> str:
    r"""One line in which such characters stand as ``\n``, ``\x1b`` or ``\u202e``.

    Args:
        text: anything that can be printed.
        limit: the most characters; what is cut off is counted.
    """
    shown = _BREAKING.sub(lambda found: ascii(found[0])[1:-1], str(text))
    if limit is None or len(shown) <= limit:
        return shown
    return f"{shown[:limit]}… ({len(shown) - limit} more)"


def short(digest: str | None) -> str:
    """The beginning of a digest, as people read it and commands accept it: ``sha256:`` and 12 digits."""
    return digest[:19] if digest else "-"
