"""What a server is started with: one frozen value, checked when it is made.

Nothing here imports torch or starts anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from nest_runtime.addresses import is_loopback, networks_of
from nest_runtime.errors import UsageError
from nest_runtime.hints import did_you_mean
from nest_runtime.serve.limits import Allowed, FollowConfig, Limits
from nest_runtime.serve.served_patch import POLICIES, SwapPolicy
from nest_runtime.settings import check, described, setting, settings_of

ENGINES = ("transformers", "generate", "vllm")
_ORIGIN = re.compile(r"https?://[^/\s@?#]+")
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_NAME = re.compile(r"[^\s@]{1,200}")


@described
@dataclass(frozen=True)
class ServeConfig:
    """How to serve. Raises UsageError if values make no sense.

    ``limits``, ``allowed`` and ``follow`` hold settings of their own; without ``follow`` no channel is followed.
    """

    model: str = setting(
        "reference",
        "reference, a folder, FILE.gguf, or org/name[@revision].",
        flag="--model",
        metavar="MODEL",
        names="models",
    )
    patch: str | None = setting(
        None,
        "The patch that answers; the store's active one by default.",
        more="Where none is active for the model, the bare base answers.",
        flag="--patch",
        metavar="PATCH",
        names="patches",
    )
    expose: tuple[str, ...] = setting(
        (), "Let clients name this patch too, as NAME@v2.", flag="--expose", metavar="PATCH", names="patches"
    )
    expose_base: bool = setting(False, "Let clients name the bare base, as NAME@base.", flag="--expose-base")
    engine: str = setting(
        "transformers",
        "What computes the answers.",
        more="``generate`` is for models that ``transformers`` does not page; ``vllm`` must be installed "
        "(docs/guide/engines.md).",
        choices=ENGINES,
        flag="--engine",
    )
    engine_args: str = setting(
        "", "More of vLLM's own arguments, in one string.", flag="--engine-args", metavar="'ARGS'"
    )
    host: str = setting("127.0.0.1", "The address to listen at.", flag="--host", metavar="HOST")
    port: int = setting(8000, "Where to listen; 0 takes a free port.", low=0, high=65535, flag="--port", metavar="PORT")
    admin_token_file: Path | None = setting(
        None, "Tokens, one a line; switches the admin API on.", flag="--admin-token-file", metavar="FILE"
    )
    admin_host: str | None = setting(
        None, "Where --admin-port listens: 127.0.0.1.", flag="--admin-host", metavar="HOST"
    )
    admin_port: int | None = setting(
        None,
        "Answer the admin API here, and nowhere else.",
        low=0,
        high=65535,
        flag="--admin-port",
        metavar="PORT",
    )
    api_key_file: Path | None = setting(
        None,
        "Keys, one a line; clients must send one.",
        more="Without keys anyone who reaches the port may ask.",
        flag="--api-key-file",
        metavar="FILE",
    )
    api_keys: tuple[str, ...] = setting(
        (),
        "A key that clients may send; others on this machine can see it.",
        flag="--api-key",
        metavar="KEY",
        shown=False,
    )
    ssl_certfile: Path | None = setting(
        None,
        "Speak TLS, with this certificate and its chain (PEM).",
        more="All listeners do.",
        flag="--ssl-certfile",
        metavar="FILE",
    )
    ssl_keyfile: Path | None = setting(
        None, "Its private key, where it is not in the same file.", flag="--ssl-keyfile", metavar="FILE"
    )
    trusted_proxies: tuple[str, ...] = setting(
        (),
        "A proxy's address or network whose X-Forwarded-For counts.",
        more="It counts for the audit log.",
        flag="--trusted-proxy",
        metavar="ADDRESS",
    )
    served_name: str | None = setting(
        None, "What clients call the model; its own name by default.", flag="--served-name", metavar="NAME"
    )
    cors_origins: tuple[str, ...] = setting(
        (),
        "Let pages of this site ask from a browser; * for all.",
        more="It is written ``https://app.example``.",
        flag="--cors-origin",
        metavar="URL",
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        "A name of this machine's that a proxy here hands on, as loopback.",
        more="A server on loopback refuses requests made to other names.",
        flag="--allowed-host",
        metavar="NAME",
    )
    swap_policy: SwapPolicy = setting(
        "drain",
        "At a switch: let requests in flight end under the old patch, or begin them again under the new one.",
        choices=POLICIES,
        flag="--swap-policy",
    )
    max_queue: int = setting(256, "Requests that may wait; more get 429.", low=0, flag="--max-queue", metavar="N")
    limits: Limits = field(default_factory=Limits)
    allowed: Allowed = field(default_factory=Allowed)
    log_prompts: bool = setting(False, "Write what clients ask into the log.", flag="--log-prompts")
    audit_file: Path | None = setting(
        None, "The audit log; $NEST_HOME/audit.jsonl by default.", flag="--audit-file", metavar="FILE"
    )
    trust: tuple[Path, ...] = setting(
        (),
        "A public key whose signatures count. May be repeated.",
        more="It counts beside those of the trust policy.",
        flag="--trust",
        metavar="KEY.pub",
    )
    require_signature: bool = setting(False, "Refuse unsigned patches.", flag="--require-signature")
    trust_policy: Path | None = setting(
        None, "A trust policy; $NEST_HOME/trust.toml by default.", flag="--trust-policy", metavar="FILE"
    )
    allow_downgrade: bool = setting(
        False, "Let an older patch than one already accepted pass; it is recorded.", flag="--allow-downgrade"
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps.", flag="--device", metavar="NAME", names="devices")
    dtype: str = setting("auto", "auto, float32, bfloat16, float16.", flag="--dtype", metavar="NAME", names="dtypes")
    trust_remote_code: bool = setting(False, "Run code that comes with the model.", flag="--trust-remote-code")
    follow: FollowConfig | None = None
    json: bool = setting(
        False,
        "Print events on stdout, one JSON line each.",
        more="Otherwise they are sentences on stderr.",
        flag="--json",
    )

    def __post_init__(self) -> None:
        for name, about in settings_of(type(self)).items():
            if about.several:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_names()
        if self.engine not in ENGINES:
            raise UsageError(
                f"there is no engine {self.engine!r} here; known: {', '.join(ENGINES)}",
                f"{did_you_mean(self.engine, ENGINES)}leave --engine out for transformers",
            )
        if self.engine_args and self.engine != "vllm":
            raise UsageError(
                f"--engine-args are given, and the engine is {self.engine}", "give --engine vllm, or leave them out"
            )
        check(self, "serve:", by_flag=True)
        if self.admin_host is not None and self.admin_port is None:
            raise UsageError("--admin-host is given without --admin-port", "give both, or neither")
        if self.admin_port is not None and self.admin_token_file is None:
            raise UsageError(
                "--admin-port is given, and no --admin-token-file", "give the file: it opens the admin API"
            )
        if self.admin_port is not None and self.admin_port == self.port != 0 and self.admin_host in (None, self.host):
            raise UsageError(
                f"--port and --admin-port are both {self.port}", "give the admin API a port of its own, or leave it out"
            )
        if any(not key.strip() or key != key.strip() for key in self.api_keys):
            raise UsageError("an --api-key is empty, or has spaces around it", "give the key as clients send it")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise UsageError("--ssl-keyfile is given without --ssl-certfile", "give both, or neither")
        networks_of(self.trusted_proxies)  # raises for what is no address

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
        """``https`` if there is a certificate, else ``http``."""
        return "http" if self.ssl_certfile is None else "https"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def admin_address(self) -> tuple[str, int] | None:
        """Where the admin API listens, if not where the rest is."""
        return None if self.admin_port is None else (self.admin_host or "127.0.0.1", self.admin_port)
