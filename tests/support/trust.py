"""Key pairs, policies and signatures for tests of trust; all real."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest_runtime.patch.patch import Patch
from nest_runtime.patch.write import to_bytes
from nest_runtime.trust.check import sign_bytes
from nest_runtime.trust.keys import PublicKey, generate_keys
from nest_runtime.trust.material import Material
from nest_runtime.trust.policy import KeyRule, Policy, with_keys


@dataclass(frozen=True)
class Keys:
    """A key pair of the publisher, and one of somebody else."""

    mine: Path
    public: PublicKey
    other: Path
    other_public: PublicKey


def make_keys(folder: Path) -> Keys:
    """Two new key pairs in a folder."""
    mine, _, public = generate_keys(folder, "release")
    other, _, other_public = generate_keys(folder, "other")
    return Keys(mine, public, other, other_public)


def only(*keys: PublicKey) -> Policy:
    """A policy that wants a signature, by one of these keys."""
    return with_keys(Policy(require_signature=False), keys, require_signature=True)


def rule(key: PublicKey, *names: str, **fields: Any) -> KeyRule:
    """A policy's rule for a key."""
    return KeyRule(name=key.name, pem=key.pem.decode(), names=names, **fields)


def signed(patch: Patch, key: Path) -> Material:
    """A patch's manifest and signature."""
    return sign_bytes(to_bytes(patch), key).material
