"""What a repository says beside its patches: revocations and channels, read and checked.

With a guard, both count only if they are signed by a key that its policy trusts for them; unsigned channels pass if
the policy lets unsigned patches pass. Without a trust policy nothing can be checked. A revocation list is obeyed
anyway, because obeying one can only refuse patches.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nest_runtime.errors import Revoked, SignatureError
from nest_runtime.hints import alike
from nest_runtime.hub.channels import CHANNELS, Channel, verify_channel
from nest_runtime.hub.repository import USUAL_CHANNELS, Remote
from nest_runtime.trust.revocations import LIST_FILE, LIST_SIGNATURE, Revocation, RevocationList
from nest_runtime.trust.signing import read_bundle

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.trust.guard import Guard
    from nest_runtime.trust.policy import KeyRule

log = logging.getLogger("nest_runtime.hub")


@dataclass(frozen=True)
class News:
    """A repository's revocation list, and on whose word it counts.

    Attributes:
        list: the list; None if the repository has none.
        rule: of the key that signed it; None if no policy says who may speak.
    """

    list: RevocationList | None = None
    rule: KeyRule | None = None

    def serial(self, name: str) -> int:
        """The list's serial for patches of a name; 0 if there is none by a key that may speak about them."""
        return self.list.serial if self.list is not None and self._counts(name) else 0

    def find(self, digest: str, name: str) -> Revocation | None:
        """The revocation of a patch, or None."""
        return self.list.find(digest, name) if self.list is not None and self._counts(name) else None

    def check(self, patch: Patch) -> None:
        """Refuse a patch that the list names. With a guard, check_trust has said so before. Raises Revoked."""
        entry = self.find(patch.digest, patch.name)
        if entry is not None:
            raise Revoked(f"{patch.label} was revoked on {entry.date[:10]}: {entry.reason}", "use another version")

    def _counts(self, name: str) -> bool:
        return self.rule is None or self.rule.allows("revocations", name)


def read_revocations(remote: Remote, head: str, guard: Guard | None) -> News:
    """The repository's revocation list, taken into the guard's memory.

    Raises:
        SignatureError: it is false, unsigned, older than the known one, or malformed.
        HubError: it could not be fetched.
    """
    data = remote.read(LIST_FILE, head)
    if data is None:
        return News()
    if guard is None:
        return News(RevocationList.parse(data, f"the revocation list of {remote.name}"))
    signature = remote.read(LIST_SIGNATURE, head)
    if signature is None:
        raise SignatureError(f"the revocation list of {remote.name} is not signed", "ask its publisher to sign it")
    known = guard.state.update_revocations(data, signature, guard.policy)
    return News(known, guard.policy.rule_of(read_bundle(signature, "the signature of a list").key_id))


def channels_like(remote: Remote, head: str, wanted: str) -> list[str]:
    """The channels that look like ``wanted``, among those that repositories usually have; at most one request each."""
    return [name for name in alike(wanted, USUAL_CHANNELS) if remote.read(f"{CHANNELS}/{name}.json", head) is not None]


def read_channel(remote: Remote, head: str, channel: str, guard: Guard | None) -> Channel | None:
    """The file of a channel, checked for who signed it but not for its date; None if there is none.

    Raises:
        SignatureError: it is false, unsigned though signatures are required, malformed, or another channel's.
        HubError: it could not be fetched.
    """
    data = remote.read(f"{CHANNELS}/{channel}.json", head)
    if data is None:
        return None
    signature = remote.read(f"{CHANNELS}/{channel}.sig", head)
    where = f"channel {channel} of {remote.name}"
    if guard is not None and signature is not None:
        return verify_channel(data, signature, guard.policy, channel)
    if guard is not None and guard.policy.require_signature:
        raise SignatureError(f"{where} is not signed", "ask its publisher to sign it, with `nest-runtime channel set`")
    log.warning("%s is taken on trust: %s", where, "it is not signed" if signature is None else "no key is trusted")
    found = Channel.parse(data, where)
    if found.channel != channel:
        raise SignatureError(f"{where} holds the file of {found.channel}", "ask its publisher to set it again")
    return found
