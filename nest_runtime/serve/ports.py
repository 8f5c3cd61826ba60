"""The sockets that a server listens on, and its certificate. Nothing here accepts a connection."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator

from nest_runtime.errors import UsageError, port_taken
from nest_runtime.serve.config import ServeConfig


def bind(config: ServeConfig) -> socket.socket:
    """A bound socket that does not listen yet: clients are refused, not kept waiting, while the model loads.

    Raises:
        EngineError: the port is taken.
        UsageError: there is no such address.
    """
    return _bind(config.host, config.port)


@contextlib.contextmanager
def bind_admin(config: ServeConfig) -> Iterator[socket.socket | None]:
    """The same for the admin API's own listener, or None if it has none."""
    if config.admin_address is None:
        yield None
        return
    with contextlib.closing(_bind(*config.admin_address)) as port:
        yield port


def _bind(host: str, number: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    port = socket.socket(family, socket.SOCK_STREAM)
    try:
        port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port.bind((host, number))
        return port
    except OSError as error:
        port.close()
        if error.errno == errno.EADDRINUSE:
            raise port_taken(host, number) from error
        raise UsageError(f"cannot listen on {host}:{number}: {error}", "give another --host or --port") from error


@contextlib.contextmanager
def listening_on(host: str, number: int) -> Iterator[None]:
    """Two servers may bind a port; only the first may listen on it."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise port_taken(host, number) from error


def tls_context(config: ServeConfig) -> ssl.SSLContext | None:
    """Certificate and key, or None without TLS. Raises UsageError if they are none, or no pair."""
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = f"{config.ssl_certfile}{f' and {config.ssl_keyfile}' if config.ssl_keyfile else ''}"
        raise UsageError(
            f"{files} cannot be used for TLS: {_fault(error, config)}",
            "give a certificate with its chain and its key, in PEM",
        ) from error
    return context


def url_of(port: socket.socket, config: ServeConfig) -> str:
    """Where a bound socket is reached."""
    host, number = port.getsockname()[:2]
    return f"{config.scheme}://{f'[{host}]' if ':' in host else host}:{number}"


def _fault(error: Exception, config: ServeConfig) -> str:
    """What is wrong with a certificate and its key; OpenSSL names neither file."""
    for file in filter(None, (config.ssl_certfile, config.ssl_keyfile)):
        try:
            with open(file, "rb"):
                pass
        except OSError as unreadable:
            return f"{file}: {unreadable.strerror}"
    if config.ssl_keyfile is None and isinstance(error, ssl.SSLError):
        return f"{config.ssl_certfile} holds no certificate with a private key; --ssl-keyfile names the key's file"
    if getattr(error, "reason", None) in ("KEY_VALUES_MISMATCH", "NO_CERTIFICATE_ASSIGNED"):
        return "the key does not belong to the certificate"
    return str(error)
