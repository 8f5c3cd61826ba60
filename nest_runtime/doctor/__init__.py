"""Is this installation in order? One finding per thing that can be wrong, each with what to do about it.

``nest-runtime doctor`` prints them. Looking changes nothing: no patch, no setting, no cache is written.
Every wait is bounded, and a check that fails unexpectedly becomes a finding itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from nest_runtime.doctor.finding import NOTE, OK, PROBLEM, Finding
from nest_runtime.errors import NestError

__all__ = ["NOTE", "OK", "PROBLEM", "Finding", "examine"]


def examine(timeout: float = 5.0) -> Iterator[Finding]:
    """Look at everything, one finding at a time.

    Args:
        timeout: seconds that the Hub may take to answer.
    """
    from nest_runtime.doctor import hub, machine, patches

    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", machine.python),
        ("packages", machine.packages),
        ("extras", machine.extras),
        ("devices", machine.devices),
        ("home", machine.home),
        ("reference model", patches.reference_model),
        ("store", patches.store),
        ("audit log", patches.audit_log),
        ("active patches", patches.active),
        ("trust policy", patches.trust),
        ("hub cache", hub.cache),
        ("hub token", hub.token),
        ("hub", partial(hub.reach, timeout)),
    ]
    for name, check in checks:
        yield _guarded(name, check)


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """A check's finding; what it raises is a finding too, so that the others still run."""
    try:
        return check()
    except NestError as error:
        return Finding(name, PROBLEM, error.message, error.hint)
    except Exception as error:
        detail = (str(error).splitlines() or [""])[0]
        return Finding(name, PROBLEM, f"{type(error).__name__}: {detail}", "run again with --debug and report it")
