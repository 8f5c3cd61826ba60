"""Prometheus metrics of one server, in a registry of their own: two servers in one process do not mix."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
SWAP_SECONDS = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 30)


class Metrics:
    """Counters and histograms; the parts of the server call them by name."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU seconds, open files; on Linux
        self.requests = Counter(
            "nest_requests", "HTTP requests answered.", ["endpoint", "status", "patch"], registry=registry
        )
        self.request_seconds = Histogram(
            "nest_request_seconds", "Whole HTTP requests.", ["endpoint"], buckets=SECONDS, registry=registry
        )
        self.tokens = Counter("nest_tokens", "Tokens read and generated.", ["kind", "patch"], registry=registry)
        self.first_token = Histogram(
            "nest_time_to_first_token_seconds",
            "From admission to the first token.",
            ["patch"],
            buckets=SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "nest_time_per_output_token_seconds",
            "Mean time between tokens of one request after its first.",
            ["patch"],
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        self.answers = Counter("nest_answers", "Choices answered to their end.", ["patch"], registry=registry)
        self.refusals = Counter(
            "nest_refusals", "Of these, answers that begin as refusals do.", ["patch"], registry=registry
        )
        self.replaced = Counter(
            "nest_replaced_requests",
            "Requests in flight that an enforced switch took from a patch: restarted, or ended half-way.",
            ["patch", "outcome"],
            registry=registry,
        )
        self.failed = Counter(
            "nest_failed_requests",
            "Requests that failed a pass all by themselves: values not finite, or an exception.",
            ["reason", "patch"],
            registry=registry,
        )
        self.canceled = Counter(
            "nest_canceled_requests", "Requests given up: their client left, or time ran out.", registry=registry
        )
        self.swaps = Counter("nest_swaps", "Changes of the active patch.", ["what"], registry=registry)
        self.swap_seconds = Histogram(
            "nest_swap_seconds",
            "Changes of the active patch, loading included.",
            buckets=SWAP_SECONDS,
            registry=registry,
        )
        self.patch_failures = Counter(
            "nest_patch_failures", "Patches refused or changes that failed.", ["error"], registry=registry
        )
        self.verification_failures = Counter(
            "nest_verification_failures",
            "Of these, patches refused for trust: digest, base, signature, revoked, downgrade.",
            ["error"],
            registry=registry,
        )
        self.active = Info("nest_active_patch", "The patch that new requests get.", registry=registry)
        self.server = Info("nest_server", "What is served.", registry=registry)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read whenever somebody scrapes."""
        Gauge(name, text, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
