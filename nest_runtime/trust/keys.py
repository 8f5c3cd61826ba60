"""Key files: making them, and reading them with an error for each thing that can be wrong.

Elliptic curves in PEM: the private key as PKCS #8, the public one as SubjectPublicKeyInfo. This is also the only
place that imports model-signing (extra ``sign``), so that one error says that it is missing.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nest_runtime.errors import NestError, UsageError, reason_of
from nest_runtime.install import extra
from nest_runtime.io import open_file

MAX_KEY = 64 * 1024  # bytes
CURVES = ("secp256r1", "secp384r1", "secp521r1")


@dataclass(frozen=True)
class PublicKey:
    """A key that signatures are checked with.

    Attributes:
        id: ``sha256:<hex>`` over the PEM text, which is how a signature names its key.
        pem: SubjectPublicKeyInfo, normalized.
        name: what people call it.
    """

    id: str
    pem: bytes
    name: str


def generate_keys(folder: Path, name: str = "nest", passphrase: str = "") -> tuple[Path, Path, PublicKey]:
    """Make a P-256 key pair: ``folder/name.key`` (mode 0600) and ``folder/name.pub``.

    Args:
        folder: made if missing, for its owner only.
        name: the stem of both files.
        passphrase: encrypts the private key; empty leaves it in the clear.

    Raises:
        UsageError: either file exists: a key is never overwritten.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    private_path, public_path = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (private_path, public_path):
        if path.exists() or path.is_symlink():
            raise UsageError(f"{path} exists; keys are never overwritten", "give another folder, or another --name")
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = forms.BestAvailableEncryption(passphrase.encode()) if passphrase else forms.NoEncryption()
    secret = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, encryption)
    public = _public(key.public_key(), name, str(public_path))
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_new(private_path, secret, 0o600)
        try:
            _write_new(public_path, public.pem, 0o644)
        except BaseException:
            private_path.unlink()
            raise
    except OSError as error:
        raise NestError(f"{folder} cannot be written: {reason_of(error)}", "choose another folder") from error
    return private_path, public_path, public


def read_public_key(path: Path, name: str = "") -> PublicKey:
    """The public key of a PEM file; raises UsageError if it is none that signatures can be made with."""
    return parse_public_key(_read_key(path)[0], name or path.stem, str(path))


def parse_public_key(pem: bytes, name: str, where: str) -> PublicKey:
    """The public key of some PEM text; ``where`` says in messages where it was. Raises UsageError."""
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as forms

    if b"PRIVATE KEY" in pem:
        raise UsageError(f"{where} holds a private key; expected a public one", "give the .pub file beside it")
    try:
        key = forms.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{where} holds no public key in PEM form", "give a .pub file of `nest-runtime keygen`"
        ) from error
    return _public(key, name, where)


def public_key_of(private_path: Path, passphrase: str = "") -> PublicKey:
    """The public half of a private key file. Raises UsageError as ``sign_files``."""
    key = _private_key(private_path, passphrase)
    return _public(key.public_key(), private_path.stem, str(private_path))


def is_encrypted(private_path: Path) -> bool:
    """Whether a private key file asks for a passphrase."""
    return b"ENCRYPTED" in _read_key(private_path)[0]


def library() -> tuple[ModuleType, ModuleType, ModuleType]:
    """model_signing's hashing, signing and verifying. Raises NestError if the extra is not installed."""
    try:
        from model_signing import hashing, signing, verifying
    except ImportError as error:
        raise _not_installed(error) from error
    return hashing, signing, verifying


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise _not_installed(error) from error


def _not_installed(error: ImportError) -> NestError:
    return NestError(
        f"signatures need model-signing and pyOpenSSL, which are not installed ({error})",
        extra("sign"),
    )


def _private_key(path: Path, passphrase: str) -> Any:
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization as forms

    pem, mode = _read_key(path)
    if b"PUBLIC KEY" in pem:
        raise UsageError(f"{path} is a public key; expected the private key", "give the file that ends with .key")
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            f"others may use the private key {path} (mode {mode & 0o777:o}); expected 600",
            f"chmod 600 {path}, and make a new key if others may have read it",
        )
    try:
        key = forms.load_pem_private_key(pem, passphrase.encode() or None)
    except TypeError as error:
        needs = "is encrypted and needs its passphrase" if b"ENCRYPTED" in pem else "is not encrypted"
        raise UsageError(f"the private key {path} {needs}", "set or unset NEST_KEY_PASSPHRASE") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"{path} holds no private key in PEM form that this passphrase opens",
            "give a .key file of `nest-runtime keygen`; the passphrase is read from NEST_KEY_PASSPHRASE",
        ) from error
    _public(key.public_key(), path.stem, str(path))
    return key


def _public(key: Any, name: str, where: str) -> PublicKey:
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    kind = key.curve.name if isinstance(key, ec.EllipticCurvePublicKey) else type(key).__name__
    if kind not in CURVES:
        raise UsageError(
            f"{where} is a key of kind {kind}; expected an elliptic curve among {', '.join(CURVES)}",
            "make one with `nest-runtime keygen`",
        )
    pem = key.public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    return PublicKey("sha256:" + hashlib.sha256(pem).hexdigest(), pem, name)


def _read_key(path: Path) -> tuple[bytes, int]:
    """A key file's text, without a byte order mark, and the mode of that very file."""
    try:
        with open_file(path, MAX_KEY) as file:
            return file.read(MAX_KEY).removeprefix(codecs.BOM_UTF8), os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise UsageError(f"the key {path} cannot be read: {reason_of(error)}", "check the path") from error


def _write_new(path: Path, data: bytes, mode: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise
