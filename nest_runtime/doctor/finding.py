"""What a check of the installation found."""

from __future__ import annotations

from dataclasses import asdict, dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what, in a word or two.
        status: ``ok``; ``note``, good to know; ``problem``, something will not work.
        found: what there is, with its values.
        advice: what to do, or nothing.
    """

    name: str
    status: str
    found: str
    advice: str = ""

    def to_json(self) -> dict[str, str]:
        """The finding's fields as JSON values."""
        return asdict(self)
