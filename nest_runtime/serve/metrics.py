"""Prometheus metrics of one server, in a registry of their own: two servers in one process do not mix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
SWAP_SECONDS = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 30)


class Metrics:
    """Counters and histograms; the parts of the server call them by name."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU seconds, open files; on Linux
        counter, timer = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        self.requests = counter("nest_requests", "HTTP requests answered.", ["endpoint", "status", "patch"])
        self.request_seconds = timer("nest_request_seconds", "Whole HTTP requests.", ["endpoint"], buckets=SECONDS)
        self.tokens = counter("nest_tokens", "Tokens read and generated.", ["kind", "patch"])
        self.first_token = timer(
            "nest_time_to_first_token_seconds",
            "From admission to the first token.",
            ["patch"],
            buckets=SECONDS,
        )
        self.per_token = timer(
            "nest_time_per_output_token_seconds",
            "Mean time between tokens of one request after its first.",
            ["patch"],
            buckets=TOKEN_SECONDS,
        )
        self.answers = counter("nest_answers", "Choices answered to their end.", ["patch"])
        self.refusals = counter("nest_refusals", "Of these, answers that begin as refusals do.", ["patch"])
        self.replaced = counter(
            "nest_replaced_requests",
            "Requests in flight that an enforced switch took from a patch: restarted, or ended half-way.",
            ["patch", "outcome"],
        )
        self.failed = counter(
            "nest_failed_requests",
            "Requests that failed a pass all by themselves: values not finite, or an exception.",
            ["reason", "patch"],
        )
        self.canceled = counter("nest_canceled_requests", "Requests given up: their client left, or time ran out.")
        self.swaps = counter("nest_swaps", "Changes of the active patch.", ["what"])
        self.swap_seconds = timer(
            "nest_swap_seconds",
            "Changes of the active patch, loading included.",
            buckets=SWAP_SECONDS,
        )
        self.patch_failures = counter("nest_patch_failures", "Patches refused or changes that failed.", ["error"])
        self.verification_failures = counter(
            "nest_verification_failures",
            "Of these, patches refused for trust: digest, base, signature, revoked, downgrade.",
            ["error"],
        )
        self.active = Info("nest_active_patch", "The patch that new requests get.", registry=registry)
        self.server = Info("nest_server", "What is served.", registry=registry)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read whenever somebody scrapes."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
