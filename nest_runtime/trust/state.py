"""What this machine remembers about trust: the highest serials it accepted, and the revocations it knows.

    $NEST_HOME/trust/state.json         highest accepted serials per model hash and patch name; serials of lists
    $NEST_HOME/trust/revocations/       the accepted lists and their signatures, one pair per publisher's key
    $NEST_HOME/trust/history.jsonl      acceptances, permitted downgrades, new lists; hash-chained (store/history.py)

A change happens at one moment, when state.json is replaced. Lists are verified again whenever they are used. If one
is missing, older than remembered or damaged, everything is refused until it is fetched again. Whoever can write this
folder can make the machine forget: see docs/reference/threat-model.md.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nest_runtime.errors import Downgrade, SignatureError
from nest_runtime.escape import short
from nest_runtime.io import atomic_write, nest_home, read_bytes
from nest_runtime.store import history
from nest_runtime.store.locked import LockedJson
from nest_runtime.trust.documents import MAX_DOCUMENT
from nest_runtime.trust.policy import KeyRule, Policy
from nest_runtime.trust.revocations import Revocation, RevocationList, verify_list

STATE_FORMAT = 1
MAX_STATE = 64 * 1024 * 1024  # bytes of state.json
_FETCH = "fetch the list again with `nest-runtime revocations FOLDER`"

log = logging.getLogger("nest_runtime.trust")


@dataclass(frozen=True)
class Accepted:
    """A patch version that was accepted: its serial and digest."""

    serial: int
    digest: str


@dataclass
class _Remembered:
    """state.json: by model hash and name what was accepted; by key id the serial and hash of its list."""

    accepted: dict[str, dict[str, list[Accepted]]] = field(default_factory=dict)
    lists: dict[str, tuple[int, str]] = field(default_factory=dict)

    def of(self, base_hash: str, name: str) -> list[Accepted]:
        return self.accepted.setdefault(base_hash, {}).setdefault(name, [])

    def to_json(self) -> dict[str, Any]:
        accepted = {
            base: {name: [[a.serial, a.digest] for a in rows] for name, rows in names.items()}
            for base, names in self.accepted.items()
        }
        return {"format": STATE_FORMAT, "accepted": accepted, "lists": {k: list(v) for k, v in self.lists.items()}}


class TrustState:
    """The memory of one machine; safe between threads and processes.

    Args:
        home: the folder that holds everything; ``$NEST_HOME`` by default. Made at the first write.
    """

    def __init__(self, home: str | Path | None = None) -> None:
        self.root = Path(home if home is not None else nest_home()) / "trust"
        self._file = LockedJson(
            self.root / "state.json",
            self.root / "lock",
            empty=_Remembered,
            parse=_parse,
            dump=_Remembered.to_json,
            forgets="which versions were accepted",
            limit=MAX_STATE,
        )
        self._log = history.ChainLog(self.root / "history.jsonl")

    def highest(self, base_hash: str, name: str, revoked: Collection[str] = ()) -> Accepted | None:
        """The highest version accepted for a model and patch name, revoked digests left out; None if there is none."""
        rows = self._file.read().accepted.get(base_hash, {}).get(name, [])
        return max((a for a in rows if a.digest not in revoked), key=lambda a: a.serial, default=None)

    def accept(
        self,
        base_hash: str,
        name: str,
        version: Accepted,
        *,
        allow_downgrade: bool = False,
        revoked: Collection[str] = (),
        who: str = "",
        why: str = "",
    ) -> None:
        """Remember that a verified patch was put in force.

        Args:
            base_hash, name: of the patch.
            version: its serial and digest.
            allow_downgrade: forget higher serials, on someone's explicit word; the history records it.
            revoked: digests that no longer count.
            who, why: for the history.

        Raises:
            Downgrade: a higher serial, or other content under this one, was accepted meanwhile.
            StoreError: the folder cannot be written.
        """
        with self._file.changing() as state:
            rows = state.of(base_hash, name)
            if version in rows and not any(a.serial > version.serial for a in rows):
                return
            before = max((a for a in rows if a.digest not in revoked), key=lambda a: a.serial, default=None)
            lower = before is not None and is_lower(version, before)
            if lower and not allow_downgrade:
                assert before is not None
                raise downgrade(f"{name} (serial {version.serial})", version, before)
            kept = [a for a in rows if a.serial < version.serial or (a.digest in revoked and a.serial > version.serial)]
            state.accepted[base_hash][name] = sorted([*kept, version], key=lambda a: a.serial)
            self._commit(
                state,
                {
                    "who": who or history.actor(),
                    "what": "downgrade" if lower else "accept",
                    "why": why,
                    "name": name,
                    "base_hash": base_hash,
                    "serial": version.serial,
                    "digest": version.digest,
                    "before": before.serial if before else None,
                },
            )

    def revocations(self, policy: Policy) -> list[tuple[Revocation, KeyRule]]:
        """Every revocation known from keys that the policy trusts with that patch's name, lists verified anew.

        Raises:
            SignatureError: a list that was accepted is gone, older or damaged: nothing is accepted then.
        """
        found = []
        for key_id, (serial, digest) in self._file.read().lists.items():
            rule = policy.rule_of(key_id)
            if rule is None or "revocations" not in rule.may:
                continue
            known, rule = self._stored(key_id, serial, digest, policy)
            found += [(entry, rule) for entry in known.revoked if rule.allows("revocations", entry.name)]
        return found

    def update_revocations(self, data: bytes, signature: bytes, policy: Policy, *, who: str = "") -> RevocationList:
        """Verify a published list, and keep it if it is news; returns it.

        Raises:
            SignatureError: false, not trusted, older than the one known, or with revocations taken off.
        """
        new, rule = verify_list(data, signature, policy)
        key_id = rule.key.id
        with self._file.changing() as state:
            if key_id in state.lists:
                known = self._check_follows(new, data, key_id, *state.lists[key_id], policy)
                if known == new:
                    return new
            paths = self._files(key_id, new.serial)
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            atomic_write(paths[0], data)
            atomic_write(paths[1], signature)
            state.lists[key_id] = (new.serial, _sha256(data))
            event = {
                "who": who or history.actor(),
                "what": "revocations",
                "why": "",
                "key": key_id,
                "serial": new.serial,
            }
            self._commit(state, {**event, "revoked": len(new.revoked)})
            for path in paths[0].parent.glob(f"{key_id.partition(':')[2]}-*"):
                if path not in paths:
                    path.unlink()
        return new

    def history(self) -> list[dict[str, Any]]:
        """What was accepted, permitted and learned, oldest first."""
        return self._log.read()

    def _check_follows(
        self, new: RevocationList, data: bytes, key_id: str, serial: int, digest: str, policy: Policy
    ) -> RevocationList | None:
        """Whether a list may replace the remembered one; returns that, or None if it is damaged."""
        try:
            known, _ = self._stored(key_id, serial, digest, policy)
        except SignatureError as error:  # the remembered serial still stands guard over what heals the damage
            log.warning("the revocation list is replaced: %s", error.message)
            if new.serial < serial or (new.serial == serial and _sha256(data) != digest):
                raise SignatureError(
                    f"the revocation list has serial {new.serial}; another with serial {serial} was already accepted",
                    "fetch the present list",
                ) from error
            return None
        new.check_follows(known)
        return known

    def _stored(self, key_id: str, serial: int, digest: str, policy: Policy) -> tuple[RevocationList, KeyRule]:
        data_path, signature_path = self._files(key_id, serial)
        try:
            data, signature = (read_bytes(path, MAX_DOCUMENT, follow=False) for path in (data_path, signature_path))
        except OSError as error:
            raise SignatureError(f"the revocation list {data_path} is gone: {error.strerror}", _FETCH) from error
        if _sha256(data) != digest:
            raise SignatureError(f"{data_path} is not the revocation list {serial} that was accepted", _FETCH)
        return verify_list(data, signature, policy, str(data_path))

    def _files(self, key_id: str, serial: int) -> tuple[Path, Path]:
        stem = f"{key_id.partition(':')[2]}-{serial}"
        folder = self.root / "revocations"
        return folder / f"{stem}.json", folder / f"{stem}.sig"

    def _commit(self, state: _Remembered, event: dict[str, Any]) -> None:
        """First the history, then the state: a process killed between has said what it was about to do, and no more."""
        self._log.append(event)
        self._file.write(state)


def is_lower(version: Accepted, highest: Accepted) -> bool:
    """Whether a version is behind the highest accepted one, or stands in its place with other content."""
    return version.serial < highest.serial or (version.serial == highest.serial and version.digest != highest.digest)


def downgrade(label: str, version: Accepted, highest: Accepted) -> Downgrade:
    """The error for a version that ``is_lower``."""
    if version.serial == highest.serial:
        what = f"{label} is {short(version.digest)}; under the same serial {short(highest.digest)} was already accepted"
    else:
        what = f"{label} has serial {version.serial}; {highest.serial} was already accepted on this machine"
    return Downgrade(what, "if you mean to go back, say --allow-downgrade; it is recorded")


def _parse(value: Any) -> _Remembered:
    if not isinstance(value, dict) or value["format"] != STATE_FORMAT:
        raise ValueError(f"expected format {STATE_FORMAT}")
    accepted = {
        base: {name: [_accepted(*row) for row in rows] for name, rows in names.items()}
        for base, names in value["accepted"].items()
    }
    return _Remembered(accepted, {key: (int(serial), str(digest)) for key, (serial, digest) in value["lists"].items()})


def _accepted(serial: Any, digest: Any) -> Accepted:
    if type(serial) is not int or not isinstance(digest, str):
        raise TypeError("a serial or digest is damaged")
    return Accepted(serial, digest)


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
