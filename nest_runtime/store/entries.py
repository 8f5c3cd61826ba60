"""What the store lists: one entry per patch, including those that come with the package.

Listing reads headers only, without torch, so that ``nest-runtime list`` is quick. Nothing listed is verified: the
store checks the bytes against the digest whenever it reads a patch.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import PatchNotFound, StoreError, UsageError, reason_of
from nest_runtime.escape import short
from nest_runtime.hints import closest, did_you_mean
from nest_runtime.io import expand

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

MAX_HEADER_BYTES = 1 << 20
METADATA_KEY = "nest_patch"  # both as in patch/write.py, which needs torch
MIN_DIGEST_CHARS = 8
PATCH_SUFFIX = ".safetensors"
_WORD = re.compile(r"[A-Za-z0-9][\w.+-]*")
_RESERVED_VERSIONS = ("base",)  # NAME@base is the bare model on a server
_FIELDS = ("name", "version", "digest", "base_hash", "base_model", "serial", "parent", "created")


@dataclass(frozen=True)
class Entry:
    """A patch that the store knows, by its header.

    Attributes:
        name, version, digest, base_hash, base_model, serial, parent, created: as in Patch.
        bytes: size of its file.
        builtin: it comes with the package, read-only.
        active: it is the active patch of its base model.
        signed: it carries a signature.
    """

    name: str
    version: str
    digest: str
    base_hash: str
    base_model: str
    serial: int
    parent: str | None
    created: str
    bytes: int
    builtin: bool = False
    active: bool = False
    signed: bool = False

    @property
    def key(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def to_json(self) -> dict[str, Any]:
        """The entry's fields as JSON values."""
        return dict(vars(self))

    def marked(self, *, active: bool) -> Entry:
        """This entry with ``active`` set or not."""
        return replace(self, active=active)


def entry_of(patch: Patch, size: int, *, builtin: bool = False) -> Entry:
    """The entry of a patch whose file has ``size`` bytes."""
    return Entry(**{key: getattr(patch, key) for key in _FIELDS}, bytes=size, builtin=builtin)


def entry_from_json(row: dict[str, Any]) -> Entry:
    """The entry behind ``to_json``. Raises StoreError if fields are missing or unknown."""
    try:
        return Entry(**row)
    except TypeError as error:
        raise StoreError(
            f"the store's index has an entry that cannot be read: {reason_of(error)}",
            "it was written by another version of nest-runtime; update, or move $NEST_HOME/store away",
        ) from error


def check_names(entry: Entry) -> None:
    """Refuse names and versions that could not be typed as ``name@version``. Raises StoreError."""
    for what, value in (("name", entry.name), ("version", entry.version)):
        if not _WORD.fullmatch(value):
            raise StoreError(
                f"the patch's {what} is {value!r}; expected letters, digits, '.', '_', '+' or '-'",
                f"train it again with --{what}",
            )
    if entry.version in _RESERVED_VERSIONS:
        raise StoreError(f"the version {entry.version!r} is reserved for the bare model", "call it v1, v2, …")


