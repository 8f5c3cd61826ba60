"""Signatures over named bytes, by OpenSSF model-signing 1.1 (extra ``sign``), offline.

A signature is a sigstore bundle: a DSSE envelope around the SHA-256 of every signed file, made with an elliptic-curve
key (ECDSA, P-256 by default). check.py and policy.py decide what the files mean, who may sign what, and whether a
signed document is still current. A folder that holds the files under their signed names also verifies with the
``model_signing`` command.

The bundle is read strictly before the library sees it, so that no byte of it can change unnoticed. The libraries are
imported where they are used.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nest_runtime.errors import NestError, SignatureError, reason_of
from nest_runtime.escape import short
from nest_runtime.patch.frame import FramingError, parse_object
from nest_runtime.trust.keys import PublicKey, library, public_key_of

MAX_SIGNATURE = 64 * 1024  # bytes; ours have about 1.5 kB

_BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_RESIGN = "fetch it again from its publisher, or sign it again with `nest-runtime sign`"


@dataclass(frozen=True)
class Bundle:
    """A signature as read: whose it claims to be, and which files with which SHA-256 it is about. Nothing verified."""

    key_id: str
    resources: Mapping[str, str]


def sign_files(files: Mapping[str, bytes], private_path: Path, passphrase: str = "") -> tuple[bytes, PublicKey]:
    """Sign files: the bundle's bytes, and the public half of the key. The result has been verified.

    Args:
        files: signed name → content.
        private_path: PEM of an EC private key that nobody but its owner may read.
        passphrase: of the key, if it has one.

    Raises:
        UsageError: the key cannot be used, or is open to others.
        NestError: model-signing is not installed.
    """
    hashing, signing, _ = library()
    public = public_key_of(private_path, passphrase)
    with _staged(files) as (folder, beside):
        target = beside / "signature"
        signer = signing.Config().set_hashing_config(_hashing(hashing))
        signer.use_elliptic_key_signer(private_key=private_path, password=passphrase.encode() or None)
        signer.sign(folder, target)
        signature = target.read_bytes()
    verify_files(files, signature, [public], "the new signature")
    return signature, public


def verify_files(
    files: Mapping[str, bytes], signature: bytes, keys: Iterable[PublicKey], where: str, *, remedy: str = _RESIGN
) -> PublicKey:
    """Check a signature over exactly these files; returns the key that made it.

    Args:
        files: signed name → content.
        signature: the bundle's bytes.
        keys: those that are trusted; the signature's own hint chooses among them.
        where: how to call the signature in messages.
        remedy: what to do about a signature that is damaged or false.

    Raises:
        SignatureError: malformed, over other files, by a key that is not among ``keys``, or simply false.
        NestError: model-signing is not installed.
    """
    bundle = read_bundle(signature, where, remedy)
    known = {key.id: key for key in keys}
    if bundle.key_id not in known:
        names = ", ".join(f"{key.name} ({short(key.id)})" for key in known.values()) or "none"
        raise SignatureError(
            f"{where} was made by the key {short(bundle.key_id)}; trusted: {names}",
            "if you trust its owner, get the .pub file from them and give it with --trust",
        )
    check_resources(bundle, files, where, remedy)
    key = known[bundle.key_id]
    _verify(files, signature, key, where, remedy)
    return key


def read_bundle(signature: bytes, where: str, remedy: str = _RESIGN) -> Bundle:
    """A signature's claims, read strictly. Raises SignatureError; verifies nothing."""
    try:
        if len(signature) > MAX_SIGNATURE:
            raise FramingError(f"{len(signature)} bytes; expected at most {MAX_SIGNATURE}")
        fields = parse_object(signature, "the bundle")
        if json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode() != signature:
            raise FramingError("not in the form that model-signing writes")
        _expect(fields, {"mediaType", "verificationMaterial", "dsseEnvelope"}, mediaType=_BUNDLE_TYPE)
        material, envelope = fields["verificationMaterial"], fields["dsseEnvelope"]
        _expect(material, {"publicKey", "tlogEntries"}, tlogEntries=[])
        _expect(envelope, {"payload", "payloadType", "signatures"}, payloadType=_PAYLOAD_TYPE)
        _expect(material["publicKey"], {"hint"})
        if not isinstance(envelope["signatures"], list) or len(envelope["signatures"]) != 1:
            raise FramingError("expected one signature")
        _expect(envelope["signatures"][0], {"sig", "keyid"}, keyid="")
        _decode(envelope["signatures"][0]["sig"])
        resources = _resources(parse_object(_decode(envelope["payload"]), "its payload"))
        hint = material["publicKey"]["hint"]
        if not isinstance(hint, str) or not re.fullmatch(r"[0-9a-f]{64}", hint):
            raise FramingError("it does not name its key")
    except (FramingError, UnicodeEncodeError) as error:
        raise SignatureError(f"{where} is no signature that can be read: {error}", remedy) from error
    return Bundle(f"sha256:{hint}", resources)


