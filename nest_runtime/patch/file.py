"""Patch files, read strictly; write.py writes them. docs/reference/patch-format.md specifies both.

Reading checks the frame, the header, and every tensor's name, dtype, shape and place before it reads any tensor. It
checks the digest in pieces before it keeps any tensor. It gives a Patch or an error, nothing in between. Whether a
patch fits a model is checked elsewhere (patch.check_sites), and so is whether its publisher is trusted (trust/).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from nest_runtime.errors import DigestMismatch, PatchFormatError, PatchNotFound, reason_of
from nest_runtime.io import Unfit, canonical_json, expand, open_file
from nest_runtime.patch.frame import Frame, FramingError, TensorEntry, header_length, parse_frame, parse_object
from nest_runtime.patch.patch import CLAIMS_VERSION, FORMAT_VERSIONS, Patch
from nest_runtime.patch.site import PARTS, REQUIRED_PARTS, Site, check_parts
from nest_runtime.patch.values import FrozenTensor, digest_of
from nest_runtime.patch.write import MAX_FILE, MAX_HEADER, METADATA_KEY

_FETCH = "fetch or copy the file again"
_FIELDS: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "name": (str,),
    "version": (str,),
    "serial": (int,),
    "base_hash": (str,),
    "rows_digest": (str,),
    "base_model": (str,),
    "architecture": (str,),
    "parent": (str, type(None)),
    "method": (dict,),
    "data": (dict,),
    "metrics": (dict,),
    "created": (str,),
    "sites": (list,),
    "digest": (str,),
}
_SITE_FIELDS: dict[str, tuple[type, ...]] = {"name": (str,), "d_out": (int,), "stats": (dict,)}

_PIECE = 1 << 20  # bytes read at a time while nothing is known to be right

Read = Callable[[int, int], bytes]  # the data area's bytes from start to stop; fewer where the file was cut meanwhile


def read_patch(path: str | os.PathLike[str]) -> Patch:
    """Read and check a patch file.

    Raises:
        PatchNotFound: there is no such file.
        PatchFormatError: it breaks the format.
        DigestMismatch: its content is not what its digest says.
    """
    path = expand(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            header, data_start = _read_header(file.read(8), size, file.read, str(path))

            def read(start: int, stop: int) -> bytes:
                file.seek(data_start + start)
                return file.read(stop - start)

            return _parse(header, size - data_start, read, str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PatchNotFound(f"there is no patch file {path}", "check the path") from error
    except Unfit as error:
        raise PatchFormatError(
            f"{path} is no regular file: {error.strerror}", "name a .safetensors patch file"
        ) from error
    except OSError as error:
        raise PatchNotFound(f"{path} cannot be read: {reason_of(error)}", "check its permissions") from error


def from_bytes(data: bytes | bytearray | memoryview, source: str = "") -> Patch:
    """Read and check a patch from bytes.

    Args:
        data: a whole patch file.
        source: names the bytes in messages.

    Raises:
        PatchFormatError, DigestMismatch: as ``read_patch``.
    """
    view, where = memoryview(data).cast("B"), source or "patch"
    header, data_start = _read_header(bytes(view[:8]), len(view), lambda n: bytes(view[8 : 8 + n]), where)
    area = view[data_start:]
    return _parse(header, len(area), lambda start, stop: bytes(area[start:stop]), where)


def _read_header(prefix: bytes, size: int, read: Callable[[int], bytes], where: str) -> tuple[bytes, int]:
    if size > MAX_FILE:
        raise PatchFormatError(f"{where}: {size} bytes is over the limit of {MAX_FILE}", "this is no patch file")
    try:
        length = header_length(prefix, size, MAX_HEADER)
    except FramingError as error:
        raise PatchFormatError(f"{where}: {error}", _FETCH) from error
    return read(length), 8 + length


def _parse(header: bytes, data_size: int, read: Read, where: str) -> Patch:
    """From a file's header and a way to read its tensors to a Patch; see the module's docstring for the order."""
    try:
        frame = parse_frame(header, data_size)
        fields = _metadata(frame)
        _check_header(fields)
        parts = _match_tensors(fields["sites"], frame)
    except FramingError as error:
        raise PatchFormatError(f"{where}: {error}", _FETCH) from error
    except PatchFormatError as error:
        raise PatchFormatError(f"{where}: {error.message}", error.hint) from error
    found = _digest(fields, frame, read, where)
    if found != fields["digest"]:
        raise DigestMismatch(
            f"{where}: the content has digest {found}, its header says {fields['digest']:.80}",
            "the file was damaged or changed: fetch it again from its publisher",
        )
    tensors = {entry.name: _frozen(entry, read, where) for entry in frame.entries}
    try:
        patch = _build(fields, parts, tensors)
    except PatchFormatError as error:
        raise PatchFormatError(f"{where}: {error.message}", error.hint) from error
    if frame.metadata[METADATA_KEY].encode() != canonical_json({**patch.header(), "digest": patch.digest}):
        raise PatchFormatError(f"{where}: the header is not in canonical form", "re-export the patch")
    return patch


def _metadata(frame: Frame) -> dict[str, Any]:
    if set(frame.metadata) != {METADATA_KEY}:
        found = ", ".join(sorted(frame.metadata)[:5]) or "nothing"
        raise PatchFormatError(
            f"no nest-runtime patch: __metadata__ holds {found:.200}; expected {METADATA_KEY!r} alone",
            "name a file written by nest-runtime",
        )
    return parse_object(frame.metadata[METADATA_KEY].encode("utf-8", "surrogatepass"), "patch header")


def _check_header(fields: Mapping[str, Any]) -> None:
    version = fields.get("format_version")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        known = " and ".join(map(str, FORMAT_VERSIONS))
        raise PatchFormatError(f"format version {version!r:.80}; this release reads {known}", "upgrade nest-runtime")
    _check_types(fields, {**_FIELDS, "claims": (dict,)} if version == CLAIMS_VERSION else _FIELDS, "header")
    for site in fields["sites"]:
        if not isinstance(site, dict):
            raise PatchFormatError(f"header: a site is {site!r:.80}; expected an object", "re-export the patch")
        _check_types(site, _SITE_FIELDS, f"site {site.get('name')!r:.80} of the header")


def _check_types(fields: Mapping[str, Any], wanted: Mapping[str, tuple[type, ...]], where: str) -> None:
    unknown, missing = sorted(set(fields) - set(wanted)), sorted(set(wanted) - set(fields))
    if unknown:
        raise PatchFormatError(f"{where}: unknown field {unknown[0]!r:.80}", "upgrade nest-runtime, or re-export")
    if missing:
        raise PatchFormatError(f"{where}: missing field {missing[0]!r}", "re-export the patch")
    for key, types in wanted.items():
        if type(fields[key]) not in types:
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
            raise PatchFormatError(
                f"{where}: {key} is a {type(fields[key]).__name__}; expected {expected}", "re-export the patch"
            )


def _match_tensors(sites: list[dict[str, Any]], frame: Frame) -> list[dict[str, str]]:
    """For each site of the header, part → tensor name. Every tensor must belong to a site and have the right form."""
    left = {entry.name: entry for entry in frame.entries}
    result = []
    for site in sites:
        found = {key: left.pop(f"{site['name']}.{key}") for key in PARTS if f"{site['name']}.{key}" in left}
        missing = [key for key in REQUIRED_PARTS if key not in found]
        if missing:
            raise PatchFormatError(f"missing tensor {site['name']:.200}.{missing[0]}", "re-export the patch")
        check_parts(f"site {site['name']:.200}", {key: (e.dtype, e.shape) for key, e in found.items()})
        result.append({key: entry.name for key, entry in found.items()})
    if left:
        raise PatchFormatError(
            f"extra tensor {next(iter(left))!r:.200} belongs to no site of the header", "re-export the patch"
        )
    return result


def _frozen(entry: TensorEntry, read: Read, where: str) -> FrozenTensor:
    data = read(entry.start, entry.stop)
    if len(data) != entry.nbytes:
        raise PatchFormatError(f"{where}: truncated in tensor {entry.name!r:.200}", _FETCH)
    return FrozenTensor(data, entry.dtype, entry.shape)


def _digest(fields: Mapping[str, Any], frame: Frame, read: Read, where: str) -> str:
    rows = [(entry.name, entry.dtype, entry.shape, _sha256(entry, read)) for entry in frame.entries]
    try:
        return digest_of(fields, rows)
    except (ValueError, RecursionError) as error:  # lone surrogates, infinite or bottomless values
        raise PatchFormatError(f"{where}: the header has no canonical form: {error!s:.120}", _FETCH) from error


def _sha256(entry: TensorEntry, read: Read) -> str:
    found = hashlib.sha256()
    for at in range(entry.start, entry.stop, _PIECE):
        found.update(read(at, min(at + _PIECE, entry.stop)))
    return found.hexdigest()


def _build(fields: Mapping[str, Any], parts: list[dict[str, str]], tensors: Mapping[str, FrozenTensor]) -> Patch:
    if not fields["rows_digest"]:
        raise PatchFormatError("rows_digest is empty; expected sha256:<64 hex digits>", "re-export the patch")
    sites = [
        Site(site["name"], site["d_out"], **{key: tensors[name] for key, name in names.items()}, stats=site["stats"])
        for site, names in zip(fields["sites"], parts, strict=True)
    ]
    own = {key: value for key, value in fields.items() if key not in {"format_version", "digest", "sites"}}
    return Patch(**own, sites=tuple(sites))
