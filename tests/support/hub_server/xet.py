"""Which Xet hash a file has, from the local content store that hf_xet writes for ``local:///folder``.

The client tells the Hub a file's SHA-256 only. The store's shards hold both: after a header of 48 bytes
come records of 48 bytes. A file's first one is its hash (32 bytes) with flags and a count of segments;
the last one, where the flags say so, is its SHA-256. Hashes are written as four little-endian words.
"""

from __future__ import annotations

import struct
from pathlib import Path

RECORD = 48
HAS_VERIFICATION = 1 << 31
HAS_SHA256 = 1 << 30


def xet_hash(folder: Path, sha256: str) -> str | None:
    """The Xet hash of the file with this SHA-256 (both in hex), or None where the store lacks it."""
    for shard in folder.rglob("*.mdb"):
        found = _files(shard.read_bytes()).get(sha256)
        if found:
            return found
    return None


def _files(shard: bytes) -> dict[str, str]:
    files = {}
    at = RECORD
    while at + RECORD <= len(shard) and shard[at : at + 32] != b"\xff" * 32:
        flags, segments = struct.unpack_from("<II", shard, at + 32)
        last = at + RECORD * (1 + segments * (2 if flags & HAS_VERIFICATION else 1))
        if flags & HAS_SHA256:
            files[_hex(shard[last : last + 32])] = _hex(shard[at : at + 32])
            last += RECORD
        at = last
    return files


def _hex(data: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))
