"""What a request is pinned to, and a change of it: two frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch

BASE = "base"
NO_DIGEST = "none"
POLICIES = ("drain", "enforce")

SwapPolicy = Literal["drain", "enforce"]
"""What becomes of requests in flight when the active patch changes: ``drain`` lets them end under the
old one; ``enforce`` begins them again under the new one, and ends those whose client has seen a part."""


@dataclass(frozen=True)
class ServedPatch:
    """A patch as requests are pinned to it, or the bare base.

    Attributes:
        key: the runtime's key, which is the digest, because a version may come to belong to two patches. None for the
            base.
        label: its name in answers: the version (``name@version`` if the version was taken), or ``base``.
        digest: the patch digest, or ``none``.
        patch: the patch itself, or None for the base.
        since: when it was loaded, ISO 8601.
    """

    key: str | None
    label: str
    digest: str
    patch: Patch | None = field(default=None, repr=False, compare=False)
    since: str = field(default="", compare=False)


@dataclass(frozen=True)
class Switch:
    """A change of the active patch that has happened.

    Attributes:
        what: "activate" or "rollback".
        active, previous: the patches.
        seconds: what it took, loading and checking included.
        policy: what happened to requests in flight.
        replaced: how many of them were restarted, or ended.
    """

    what: str
    active: ServedPatch
    previous: ServedPatch
    seconds: float
    policy: SwapPolicy = "drain"
    replaced: int = 0
