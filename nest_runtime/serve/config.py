"""What a server is started with: one frozen value, checked when it is made, and its key files.

Nothing here imports torch or starts anything.
"""

from __future__ import annotations

import hmac
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from nest_runtime.addresses import is_loopback, networks_of
from nest_runtime.errors import EngineError, UsageError
from nest_runtime.hints import did_you_mean
from nest_runtime.secret_files import secret_lines
from nest_runtime.serve.served_patch import POLICIES, SwapPolicy

ENGINES = ("transformers", "generate", "vllm")
_ORIGIN = re.compile(r"https?://[^/\s@?#]+")
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_NAME = re.compile(r"[^\s@]{1,200}")


@dataclass(frozen=True)
class Limits:
    """What one server takes on; what goes beyond is refused with an OpenAI-shaped error.

    Attributes:
        running: sequences in one batch of the engine.
        max_body_bytes: bytes of a request's body (413 beyond).
        max_values: values in the lists and objects of a body (400 beyond); a prompt of token ids has one for each.
        max_prompt_tokens: tokens of one prompt, or None for the context length (400 beyond).
        max_tokens: new tokens of one choice, or None for what the context leaves (400 beyond).
        max_choices: prompts times n in one request (400 beyond).
        request_seconds: how long one request may take (504 beyond).
        drain_seconds: how long a shutdown waits for requests that are running.
        cache_tokens: keys and values kept, in tokens over all running sequences; None sizes it by the model.
        batch_tokens: tokens in one forward pass.
        connections: that clients may have open; None takes what the process's file descriptors allow.
        header_seconds: for the head of a request to come whole; the connection is closed then.
        idle_seconds: that a client may be silent between requests, or take nothing of its answer; the same then.
        context: tokens that a prompt and its answer may have together, or None for what the model was made for.
    """

    running: int = 64
    max_body_bytes: int = 4 * 1024 * 1024
    max_values: int = 131_072
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    max_choices: int = 32
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    cache_tokens: int | None = None
    batch_tokens: int = 512
    connections: int | None = None
    header_seconds: float = 10.0
    idle_seconds: float = 30.0
    context: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "running",
            "max_body_bytes",
            "max_values",
            "max_choices",
            "request_seconds",
            "batch_tokens",
            "header_seconds",
            "idle_seconds",
        ):
            if getattr(self, name) <= 0:
                raise UsageError(f"the limit {name} is {getattr(self, name)}", "give a number above zero")
        for name in ("max_prompt_tokens", "max_tokens", "connections", "context"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UsageError(f"the limit {name} is {getattr(self, name)}", "give a number above zero, or none")
        if self.drain_seconds < 0:
            raise UsageError(f"the limit drain_seconds is {self.drain_seconds}", "give zero or more")


@dataclass(frozen=True)
class Allowed:
    """What a client may do that weakens what a patch does; nothing, unless the operator says so (threat-model.md).

    Attributes:
        completions: go on from a text of the client's own (``/v1/completions``), past the chat template.
        prefill: end a conversation with the assistant's turn.
        special_tokens: spell control tokens in prompts.
        schemas: have answers keep to a JSON schema, whose own texts the model then says.
    """

    completions: bool = False
    prefill: bool = False
    special_tokens: bool = False
    schemas: bool = False


@dataclass(frozen=True)
class FollowConfig:
    """What ``--follow`` asks for. Raises UsageError where values make no sense.

    Attributes:
        ref: ``hf://org/repo@stable``, or a mirror's.
        every: seconds between polls.
        stale_after: seconds without an answer after which the server says it is stale; None for a few polls.
        gate: try patches out before switching to them.
        probes: a file of prompts for that; None takes built-in ones.
        min_refused: share of harmful probes that must be refused.
        max_refused: share of benign probes that may be refused.
    """

    ref: str
    every: float = 60.0
    stale_after: float | None = None
    gate: bool = True
    probes: Path | None = None
    min_refused: float = 0.75
    max_refused: float = 0.25

    def __post_init__(self) -> None:
        if self.every <= 0 or (self.stale_after is not None and self.stale_after <= 0):
            raise UsageError(f"following every {self.every} s makes no sense", "give times above zero")


@dataclass(frozen=True)
class ServeConfig:
    """How to serve. Raises UsageError where values make no sense.

    Attributes:
        model: a model reference: ``reference``, a folder, or a Hub id.
        patch: the patch to answer with; None means the store's active patch for this model, else the bare base.
        expose: patches that clients may name as ``NAME@version``.
        expose_base: clients may name ``NAME@base``.
        host, port: where to listen; port 0 takes a free one.
        admin_host, admin_port: where the admin API listens, and only there; without a port it is where the rest is.
            The host is 127.0.0.1 unless given.
        admin_token_file: one token per line; None switches the admin API off.
        api_key_file: one key per line; without it and ``api_keys`` anyone who reaches the port may ask.
        api_keys: more keys.
        ssl_certfile, ssl_keyfile: the certificate and key of every listener, in PEM; None speaks plain HTTP.
        served_name: what clients call the model; None takes the model's own name.
        cors_origins: sites whose pages may ask from a browser, as ``https://app.example``, or ``*`` for all; none may
            unless given.
        allowed_hosts: host names that requests may be made to beside this machine's own, where the server listens on
            loopback only; a proxy on the same machine may hand its own name on.
        swap_policy: what becomes of requests in flight at a switch: ``drain`` or ``enforce`` (served_patch.py).
        log_prompts: write what clients ask into the log; never otherwise.
        max_queue: requests that may wait beyond ``limits.running``; the next one gets 429.
        limits: see :class:`Limits`.
        allowed: see :class:`Allowed`.
        json: events as JSON lines on stdout; else as sentences on stderr.
        engine: ``transformers``; ``generate`` for models that it does not page; or ``vllm``, which must be installed
            (docs/guide/engines.md).
        engine_args: more of vLLM's own arguments, as one would type them.
        device, dtype: as in models.load_model.
        trust_remote_code: run code that comes with the model; only when the user asked for it by this name.
        trusted_proxies: addresses and networks of proxies whose X-Forwarded-For counts, for the audit log.
        audit_file: the audit log; None means ``audit.jsonl`` in the store's home.
        trust: public keys whose signatures on patches count, beside those of the trust policy.
        require_signature: refuse unsigned patches.
        trust_policy: a policy file; None means ``trust.toml`` in the store's home, where there is one.
        allow_downgrade: let patches pass that are older than one already accepted on this machine.
        follow: a channel whose patch is put on, and kept up with; None follows nothing.
    """

    model: str = "reference"
    patch: str | None = None
    expose: tuple[str, ...] = ()
    expose_base: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    admin_host: str | None = None
    admin_port: int | None = None
    admin_token_file: Path | None = None
    api_key_file: Path | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    served_name: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    swap_policy: SwapPolicy = "drain"
    log_prompts: bool = False
    max_queue: int = 256
    limits: Limits = field(default_factory=Limits)
    allowed: Allowed = field(default_factory=Allowed)
    json: bool = False
    engine: str = "transformers"
    engine_args: str = ""
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    trusted_proxies: tuple[str, ...] = ()
    audit_file: Path | None = None
    trust: tuple[Path, ...] = ()
    require_signature: bool = False
    trust_policy: Path | None = None
    allow_downgrade: bool = False
    follow: FollowConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "expose", tuple(self.expose))
        object.__setattr__(self, "trust", tuple(self.trust))
        object.__setattr__(self, "api_keys", tuple(self.api_keys))
        object.__setattr__(self, "trusted_proxies", tuple(self.trusted_proxies))
        object.__setattr__(self, "cors_origins", tuple(self.cors_origins))
        object.__setattr__(self, "allowed_hosts", tuple(self.allowed_hosts))
        self._check_names()
        if self.engine not in ENGINES:
            raise EngineError(
                f"there is no engine {self.engine!r} here; known: {', '.join(ENGINES)}",
                f"{did_you_mean(self.engine, ENGINES)}leave --engine out for transformers",
            )
        if self.engine_args and self.engine != "vllm":
            raise UsageError(
                f"--engine-args are given, and the engine is {self.engine}", "give --engine vllm, or leave them out"
            )
        for port in (self.port, self.admin_port or 0):
            if not 0 <= port <= 65535:
                raise UsageError(f"port {port} is out of range [0, 65535]", "give a free port, or 0 for any")
        if self.admin_host is not None and self.admin_port is None:
            raise UsageError("--admin-host is given without --admin-port", "give both, or neither")
        if self.admin_port is not None and self.admin_token_file is None:
            raise UsageError(
                "--admin-port is given, and no --admin-token-file", "give the file: it opens the admin API"
            )
        if self.swap_policy not in POLICIES:
            near = did_you_mean(self.swap_policy, POLICIES)
            raise UsageError(f"the swap policy is {self.swap_policy!r}", f"{near}give one of {', '.join(POLICIES)}")
        if any(not key.strip() or key != key.strip() for key in self.api_keys):
            raise UsageError("an --api-key is empty, or has spaces around it", "give the key as clients send it")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise UsageError("--ssl-keyfile is given without --ssl-certfile", "give both, or neither")
        networks_of(self.trusted_proxies)  # raises for what is no address
        if self.max_queue < 0:
            raise UsageError(f"max_queue is {self.max_queue}", "give zero or more")

    def _check_names(self) -> None:
        if self.served_name is not None and not _NAME.fullmatch(self.served_name):
            raise UsageError(
                f"the served name is {self.served_name!r}; expected up to 200 characters without spaces and @",
                "clients write it before @version, as in my-model@v2",
            )
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise UsageError(f"the origin {origin!r} is none", "write it as https://app.example, without a path")
        for host in self.allowed_hosts:
            if not _HOST.fullmatch(host):
                raise UsageError(f"the host {host!r} is none", "write a name as app.example, without a port")

    @property
    def keyed(self) -> bool:
        """Whether clients have to send a key."""
        return self.api_key_file is not None or bool(self.api_keys)

    @property
    def scheme(self) -> str:
        """``https`` where there is a certificate, else ``http``."""
        return "http" if self.ssl_certfile is None else "https"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def admin_address(self) -> tuple[str, int] | None:
        """Where the admin API listens, if not where the rest is."""
        return None if self.admin_port is None else (self.admin_host or "127.0.0.1", self.admin_port)


