#!/usr/bin/env python3
"""Verify a safety patch before anything is started: one file, Python's standard library alone.

    python nest_verify.py v3.safetensors --key nest.pub --base ./model

checks first that the patch, its manifest and its signature are about the same bytes, then the signature, by one of
the keys given. The patch digest follows, and at last that the base in the folder is the one that the patch was made
on. Prints one line, and ends with

    0   everything was checked, and is as it should be
    1   a file is missing, damaged, or no patch
    2   wrong usage
    3   must not be trusted: false signature, stranger's key, changed content, other base, other name, older serial

It needs no nest_runtime and knows as much of it as docs/reference/patch-format.md says: the package and this file are
written apart, and compared by tests. It does not ask whether a patch was revoked or an older one than accepted before
(it has no memory: say --min-serial), and does not look at the values of its tensors: the server does both.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import json
import math
import os
import re
import stat
import sys
from typing import Any, BinaryIO

MAX_PATCH, MAX_PATCH_HEADER = 1 << 30, 1 << 20
MAX_MODEL_HEADER = 100 * 1000 * 1000
MAX_DOCUMENT = 64 * 1024
PIECE = 1 << 20
FORMATS = (1, 2)
PAYLOAD_TYPE = "application/vnd.in-toto+json"
DTYPES = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4}  # of a patch, and bytes of a number
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Unfit(Exception):
    """A file that is missing, damaged, or something else. Exit status 1."""

    status = 1


class Distrusted(Exception):
    """What must not be used. Exit status 3."""

    status = 3


# Elliptic curves: ECDSA as in FIPS 186-5, section 6.4.2, on the curves that model-signing uses.


class Curve:
    """y² = x³ − 3x + b over the field of p, with a generator of prime order n."""

    def __init__(self, spki: str, hash_name: str, p: int, b: int, x: int, y: int, n: int) -> None:
        self.spki, self.hash_name = bytes.fromhex(spki), hash_name  # how a public key in DER begins
        self.p, self.b, self.g, self.n = p, b, (x, y), n

    def holds(self, point: tuple[int, int]) -> bool:
        x, y = point
        return 0 <= x < self.p and 0 <= y < self.p and (y * y - x * x * x + 3 * x - self.b) % self.p == 0

    def add(self, one: tuple[int, int] | None, two: tuple[int, int] | None) -> tuple[int, int] | None:
        if one is None or two is None:
            return two if one is None else one
        (x1, y1), (x2, y2) = one, two
        if x1 == x2 and (y1 + y2) % self.p == 0:
            return None
        top, bottom = (3 * x1 * x1 - 3, 2 * y1) if one == two else (y2 - y1, x2 - x1)
        slope = top * pow(bottom, -1, self.p) % self.p
        x = (slope * slope - x1 - x2) % self.p
        return x, (slope * (x1 - x) - y1) % self.p

    def times(self, k: int, point: tuple[int, int]) -> tuple[int, int] | None:
        total: tuple[int, int] | None = None
        for bit in bin(k)[2:]:
            total = self.add(total, total)
            total = self.add(total, point) if bit == "1" else total
        return total

    def verify(self, key: tuple[int, int], message: bytes, signature: bytes) -> bool:
        r, s = der_pair(signature)
        if not (0 < r < self.n and 0 < s < self.n):
            return False
        digest = hashlib.new(self.hash_name, message).digest()
        z = int.from_bytes(digest, "big") >> max(len(digest) * 8 - self.n.bit_length(), 0)
        w = pow(s, -1, self.n)
        point = self.add(self.times(z * w % self.n, self.g), self.times(r * w % self.n, key))
        return point is not None and point[0] % self.n == r


CURVES = (
    Curve(
        "3059301306072a8648ce3d020106082a8648ce3d03010703420004",
        "sha256",
        2**256 - 2**224 + 2**192 + 2**96 - 1,
        0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
        0x6B17D1F2E12C4247F8BCE6E563A440F277037D812DEB33A0F4A13945D898C296,
        0x4FE342E2FE1A7F9B8EE7EB4A7C0F9E162BCE33576B315ECECBB6406837BF51F5,
        0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551,
    ),
    Curve(
        "3076301006072a8648ce3d020106052b8104002203620004",
        "sha384",
        2**384 - 2**128 - 2**96 + 2**32 - 1,
        0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF,
        0xAA87CA22BE8B05378EB1C71EF320AD746E1D3B628BA79B9859F741E082542A385502F25DBF55296C3A545E3872760AB7,
        0x3617DE4A96262C6F5D9E98BF9292DC29F8F41DBD289A147CE9DA3113B5F0B8C00A60B1CE1D7E819D7A431D7C90EA0E5F,
        0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973,
    ),
    Curve(
        "30819b301006072a8648ce3d020106052b810400230381860004",
        "sha512",
        2**521 - 1,
        int(
            "51953EB9618E1C9A1F929A21A0B68540EEA2DA725B99B315F3B8B489918EF109E156193951EC7E937B1652C0BD3BB1BF07"
            "3573DF883D2C34F1EF451FD46B503F00",
            16,
        ),
        int(
            "C6858E06B70404E9CD9E3ECB662395B4429C648139053FB521F828AF606B4D3DBAA14B5E77EFE75928FE1DC127A2FFA8DE"
            "3348B3C1856A429BF97E7E31C2E5BD66",
            16,
        ),
        int(
            "11839296A789A3BC0045C8A5FB42C7D1BD998F54449579B446817AFBD17273E662C97EE72995EF42640C550B9013FAD076"
            "1353C7086A272C24088BE94769FD16650",
            16,
        ),
        2**521 - 0x5AE79787C40D069948033FEB708F65A2FC44A36477663B851449048E16EC79BF7,
    ),
)


def der_pair(data: bytes) -> tuple[int, int]:
    """The two whole numbers of a signature in DER; (0, 0) for anything that is not in its one form."""

    def length(at: int) -> tuple[int, int]:
        first = data[at]
        if first < 0x80:
            return first, at + 1
        if first != 0x81 or data[at + 1] < 0x80:
            raise ValueError
        return data[at + 1], at + 2

    try:
        size, at = length(1)
        if data[0] != 0x30 or at + size != len(data):
            raise ValueError
        found = []
        for _ in range(2):
            size, start = length(at + 1)
            part = data[start : start + size]
            negative, padded = part[0] >= 0x80, len(part) > 1 and part[0] == 0 and part[1] < 0x80
            if data[at] != 2 or len(part) != size or negative or padded:
                raise ValueError
            found.append(int.from_bytes(part, "big"))
            at = start + size
        if at != len(data):
            raise ValueError
    except (IndexError, ValueError):
        return 0, 0
    return found[0], found[1]


def read_key(path: str) -> tuple[str, Curve, tuple[int, int]]:
    """A public key file: its id (SHA-256 of its PEM text), its curve, and the point."""
    text = read_file(path, MAX_DOCUMENT).decode("utf-8", "replace")
    blocks = re.findall(r"-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]+)-----END PUBLIC KEY-----", text)
    try:
        der = base64.b64decode("".join(blocks[0].split()), validate=True) if len(blocks) == 1 else b""
    except (binascii.Error, ValueError):
        der = b""
    for curve in CURVES:
        size = (curve.p.bit_length() + 7) // 8
        if der.startswith(curve.spki) and len(der) == len(curve.spki) + 2 * size:
            numbers = der[len(curve.spki) :]
            point = int.from_bytes(numbers[:size], "big"), int.from_bytes(numbers[size:], "big")
            if curve.holds(point):
                lines = re.findall(".{1,64}", base64.b64encode(der).decode())
                pem = "\n".join(["-----BEGIN PUBLIC KEY-----", *lines, "-----END PUBLIC KEY-----", ""])
                return hashlib.sha256(pem.encode()).hexdigest(), curve, point
    raise Unfit(f"{path} holds no public key on P-256, P-384 or P-521; expected a .pub file of `nest-runtime keygen`")


# Files and JSON, read strictly.


def open_regular(path: str) -> BinaryIO:
    """A regular file, and nothing that hangs or never ends."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise Unfit(f"{path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unfit(f"{path!r} is no regular file")
    return os.fdopen(handle, "rb")


def read_file(path: str, limit: int) -> bytes:
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Unfit(f"{path!r} has more than {limit} bytes")
    return data


def parse(data: bytes, what: str) -> dict[str, Any]:
    """One JSON object: UTF-8, no key twice, no NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key appears twice")
        return dict(pairs)

    def number(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError("a number is beyond 64 bits")
        return float(text)

    def whole(text: str) -> int:
        if len(text) > 19:
            raise ValueError("a whole number is too long")
        return int(text)

    def constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(
            data.decode(), object_pairs_hook=unique, parse_constant=constant, parse_float=number, parse_int=whole
        )
    except (ValueError, RecursionError) as error:
        raise Unfit(f"{what} is damaged: {error!s:.100}") from error
    if not isinstance(value, dict):
        raise Unfit(f"{what} is no JSON object")
    return value


def canonical(value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # half a surrogate pair, or nested too deeply
        raise Unfit(f"JSON without a canonical form: {error!s:.80}") from error


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_header(
    file: BinaryIO, where: str, limit: int
) -> tuple[dict[str, Any], list[tuple[str, str, list[int], int, int]]]:
    """A safetensors file's metadata, and its tensors as (name, dtype, shape, start, stop), which must tile the file."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > limit or 8 + length > size:
        raise Unfit(f"{where} is cut off, or no safetensors file")
    fields = parse(file.read(length), f"the header of {where}")
    metadata = fields.pop("__metadata__", {})
    rows = []
    for name, entry in fields.items():
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            natural = all(type(item) is int and item >= 0 for item in (*shape, start, stop))
            if not natural or len(entry) != 3 or not isinstance(dtype, str):
                raise ValueError
        except (KeyError, TypeError, ValueError) as error:
            raise Unfit(f"{where}: the tensor {name!r:.80} is not described as it should be") from error
        rows.append((name, dtype, list(shape), 8 + length + start, 8 + length + stop))
    rows.sort(key=lambda row: (row[3], row[4]))
    at = 8 + length
    for row in rows:
        if row[3] != at or row[4] < at:
            raise Unfit(f"{where}: the tensor {row[0]!r:.80} leaves a gap, or overlaps")
        at = row[4]
    if at != size:
        raise Unfit(f"{where}: {size} bytes; its tensors end at {at}")
    return metadata, rows


def tensor_digest(file: BinaryIO, start: int, stop: int) -> str:
    found = hashlib.sha256()
    file.seek(start)
    while start < stop:
        piece = file.read(min(PIECE, stop - start))
        if not piece:
            raise Unfit("a file was cut off while it was read")
        found.update(piece)
        start += len(piece)
    return found.hexdigest()


# The patch (docs/reference/patch-format.md), its manifest and signature (docs/reference/threat-model.md), and the base.


def read_patch(path: str) -> tuple[dict[str, Any], str, int]:
    """A patch's header, its digest found true, and the file's SHA-256 and size."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_PATCH:
            raise Unfit(f"{path!r} has {size} bytes; a patch has at most {MAX_PATCH}")
        metadata, tensors = read_header(file, repr(path), MAX_PATCH_HEADER)
        if (
            not isinstance(metadata, dict)
            or set(metadata) != {"nest_patch"}
            or not isinstance(metadata["nest_patch"], str)
        ):
            raise Unfit(f"{path!r} is no patch: its metadata is not that of one")
        header = parse(metadata["nest_patch"].encode("utf-8", "surrogatepass"), f"the patch header of {path!r}")
        rows = []
        for name, dtype, shape, start, stop in tensors:
            if dtype not in DTYPES or DTYPES[dtype] * math.prod(shape) != stop - start:
                raise Unfit(f"{path!r}: the tensor {name!r:.80} is {dtype!s:.10} of another size")
            rows.append([name, dtype, shape, tensor_digest(file, start, stop)])
        whole = tensor_digest(file, 0, size)
    if header.get("format_version") not in FORMATS or type(header["format_version"]) is not int:
        raise Unfit(f"{path!r} is of format {header.get('format_version')!r:.20}; this verifier reads 1 and 2")
    if canonical(header).decode() != metadata["nest_patch"]:
        raise Unfit(f"{path!r}: its header is not in canonical form")
    bare = {key: value for key, value in header.items() if key != "digest"}
    digest = "sha256:" + sha256(canonical({"header": bare, "tensors": sorted(rows)}))
    if digest != header.get("digest"):
        raise Distrusted(f"the content of {path!r} has digest {digest}; its header says {header.get('digest')!r:.80}")
    for key, kind in (("name", str), ("version", str), ("serial", int), ("base_hash", str)):
        if type(header.get(key)) is not kind:
            raise Unfit(f"{path!r}: the header's {key} is {header.get(key)!r:.60}")
    return header, whole, size


def check_manifest(data: bytes, header: dict[str, Any], whole: str, size: int) -> None:
    expected = {key: header[key] for key in ("name", "version", "serial", "base_hash", "digest")}
    expected.update(kind="nest-runtime-patch", format=1, sha256=f"sha256:{whole}", bytes=size)
    found = parse(data, "the manifest")
    for key in sorted(set(expected) | set(found)):
        if found.get(key) != expected.get(key) or type(found.get(key)) is not type(expected.get(key)):
            raise Distrusted(
                f"the manifest is of another patch: {key} is {found.get(key)!r:.80}, expected {expected.get(key)!r:.80}"
            )
    if canonical(found) + b"\n" != data:
        raise Distrusted("the manifest is not in canonical form")


def check_signature(bundle: bytes, files: dict[str, str], keys: list[str]) -> str:
    """The id of the key, one of ``keys``, that made a signature over these files (name → SHA-256), and no others."""
    fields = parse(bundle, "the signature")
    if json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace") != bundle:
        raise Distrusted("the signature is not in the form that model-signing writes")
    try:
        envelope, material = fields["dsseEnvelope"], fields["verificationMaterial"]
        hint, (single,) = material["publicKey"]["hint"], envelope["signatures"]
        payload, signature = decoded(envelope["payload"]), decoded(single["sig"])
        statement = parse(payload, "what is signed")
        (subject,), predicate = statement["subject"], statement["predicate"]
        rows = predicate["resources"]
        resources = {row["name"]: row["digest"] for row in rows if row["algorithm"] == "sha256"}
        root = hashlib.sha256(b"".join(bytes.fromhex(row["digest"]) for row in rows)).hexdigest()
        frame = {
            "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
            "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": envelope["payload"],
                "payloadType": PAYLOAD_TYPE,
                "signatures": [{"sig": single["sig"], "keyid": ""}],
            },
        }
        sound = (
            fields == frame
            and statement["predicateType"] == "https://model_signing/signature/v1.0"
            and predicate["serialization"]["method"] == "files"
            and len(resources) == len(rows)
            and subject["digest"]["sha256"] == root
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Distrusted(f"the signature is not as model-signing writes it: {error!s:.80}") from error
    if not sound:
        raise Distrusted("the signature is of another kind")
    if resources != files:
        raise Distrusted("the signature is over other files: patch or manifest was changed after signing")
    for path in keys:
        key_id, curve, point = read_key(path)
        if key_id == hint:
            pae = b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)
            if not curve.verify(point, pae, signature):
                raise Distrusted(f"the signature is false: it was not made by {path!r}")
            return f"sha256:{key_id}"
    raise Distrusted(f"the signature was made by the key sha256:{hint!s:.64}, which is none of those given")


def decoded(text: str) -> bytes:
    """Base64 in its one form."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("base64 in another form")
    return data


def model_hash(folder: str) -> str:
    """The model hash of a safetensors checkpoint (docs/reference/patch-format.md, section 5)."""
    rows = {}
    for path in weight_files(folder):
        with open_regular(path) as file:
            for name, dtype, shape, start, stop in read_header(file, repr(path), MAX_MODEL_HEADER)[1]:
                if name in rows:
                    raise Unfit(f"{folder!r}: the tensor {name!r:.80} appears twice")
                rows[name] = [name, dtype, shape, tensor_digest(file, start, stop)]
    inputs = [
        row[1:] for name, row in rows.items() if matches(r"(embed_tokens|wte|word_embeddings|embed_in)\.weight", name)
    ]
    kept = [
        row
        for name, row in rows.items()
        if not (matches(r"(lm_head|embed_out)\.weight", name) and row[1:] in inputs)
        and not matches(r"(rotary_emb\.inv_freq|attn\.masked_bias|attention\.masked_bias)", name)
        and not (matches(r"(attn|attention)\.bias", name) and len(row[2]) == 4)
    ]
    return "sha256:" + sha256(json.dumps(sorted(kept), separators=(",", ":"), ensure_ascii=False).encode())


def matches(pattern: str, name: str) -> bool:
    return re.search(rf"(^|\.){pattern}$", name) is not None


def weight_files(folder: str) -> list[str]:
    """The safetensors files that transformers would load."""
    config, single = os.path.join(folder, "config.json"), os.path.join(folder, "model.safetensors")
    named = parse(read_file(config, 1 << 24), config).get("transformers_weights") if os.path.lexists(config) else None
    chosen = os.path.join(folder, str(named)) if named is not None else single
    if named is None and not os.path.isfile(single):
        chosen = single + ".index.json"
    if not chosen.endswith(".index.json"):
        return [chosen]
    try:
        files = sorted(set(parse(read_file(chosen, 1 << 26), chosen)["weight_map"].values()))
        return [os.path.join(os.path.dirname(chosen), name) for name in files]
    except (KeyError, AttributeError, TypeError) as error:
        raise Unfit(f"{chosen!r} is no index of a checkpoint") from error


def verify(asked: argparse.Namespace) -> dict[str, Any]:
    """All the checks; what was found, or Unfit or Distrusted."""
    path = os.path.join(asked.patch, "patch.safetensors") if os.path.isdir(asked.patch) else asked.patch
    stem = path[: -len(".safetensors")] if path.endswith(".safetensors") else path
    beside = os.path.dirname(path)
    plain = os.path.basename(path) == "patch.safetensors"
    manifest = os.path.join(beside, "manifest.json") if plain else f"{stem}.manifest.json"
    signature = os.path.join(beside, "patch.sig") if plain else f"{stem}.sig"
    header, whole, size = read_patch(path)
    signed_by = None
    if not asked.unsigned:
        missing = [item for item in (manifest, signature) if not os.path.lexists(item)]
        if missing:
            raise Distrusted(f"the patch is not signed: there is no {missing[0]!r}")
        said = read_file(manifest, MAX_DOCUMENT)
        check_manifest(said, header, whole, size)
        files = {"patch.safetensors": whole, "manifest.json": sha256(said)}
        signed_by = check_signature(read_file(signature, MAX_DOCUMENT), files, asked.key)
    label = f"{header['name']}@{header['version']}"
    if asked.name is not None and header["name"] != asked.name:
        raise Distrusted(f"the patch is {label}; expected one called {asked.name}")
    if asked.min_serial is not None and header["serial"] < asked.min_serial:
        raise Distrusted(f"{label} has serial {header['serial']}; expected {asked.min_serial} or more")
    if asked.digest is not None and header["digest"] != asked.digest:
        raise Distrusted(f"{label} is {header['digest']}; expected {asked.digest}")
    base = model_hash(asked.base) if asked.base is not None else asked.base_hash
    if base is not None and base != header["base_hash"]:
        raise Distrusted(f"{label} is for base {header['base_hash']}; this one is {base}")
    found = {key: header[key] for key in ("name", "version", "serial", "digest", "base_hash")}
    return {"ok": True, **found, "signed_by": signed_by, "base_checked": base is not None}


def main(arguments: list[str] | None = None) -> int:
    """Run one command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="nest_verify.py", description="Verify a safety patch; the exit status says it all."
    )
    add = parser.add_argument
    add("patch", help="a .safetensors file with its .manifest.json and .sig, or a folder with patch.safetensors")
    add("--key", action="append", default=[], metavar="KEY.pub", help="a public key whose signature counts; repeat it")
    add("--unsigned", action="store_true", help="do not ask for a signature")
    add("--base", metavar="FOLDER", help="the safetensors checkpoint that will be served")
    add("--base-hash", metavar="sha256:HEX", help="its model hash instead, as `nest-runtime hash` prints it")
    add("--no-base", action="store_true", help="do not ask for the base")
    add("--name", help="what the patch must be called")
    add("--min-serial", type=int, metavar="N", help="the lowest serial that is accepted")
    add("--digest", metavar="sha256:HEX", help="the digest that the patch must have")
    add("--json", action="store_true", help="print one JSON document instead of a line")
    asked = parser.parse_args(arguments)
    if bool(asked.key) == asked.unsigned:
        parser.error("give --key KEY.pub, or --unsigned if no signature is asked for; not both")
    if sum((asked.base is not None, asked.base_hash is not None, asked.no_base)) != 1:
        parser.error("give one of --base FOLDER, --base-hash sha256:HEX and --no-base")
    for value in (asked.base_hash, asked.digest):
        if value is not None and not DIGEST.fullmatch(value):
            parser.error(f"{value!r:.80} is no digest: expected sha256: and 64 hex digits")
    try:
        found = verify(asked)
    except (Unfit, Distrusted) as error:
        print(
            json.dumps({"ok": False, "error": str(error), "status": error.status})
            if asked.json
            else f"refused: {error!s}".encode("ascii", "backslashreplace").decode()
        )
        return error.status
    except (OSError, MemoryError) as error:
        print(f"refused: {error!r}")
        return 1
    if asked.json:
        print(json.dumps(found))
    else:
        by = found["signed_by"] or "nobody, as --unsigned allows"
        base = "base checked" if found["base_checked"] else "base not checked"
        print(f"good: {found['name']}@{found['version']} {found['digest']}, signed by {by}, {base}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
