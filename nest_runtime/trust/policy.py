"""The trust policy: which keys may sign what, and how strict to be. A TOML or JSON file.

    format = 1
    require_signature = true
    require_claims = false                # true: patches must carry claims
    on_revoked = "newest-good"            # or "stop"

    [[keys]]
    name = "release"
    file = "release.pub"                  # beside this file; or pem = "-----BEGIN PUBLIC KEY-----…"
    names = ["reference-*"]               # patches it may sign, as globs
    may = ["patches", "revocations"]      # and "channels"; everything where left out

    [minimum_serial]                      # by patch name, as a glob
    "reference-safety" = 2

The file ``$NEST_HOME/trust.toml`` (or ``trust.json``) is in force wherever patches are activated or
served. A policy decides nothing by itself: check.py does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from nest_runtime.errors import UsageError, reason_of
from nest_runtime.io import MAX_SETTINGS, nest_home, parse_json, parse_toml, read_text
from nest_runtime.trust.documents import Serial, Value, first_problem
from nest_runtime.trust.keys import PublicKey, parse_public_key, read_public_key

Role = Literal["patches", "channels", "revocations"]
ROLES: tuple[Role, ...] = ("patches", "channels", "revocations")
POLICY_FILES = ("trust.toml", "trust.json")
_HINT = "see docs/reference/threat-model.md for the fields of a policy"
_READABLE = "mend it, or remove it if no policy is meant: what is there is never passed over"


class KeyRule(Value):
    """One trusted key and what it may sign.

    Attributes:
        name: what people call it.
        pem: the public key.
        names: globs over patch names.
        may: what kinds of documents.
    """

    name: str = Field(min_length=1, max_length=128)
    pem: str
    names: tuple[str, ...] = Field(min_length=1)
    may: tuple[Role, ...] = Field(default=ROLES, min_length=1)

    @cached_property
    def key(self) -> PublicKey:
        """The key itself. Raises UsageError for text that is none."""
        return parse_public_key(self.pem.encode(), self.name, f"the key {self.name!r}")

    def allows(self, role: Role, name: str) -> bool:
        """Whether this key may sign such a document about patches of that name."""
        return role in self.may and any(fnmatchcase(name, glob) for glob in self.names)


class Policy(Value):
    """Whom to trust, and for what. Immutable; made by ``read_policy`` or ``policy_for``.

    Attributes:
        require_signature: unsigned patches are refused; otherwise they pass unsigned, and say so.
        require_claims: patches without claims are refused, and servers switch to none whose claims they cannot try.
        keys: the trusted keys.
        minimum_serial: glob over patch names → lowest serial that is ever accepted.
        on_revoked: what a server does when its active patch is revoked: go to the newest good version, or stop.
    """

    format: Literal[1] = 1
    require_signature: bool = True
    require_claims: bool = False
    keys: tuple[KeyRule, ...] = ()
    minimum_serial: dict[str, Serial] = Field(default_factory=dict)
    on_revoked: Literal["newest-good", "stop"] = "newest-good"

    @model_validator(mode="after")
    def _check_keys(self) -> Policy:
        if self.require_signature and not self.keys:
            raise ValueError("keys is empty, and require_signature is true: nothing could be accepted")
        names = [rule.name for rule in self.keys]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"keys: the name {twice[0]!r} appears twice")
        return self

    @property
    def public_keys(self) -> tuple[PublicKey, ...]:
        """The keys of all rules."""
        return tuple(rule.key for rule in self.keys)

    def rule_of(self, key_id: str) -> KeyRule | None:
        """The rule of a key, or None if it is not trusted at all."""
        return next((rule for rule in self.keys if rule.key.id == key_id), None)

    def floor(self, name: str) -> int:
        """The lowest serial accepted for a patch name."""
        return max((serial for glob, serial in self.minimum_serial.items() if fnmatchcase(name, glob)), default=0)


def read_policy(path: Path) -> Policy:
    """The policy of a ``.toml`` or ``.json`` file, its keys read. Raises UsageError naming the file and the field."""
    try:
        text = read_text(path, MAX_SETTINGS)
    except OSError as error:
        raise UsageError(f"the trust policy {path} cannot be read: {reason_of(error)}", _READABLE) from error
    except ValueError as error:
        raise UsageError(f"the trust policy {path} is not UTF-8: {error}", "save it as UTF-8") from error
    try:
        value = parse_json(text) if path.suffix == ".json" else parse_toml(text)
    except ValueError as error:  # of json and of tomllib
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UsageError(f"the trust policy {path} is not {kind}: {error}", _HINT) from error
    if not isinstance(value, dict):
        raise UsageError(f"the trust policy {path} is a {type(value).__name__}; expected a table", _HINT)
    return _policy(_with_key_files(value, path), f"the trust policy {path}")


def default_policy(home: Path | None = None) -> Policy | None:
    """The policy in ``$NEST_HOME``, or None if there is none.

    Raises:
        UsageError: there is one that does not count: a link to nowhere, a file that cannot be read, or two.
    """
    folder = home or nest_home()
    found = [folder / name for name in POLICY_FILES if _is_there(folder / name)]
    if len(found) > 1:
        raise UsageError(f"there are two trust policies, {found[0]} and {found[1]}", "keep one of them")
    return read_policy(found[0]) if found else None


def policy_for(
    keys: Iterable[Path] = (), *, require_signature: bool = False, file: Path | None = None
) -> Policy | None:
    """The policy that a command's options ask for; None if nothing asks for any.

    Args:
        keys: public key files (``--trust``), each for every name and purpose, beside those of the policy file.
        require_signature: refuse unsigned patches whatever the file says.
        file: a policy file instead of the one in ``$NEST_HOME``.

    Raises:
        UsageError: a key or the policy cannot be used, or signatures are required and no key is trusted.
    """
    policy = read_policy(file) if file is not None else default_policy()
    given = [read_public_key(path) for path in keys]
    if policy is None and not given and not require_signature:
        return None
    if not given and (policy is None or not policy.keys):
        raise UsageError(
            "signatures are required, but no key is trusted", "give --trust KEY.pub, or write $NEST_HOME/trust.toml"
        )
    base = policy or Policy(require_signature=False)
    return with_keys(base, given, require_signature=require_signature or base.require_signature)


def with_keys(policy: Policy, keys: Iterable[PublicKey], *, require_signature: bool) -> Policy:
    """A policy that also trusts ``keys`` for every name and purpose."""
    rules = {rule.key.id: rule for rule in policy.keys}
    taken = {rule.name for rule in policy.keys}
    for key in keys:
        name = key.name if key.name not in taken else f"{key.name}-{key.id[7:19]}"
        rules[key.id] = KeyRule(name=name, pem=key.pem.decode(), names=("*",))
        taken.add(name)
    fields = {**policy.model_dump(), "keys": tuple(rules.values()), "require_signature": require_signature}
    return Policy(**fields)


def _is_there(path: Path) -> bool:
    """Whether a name stands for anything. Raises UsageError if that cannot be told: no answer is no "no"."""
    try:
        path.lstat()
    except FileNotFoundError:
        if path.parent.is_symlink() and not path.parent.exists():
            raise UsageError(f"{path.parent}, where a trust policy would be, is a link to nowhere", _READABLE) from None
        return False
    except OSError as error:
        raise UsageError(f"the trust policy {path} cannot be looked for: {error.strerror}", _READABLE) from error
    return True


def _policy(value: dict[str, Any], where: str) -> Policy:
    try:
        policy = Policy.model_validate_json(json.dumps(value))
    except RecursionError as error:
        raise UsageError(f"{where} is nested too deeply", _HINT) from error
    except ValidationError as error:
        raise UsageError(f"{where}: {first_problem(error)}", _HINT) from error
    except TypeError as error:  # TOML has dates, JSON has none
        raise UsageError(f"{where}: {error}", _HINT) from error
    ids = [key.id for key in policy.public_keys]
    for index, key_id in enumerate(ids):
        if key_id in ids[:index]:
            raise UsageError(f"{where}: keys[{index}] is the same key as keys[{ids.index(key_id)}]", _HINT)
    return policy


def _with_key_files(value: dict[str, Any], path: Path) -> dict[str, Any]:
    """The policy with every ``file`` of a key replaced by the key's text."""
    rules = value.get("keys")
    if not isinstance(rules, list):
        return value
    read = []
    for index, rule in enumerate(rules):
        if not isinstance(rule, dict) or ("file" not in rule and "pem" in rule):
            read.append(rule)
            continue
        where = f"the trust policy {path}: keys[{index}].file"
        if "file" not in rule:
            raise UsageError(f"{where} is missing, and so is pem", "name the public key's file")
        if "pem" in rule or not isinstance(rule["file"], str):
            raise UsageError(f"{where} must be a path, and stand without pem", _HINT)
        try:
            key = read_public_key(path.parent / rule["file"])
        except UsageError as error:
            raise UsageError(f"{where}: {error.message}", error.hint) from error
        read.append({**{k: v for k, v in rule.items() if k != "file"}, "pem": key.pem.decode()})
    return {**value, "keys": read}