def builtin_patches_dir() -> Path | None:
    """The folder of the patches that come with the package, or None if there is none.

    It is ``nest_runtime/_patches`` in an installed wheel, ``patches`` beside the package in a checkout. It holds the
    reference model's patches; those of other bases are in a folder of the base's name:
    ``smollm2-135m-instruct/v1.safetensors``.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_patches", package.parent / "patches"):
        if folder.is_dir():
            return folder
    return None


def builtin_files() -> list[Path]:
    """The built-in patch files: the reference model's by name, then those of other bases, folder by folder."""
    folder = builtin_patches_dir()
    return [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*/*.safetensors"))] if folder else []


def builtin_entries() -> dict[str, tuple[Entry, Path]]:
    """Built-in patches by digest. Raises PatchFormatError for a file that is no patch."""
    found = {}
    for path in builtin_files():
        header = peek_header(path)
        entry = Entry(**{key: header[key] for key in _FIELDS}, bytes=path.stat().st_size, builtin=True)
        found[entry.digest] = (entry, path)
    return found


def peek_header(path: Path) -> dict[str, Any]:
    """A patch file's header without its tensors and without torch; nothing is verified.

    Raises:
        StoreError: there is no such header.
    """
    broken = StoreError(f"{path} has no patch header", f"check it with `nest-runtime inspect {path}`")
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < size <= MAX_HEADER_BYTES:
            raise broken
        try:
            header = json.loads(json.loads(file.read(size))["__metadata__"][METADATA_KEY])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise broken from error
    if not isinstance(header, dict) or not set(_FIELDS) <= set(header):
        raise broken
    return header


def match(ref: str, entries: Iterable[Entry], model_hash: str | None = None) -> Entry:
    """The one entry that ``ref`` names.

    Args:
        ref: ``v3``, ``name@v3``, or ``sha256:`` with at least 8 hex digits.
        entries: what to choose from.
        model_hash: keep to patches of this base (not for digests, which name one patch anyway).

    Raises:
        PatchNotFound: there is no such patch; the message names those that exist.
        UsageError: several patches match.
    """
    everything = list(entries)
    if ref.startswith("sha256:"):
        found = _by_digest(ref, everything)
        where = ""
    else:
        mine = [e for e in everything if model_hash is None or e.base_hash == model_hash]
        found = [e for e in mine if ref in (e.key, e.version)]
        where = f" for {model_name(model_hash, everything)}" if model_hash else ""
        if not found:
            raise not_found(ref, mine, everything, where)
        if model_hash is None:  # the model is the built-in one by default: what ships for others stands back
            found = [e for e in found if not e.builtin or e.base_model == "reference"] or found
    if not found:
        raise not_found(ref, everything, everything, where)
    if len({entry.digest for entry in found}) > 1:
        raise _ambiguous(ref, found, where)
    return found[0]


def model_name(model_hash: str, entries: Iterable[Entry]) -> str:
    """What to call a model in a message: as its patches do, else by the beginning of its hash."""
    names = {entry.base_model for entry in entries if entry.base_hash == model_hash and entry.base_model}
    return min(names) if names else f"model {short(model_hash)}"


def not_found(ref: str, mine: Sequence[Entry], everything: Sequence[Entry], where: str) -> PatchNotFound:
    """The error for a reference that names nothing, with the closest names there are."""
    elsewhere = sorted({e.base_model or short(e.base_hash) for e in everything if ref in (e.key, e.version)})
    if elsewhere:
        hint = f"{ref} exists for {', '.join(elsewhere)}; name that model, or train a patch for this one"
        return PatchNotFound(f"there is no patch {ref!r}{where}", hint)
    file = Path(ref)
    if file.suffix and file.suffix[1:].isalpha() and file.parent.is_dir():
        near = did_you_mean(file.name, (item.name for item in sorted(file.parent.iterdir())))
        if near:
            return PatchNotFound(f"there is no patch {ref!r}{where}, and no such file", f"{near}give the file's name")
    names = closest(ref, [e.version for e in mine] + [e.key for e in mine])
    if names:
        return PatchNotFound(
            f"there is no patch {ref!r}{where}", f"closest: {', '.join(names)}; see `nest-runtime list`"
        )
    return PatchNotFound(
        f"there is no patch {ref!r}{where}, and the store has none{' for it' if where else ''}",
        "train one with `nest-runtime train`, or add a file with `nest-runtime add FILE`",
    )


def _by_digest(ref: str, entries: Sequence[Entry]) -> list[Entry]:
    digits = ref.removeprefix("sha256:")
    if len(digits) < MIN_DIGEST_CHARS or not re.fullmatch(r"[0-9a-f]{8,64}", digits):
        raise UsageError(
            f"{ref!r} is no digest; expected sha256: and {MIN_DIGEST_CHARS} to 64 hex digits",
            "copy it from `nest-runtime list --json`",
        )
    return [entry for entry in entries if entry.digest.startswith(ref)]


def _ambiguous(ref: str, found: Sequence[Entry], where: str) -> UsageError:
    keys = sorted({entry.key for entry in found})
    models = sorted({entry.base_model or short(entry.base_hash) for entry in found})
    if len({entry.base_hash for entry in found}) > 1:
        digests = sorted({short(entry.digest) for entry in found})
        return UsageError(
            f"{ref!r} names several patches{where}, of the models {', '.join(models)}",
            f"say which with --model, or: {' or '.join(keys if len(keys) == len(found) else digests)}",
        )
    return UsageError(f"{ref!r} names several patches{where}: {', '.join(keys)}", f"say which, e.g. {keys[0]}")


def is_path(ref: str | Path) -> bool:
    """Whether a reference means a file of its own rather than something in the store, on the Hub or in a mirror."""
    if isinstance(ref, Path):
        return True
    if ref.startswith("sha256:") or is_repository(ref):
        return False
    return ref.endswith(PATCH_SUFFIX) or _is_pathlike(ref)


def is_repository(ref: str | Path) -> bool:
    """Whether a reference means a version of a repository: on the Hub, under a URL, or ``FOLDER@version``."""
    if isinstance(ref, Path) or ref.endswith(PATCH_SUFFIX):
        return False
    if "://" in ref:
        return True
    place, at, _ = ref.rpartition("@")
    while at and _is_pathlike(place):
        if expand(place).is_dir():
            return True
        place, at, _ = place.rpartition("@")  # FOLDER@NAME@version
    return False


def _is_pathlike(text: str) -> bool:
    return os.sep in text or "/" in text or text.startswith(("~", "."))