def host_of(header: str) -> str:
    """The host in a Host header, without its port and in small letters; empty where there is none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


@dataclass(frozen=True)
class AccessTokens:
    """Secrets of one file: bearer tokens that open the API or the admin API."""

    secrets: tuple[str, ...] = ()

    def matches(self, given: str) -> bool:
        """Whether ``given`` is one of the secrets; takes the same time wherever they differ."""
        found = False
        for secret in self.secrets:
            found |= hmac.compare_digest(secret.encode(), given.encode())
        return found


def read_tokens(path: Path, what: str, *, secret: bool = False) -> AccessTokens:
    """The tokens of a file, one per line; blank lines and lines that start with ``#`` are skipped.

    Args:
        path: the file.
        what: how to call it in errors, e.g. "admin token file".
        secret: refuse it where others on the machine may read it.

    Raises UsageError where the file cannot be read, holds none, or one that could never match, or others may write it.
    """
    lines = [(number, line.strip()) for number, line in secret_lines(Path(path), what, secret=secret)]
    for number, token in lines:
        if not (token.isascii() and token.isprintable()):
            raise UsageError(
                f"the {what} {path}, line {number}: a character that no request can carry",
                "use printable ASCII characters in tokens",
            )
    secrets = tuple(token for _, token in lines)
    if not secrets:
        raise UsageError(f"the {what} {path} holds no token", "write one token per line into it")
    return AccessTokens(secrets)


def readable_by_others(path: Path) -> bool:
    """Whether users other than the owner can read a file of secrets."""
    return os.name == "posix" and bool(os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH))
