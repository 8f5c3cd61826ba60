"""What identifies a GGUF file as a base: its tensors as they are in the file, and the settings of its architecture.

docs/reference/patch-format.md states it to the byte. Names and licences, the tokenizer, the chat template and notes of
quantizers are left out: they may be edited without changing what the model computes.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from typing import Any

from nest_runtime.model.gguf.header import Header
from nest_runtime.model.hashing import HashJob, digest_of, given, hash_all, mapped
from nest_runtime.progress import Progress


def hash_gguf(header: Header, progress: Progress | None = None) -> dict[str, Any]:
    """The hash of a GGUF file, streamed.

    Returns:
        ``hash``, ``tensors`` (their number), ``bytes`` (of the tensors).

    Raises:
        ModelError: the file cannot be read.
    """
    with ExitStack() as stack:
        view = mapped(header.path, stack)
        jobs = []
        for tensor in header.tensors.values():
            part = view[tensor.start : tensor.start + tensor.nbytes]
            stack.callback(part.release)
            jobs.append(HashJob(tensor.name, tensor.type, tensor.shape, given(part), tensor.nbytes))
        rows = sorted(hash_all(jobs, progress))
    tensors = [[name, kind, list(shape), digest] for name, kind, shape, digest in rows]
    digest = digest_of({"gguf": 1, "settings": _settings(header), "tensors": tensors})
    return {"hash": digest, "tensors": len(rows), "bytes": sum(job.size for job in jobs)}


def _settings(header: Header) -> list[list[Any]]:
    """Key, type and SHA-256 of the value of each of the architecture's settings (``llama.rope.freq_base``, …)."""
    own = f"{header.architecture}."
    return [
        [key, value.type, hashlib.sha256(header.value_bytes(key)).hexdigest()]
        for key, value in sorted(header.values.items())
        if key == "general.architecture" or key.startswith(own)
    ]
