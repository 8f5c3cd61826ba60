"""From a reference to the repository it names: one on the Hub, or a mirror."""

from __future__ import annotations

from nest_runtime.hub.mirror import MirrorRemote
from nest_runtime.hub.repository import Remote, RepoRef


def connect(ref: RepoRef, *, timeout: float | None = None) -> Remote:
    """The repository that a reference names, ready to be asked; asks nothing yet.

    Args:
        ref: see ``parse_repo``.
        timeout: seconds that any one step may take; by default what suits the place.
    """
    if ref.on_hub:
        from nest_runtime.hub.huggingface import DEFAULT_TIMEOUT, HubRemote  # the Hub's client takes a while to import

        return HubRemote(ref.repo_id, timeout=timeout or DEFAULT_TIMEOUT)
    return MirrorRemote(ref.place)
