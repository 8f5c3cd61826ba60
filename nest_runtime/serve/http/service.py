"""What the routes need to know about one server, and what they say about its patches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from fastapi import Request

from nest_runtime.serve.engine import Engine
from nest_runtime.serve.http.grammar import Grammars
from nest_runtime.serve.http.problems import unknown_model
from nest_runtime.serve.http.schemas import Sampling
from nest_runtime.serve.limits import Allowed, Limits
from nest_runtime.serve.metrics import Metrics
from nest_runtime.serve.pools import Pool
from nest_runtime.serve.requests.sampling import SamplingParams
from nest_runtime.serve.switching.table import PatchTable, ServedPatch

E_co = TypeVar("E_co", bound=Engine, covariant=True)
TOKENIZING = 2  # threads for long bodies


@dataclass
class Service(Generic[E_co]):
    """What the routes need: one model, one engine, one table of patches.

    ``defaults`` and ``max_new_tokens`` are the model's own, for what a client leaves open.
    """

    engine: E_co
    table: PatchTable
    tokenizer: Any
    limits: Limits
    metrics: Metrics
    defaults: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int | None = None
    following: Callable[[], dict[str, Any]] | None = None
    log_prompts: bool = False
    allowed: Allowed = field(default_factory=Allowed)
    grammars: Grammars | None = None
    started: int = field(default_factory=lambda: int(time.time()))
    tokenizing: Pool = field(default_factory=lambda: Pool("tokenize", TOKENIZING))

    def pin(self, request: Request, model: str) -> ServedPatch:
        """The patch that a model name means now; the response's headers will name it. Raises ApiError 404."""
        served_patch = self.table.named(model)
        if served_patch is None:
            raise unknown_model(model)
        request.state.pin = served_patch
        return served_patch

    def params(self, body: Sampling) -> SamplingParams:
        """The request's sampling, with the model's own defaults where the client says nothing."""
        default = self.defaults
        return replace(
            default,
            temperature=default.temperature if body.temperature is None else body.temperature,
            top_p=default.top_p if body.top_p is None else body.top_p,
            top_k=default.top_k if body.top_k is None else body.top_k,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            seed=body.seed,
            logprobs=body.odds,
        )


def model_row(service: Service[Engine], name: str) -> dict[str, Any]:
    """What ``/v1/models`` says of one name."""
    served_patch = service.table.named(name) or service.table.active
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "nest-runtime",
        "patch": served_patch.label,
        "digest": served_patch.digest,
    }


def fingerprint(table: PatchTable, pin: ServedPatch) -> str:
    """``model=<hash>;patch=<digest>``: what produced an answer, to the bit."""
    return f"model={table.model_hash};patch={pin.digest}"
