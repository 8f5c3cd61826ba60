"""The built-in model, the store's integrity, what is active, and whom this machine trusts."""

from __future__ import annotations

from nest_runtime.doctor.finding import NOTE, OK, PROBLEM, Finding
from nest_runtime.errors import NestError
from nest_runtime.escape import short
from nest_runtime.io import nest_home
from nest_runtime.store.store import Entry, Store


def reference_model() -> Finding:
    """Whether the built-in model is there and can be read. Raises ModelError if it is not."""
    from nest_runtime.model.fingerprint import hash_report
    from nest_runtime.model.load import REFERENCE, resolve_model

    _, folder = resolve_model(REFERENCE)
    report = hash_report(folder)
    return Finding("reference model", OK, f"{report['bytes'] / 1e6:.1f} MB, {report['hash'][:19]}")


def store() -> Finding:
    """Every stored patch against its digest, and the history against its chain."""
    held = Store()
    entries = held.list()
    broken = [(entry, error) for entry in entries if (error := _damage(held, entry)) is not None]
    if broken:
        entry, error = broken[0]
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        return Finding("store", PROBLEM, f"{entry.key}: {error.message}{more}", error.hint)
    try:
        events = held.verify_history()
    except NestError as error:
        return Finding("store", PROBLEM, error.message, error.hint)
    built_in = sum(entry.builtin for entry in entries)
    return Finding(
        "store",
        OK,
        f"{len(entries)} patches ({built_in} built-in), every digest matches; history of {events} entries is whole",
        "" if entries else "train one with `nest-runtime train`, or `nest-runtime pull org/repo`",
    )


def audit_log() -> Finding:
    """The audit log of servers on this machine, against its chain. Raises StoreError if a line is wrong or missing."""
    from nest_runtime.serve.switching.audit import AuditLog

    log = AuditLog(nest_home() / "audit.jsonl")
    if not log.kept:
        return Finding("audit log", OK, "none yet: a server begins it")
    return Finding("audit log", OK, f"{log.verify()} entries in {log.path}, whole")


def active() -> Finding:
    """Which patch answers for which model if none is named."""
    now = [entry for entry in Store().list() if entry.active]
    if not now:
        return Finding(
            "active patches", NOTE, "none: the bare base answers where no patch is named", "nest-runtime activate v3"
        )
    return Finding(
        "active patches",
        OK,
        "; ".join(f"{entry.key} for {entry.base_model or short(entry.base_hash)}" for entry in now),
    )


def trust() -> Finding:
    """The trust policy, and whether what is active passes it. Raises UsageError for a policy that cannot be read."""
    from nest_runtime.trust.guard import guard_for

    held = Store()
    guard = guard_for(held)
    if guard is None:
        return Finding(
            "trust policy",
            NOTE,
            "none: patches are accepted unsigned",
            "to require signatures: nest-runtime keygen DIR, then $NEST_HOME/trust.toml "
            "(docs/reference/threat-model.md)",
        )
    for entry in (entry for entry in held.list() if entry.active):
        try:
            guard.check(held.get(entry.digest))
        except NestError as error:
            return Finding("trust policy", PROBLEM, f"{entry.key} is active, but refused: {error.message}", error.hint)
    policy = guard.policy
    strict = "signatures required" if policy.require_signature else "unsigned patches pass"
    return Finding("trust policy", OK, f"{len(policy.keys)} keys trusted, {strict}; what is active passes")


def _damage(held: Store, entry: Entry) -> NestError | None:
    try:
        held.get(entry.digest)
    except NestError as error:
        return error
    return None
