"""Signed JSON documents: one byte form, strict reading, signing and verifying.

The manifest of a patch, the list of revocations and a channel's pointer are such documents. Each says
its own kind, so that a signature over one can never pass for a signature over another.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nest_runtime.errors import NestError, SignatureError, reason_of
from nest_runtime.io import canonical_json, read_bytes
from nest_runtime.patch.frame import FramingError, parse_object

MAX_DOCUMENT = 16 * 1024 * 1024  # bytes
_TIME = "%Y-%m-%dT%H:%M:%SZ"

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}$")]
Serial = Annotated[int, Field(ge=0, le=2**53)]
Time = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]


class Value(BaseModel):
    """Base of everything in a document: immutable, no unknown fields, no conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Document(Value):
    """A value with one byte form. Subclasses fix ``kind`` and ``format``."""

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8, one newline at the end."""
        value = self.model_dump(mode="json")
        return canonical_json(value) + b"\n"

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """The document in some bytes; ``where`` names them. Raises SignatureError that names the first wrong field."""
        try:
            if len(data) > MAX_DOCUMENT:
                raise FramingError(f"{len(data)} bytes; expected at most {MAX_DOCUMENT}")
            parse_object(data, "it")
            document = cls.model_validate_json(data)
        except ValidationError as error:
            raise SignatureError(f"{where}: {first_problem(error)}", "fetch it again from its publisher") from error
        except FramingError as error:
            raise SignatureError(f"{where}: {error}", "fetch it again from its publisher") from error
        if document.to_bytes() != data:
            raise SignatureError(f"{where} is not in canonical form", "fetch it again from its publisher")
        return document


def first_problem(error: ValidationError) -> str:
    """What is wrong with the first field of a refused value, e.g. ``keys[0].names is missing``."""
    problem = error.errors(include_url=False)[0]
    name = ""
    for part in problem["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{name} is no field that is known here"
    found = "" if problem["type"] == "value_error" else f" (found {problem.get('input')!r:.60})"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name or 'the value'}: {message[:1].lower()}{message[1:]}{found}"


def read_file(path: Path, what: str) -> bytes:
    """The bytes of a signed file of bounded size. Raises SignatureError if there is none to read."""
    try:
        return read_bytes(path, MAX_DOCUMENT)
    except FileNotFoundError as error:
        raise SignatureError(f"there is no {what} at {path}", "ask its publisher to sign it") from error
    except OSError as error:
        raise NestError(f"{path} cannot be read: {reason_of(error)}", "check its permissions") from error


def stamp(moment: datetime | None = None) -> str:
    """A moment (now by default) as documents write it: ISO 8601, UTC, whole seconds."""
    return (moment or datetime.now(UTC)).astimezone(UTC).strftime(_TIME)


def moment_of(text: str, field: str) -> datetime:
    """The moment of a document's field. Raises ValueError for one that no calendar has, e.g. month 13."""
    try:
        return datetime.strptime(text, _TIME).replace(tzinfo=UTC)
    except ValueError as error:
        raise ValueError(f"{field} is {text!r}, which no calendar has") from error


def sorted_unique(items: tuple[Any, ...], key: str, what: str) -> None:
    """Raise ValueError unless the items stand in order of one of their fields, each value once."""
    values = [getattr(item, key) for item in items]
    if any(a >= b for a, b in pairwise(values)):
        raise ValueError(f"{what} must be sorted by {key}, each once")