def check_resources(bundle: Bundle, files: Mapping[str, bytes], where: str, remedy: str = _RESIGN) -> None:
    """Whether a signature is about exactly these files. Raises SignatureError naming the first that differs."""
    if set(bundle.resources) != set(files):
        raise SignatureError(
            f"{where} is over {', '.join(sorted(bundle.resources)) or 'nothing'}; "
            f"expected exactly {', '.join(sorted(files))}",
            remedy,
        )
    for name, content in files.items():
        found = hashlib.sha256(content).hexdigest()
        if found != bundle.resources[name]:
            raise SignatureError(
                f"{where}: {name} was changed after signing: its SHA-256 is {found[:12]}…, "
                f"{bundle.resources[name][:12]}… was signed",
                remedy,
            )


def _verify(files: Mapping[str, bytes], signature: bytes, key: PublicKey, where: str, remedy: str) -> None:
    hashing, _, verifying = library()
    from cryptography.exceptions import InvalidSignature

    with _staged(files) as (folder, beside):
        (beside / "signature").write_bytes(signature)
        (beside / "key.pub").write_bytes(key.pem)
        verifier = verifying.Config().set_hashing_config(_hashing(hashing))
        verifier.use_elliptic_key_verifier(public_key=beside / "key.pub")
        try:
            verifier.verify(folder, beside / "signature")
        except (InvalidSignature, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split()) or "the signature does not fit what it is over"
            raise SignatureError(
                f"{where} is false: it was not made by {key.name} ({short(key.id)}): {reason:.200}", remedy
            ) from error


def _hashing(hashing: ModuleType) -> Any:
    return hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)


@contextlib.contextmanager
def _staged(files: Mapping[str, bytes]) -> Iterator[tuple[Path, Path]]:
    """The files under their signed names in a private folder of ours, and another folder beside it.

    The library reads paths; these are copies that nobody else can change between checking and use.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="nest-sign-") as root:
            folder = Path(root) / "signed"
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)
            yield folder, Path(root)
    except OSError as error:
        raise NestError(
            f"signatures need a temporary folder: {reason_of(error)}", "free some space, or set TMPDIR"
        ) from error


def _expect(value: Any, keys: set[str], **fixed: Any) -> None:
    if not isinstance(value, dict) or set(value) != keys:
        raise FramingError(f"expected an object of {', '.join(sorted(keys))}")
    for key, wanted in fixed.items():
        if value[key] != wanted:
            raise FramingError(f"{key} is {value[key]!r:.60}; expected {wanted!r:.60}")


def _decode(text: Any) -> bytes:
    """Base64 in its one canonical form: no two texts stand for the same bytes."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise FramingError("its payload or signature is not base64") from error
    if base64.b64encode(data).decode() != text:
        raise FramingError("its base64 is not in canonical form")
    return data


def _resources(payload: Mapping[str, Any]) -> dict[str, str]:
    """Signed name → SHA-256 in hex, from an in-toto statement."""
    try:
        if payload["predicateType"] != _PREDICATE_TYPE or payload["predicate"]["serialization"]["method"] != "files":
            raise FramingError("it is no signature over whole files")
        rows = payload["predicate"]["resources"]
        found = {row["name"]: row["digest"] for row in rows if row["algorithm"] == "sha256"}
    except (KeyError, TypeError) as error:
        raise FramingError("its payload names no files") from error
    if len(found) != len(rows) or not all(isinstance(item, str) for pair in found.items() for item in pair):
        raise FramingError("it names a file twice, or by another hash than SHA-256")
    return found
