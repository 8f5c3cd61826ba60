"""What travels beside a patch so that it can be trusted: its manifest and the signature over both.

    x.safetensors + x.manifest.json + x.sig                   a patch file of one's own
    patch.safetensors + manifest.json + patch.sig             a repository on the Hub, or a mirror of one

The signature is over two files, always under the names ``patch.safetensors`` and ``manifest.json``,
so a pair can be renamed from one layout to the other. The README is left out: the Hub changes it.
The manifest follows from the patch alone; who may sign it is decided in check.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from pydantic import Field

from nest_runtime.errors import PatchFormatError, PatchNotFound, SignatureError, reason_of
from nest_runtime.io import Unfit, atomic_write, open_file
from nest_runtime.trust.documents import Digest, Document, Label, Serial, read_file
from nest_runtime.trust.signing import read_bundle

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

PATCH_FILE = "patch.safetensors"
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "patch.sig"


class Manifest(Document):
    """What a signature on a patch binds, beside the bytes: all of it also stands in the patch's own header.

    Attributes:
        name, version, serial: as in Patch.
        base_hash: the model hash it is for.
        digest: the patch digest.
        sha256, bytes: of the patch file as nest-runtime writes it.
    """

    kind: Literal["nest-runtime-patch"] = "nest-runtime-patch"
    format: Literal[1] = 1
    name: Label
    version: Label
    serial: Serial
    base_hash: Digest
    digest: Digest
    sha256: Digest
    bytes: int = Field(ge=0)


@dataclass(frozen=True)
class Material:
    """The manifest's and the signature's bytes, as found; ``source`` says where, for messages."""

    manifest: bytes
    signature: bytes
    source: str = ""

    @property
    def key_id(self) -> str:
        """The key that the signature names. Raises SignatureError if it cannot be read; verifies nothing."""
        return read_bundle(self.signature, self.source or "the signature").key_id

    @property
    def announced(self) -> int:
        """How many bytes the patch file has by its manifest. Raises SignatureError if that is none."""
        return Manifest.parse(self.manifest, f"the manifest of {self.source or 'a patch'}").bytes

    def signed_files(self, patch_file: bytes) -> dict[str, bytes]:
        """What the signature must be over."""
        return {PATCH_FILE: patch_file, MANIFEST_FILE: self.manifest}


def manifest_of(patch: Patch, patch_file: bytes) -> Manifest:
    """The manifest of a patch whose file has these bytes."""
    return Manifest(
        name=patch.name,
        version=patch.version,
        serial=patch.serial,
        base_hash=patch.base_hash,
        digest=patch.digest,
        sha256="sha256:" + hashlib.sha256(patch_file).hexdigest(),
        bytes=len(patch_file),
    )


def patch_path(path: Path) -> Path:
    """The patch file that a path means: itself, or of a folder the one that repositories have."""
    return path / PATCH_FILE if path.is_dir() else path


def read_patch_file(path: Path) -> bytes:
    """A patch file's bytes. Raises as ``patch_size``."""
    with _opened(path) as file:
        return file.read()


def patch_size(path: Path) -> int:
    """A patch file's size. Raises PatchNotFound, or PatchFormatError for what is no file, or larger than a patch is."""
    with _opened(path) as file:
        return os.fstat(file.fileno()).st_size


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    from nest_runtime.patch.file import MAX_FILE

    try:
        with open_file(path, MAX_FILE) as file:
            yield file
    except Unfit as error:
        raise PatchFormatError(f"{path} is no patch: {error.strerror}", "name a .safetensors patch file") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PatchNotFound(f"there is no patch file {path}", "check the path") from error
    except OSError as error:
        raise PatchNotFound(f"{path} cannot be read: {reason_of(error)}", "check its permissions") from error


def material_paths(path: Path) -> tuple[Path, Path]:
    """Where the manifest and the signature of a patch file belong."""
    if path.name == PATCH_FILE:
        return path.parent / MANIFEST_FILE, path.parent / SIGNATURE_FILE
    return path.with_suffix(".manifest.json"), path.with_suffix(".sig")


def read_material(path: Path) -> Material | None:
    """What lies beside a patch file, or None if it is unsigned.

    Raises:
        SignatureError: only one of the two files is there.
    """
    manifest, signature = material_paths(path)
    present = [item for item in (manifest, signature) if os.path.lexists(item)]  # a link to nowhere is no "unsigned"
    if not present:
        return None
    if len(present) == 1:
        missing = signature if present[0] == manifest else manifest
        raise SignatureError(
            f"{present[0]} is there, {missing} is missing", "fetch both again, or sign with `nest-runtime sign`"
        )
    return Material(read_file(manifest, "manifest"), read_file(signature, "signature"), str(signature))


def write_material(path: Path, material: Material) -> tuple[Path, Path]:
    """Write manifest and signature beside a patch file, each atomically; returns their paths. Raises OSError."""
    manifest, signature = material_paths(path)
    atomic_write(manifest, material.manifest)
    atomic_write(signature, material.signature)
    return manifest, signature


def check_manifest(found: bytes, patch: Patch, patch_file: bytes, where: str) -> None:
    """Whether a manifest is the manifest of this very patch. Raises SignatureError naming the first field that differs.

    Said before the signature is checked, because it names the mix-up: another version's manifest, another base's.
    """
    manifest, expected = Manifest.parse(found, where), manifest_of(patch, patch_file)
    for field in ("name", "version", "serial", "base_hash", "digest", "sha256", "bytes"):
        mine, theirs = getattr(expected, field), getattr(manifest, field)
        if mine != theirs:
            raise SignatureError(
                f"{where} is for another patch: it says {field} {theirs}, {patch.label} has {mine}",
                "fetch patch, manifest and signature again from one place",
            )
