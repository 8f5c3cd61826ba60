"""Addresses: which are this machine's own, and which lie in a network."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from nest_runtime.errors import UsageError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only: ``localhost``, or an IP address that is so.

    Any other name is not, however it begins: whoever owns ``127.example.org`` decides where it points.
    """
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def is_address(host: str) -> bool:
    """Whether a host is an IP address, which nobody can make point elsewhere."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def networks_of(texts: Sequence[str]) -> tuple[Network, ...]:
    """Addresses and networks such as ``10.0.0.0/8``. Raises UsageError for what is none."""
    found = []
    for text in texts:
        try:
            found.append(ipaddress.ip_network(text, strict=False))
        except ValueError as error:
            raise UsageError(
                f"--trusted-proxy is {text!r:.60}; expected an address or a network", "write 10.0.0.7 or 10.0.0.0/24"
            ) from error
    return tuple(found)


def is_in(text: str, networks: Sequence[Network]) -> bool:
    """Whether a text is an address in one of the networks."""
    return is_address(text) and any(ipaddress.ip_address(text.strip("[]")) in network for network in networks)
