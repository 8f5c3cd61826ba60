"""Revocations, channel files, and the guard before every activation, which brings all of trust together."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from nest_runtime.errors import (
    Expired,
    Revoked,
    SignatureError,
    UsageError,
)
from nest_runtime.hub.channels import Channel, channel_for, read_channel, verify_channel, write_channel
from nest_runtime.store import entries
from nest_runtime.store.store import Store
from nest_runtime.trust.check import check_trust, remember, sign_patch
from nest_runtime.trust.guard import Guard, keep_beside
from nest_runtime.trust.kept import keep_signature
from nest_runtime.trust.material import material_paths
from nest_runtime.trust.policy import Policy
from nest_runtime.trust.revocations import (
    Revocation,
    RevocationList,
    read_list,
    revoke,
    sign_list,
    verify_list,
    write_list,
)
from nest_runtime.trust.signing import sign_files
from nest_runtime.trust.state import Accepted, TrustState
from tests.support.store import BASE_A, BASE_B, small_patch
from tests.support.trust import Keys, make_keys, only, rule, signed

NOON = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def policy(keys: Keys) -> Policy:
    return only(keys.public)


@pytest.fixture
def state(tmp_path: Path) -> TrustState:
    return TrustState(tmp_path / "home")


@pytest.fixture(autouse=True)
def no_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "builtin"
    folder.mkdir()
    monkeypatch.setattr(entries, "builtin_patches_dir", lambda: folder)
    return folder


# Revocations


def test_a_revoked_patch_is_refused_with_the_reason(
    keys: Keys, policy: Policy, state: TrustState, tmp_path: Path
) -> None:
    folder, patch = tmp_path / "mirror", small_patch("v2")
    material = signed(patch, keys.mine)
    remember(check_trust(patch, material, policy, state), state)
    first = revoke(patch, "answers recipes", folder, keys.mine, now=NOON)
    assert sorted(path.name for path in folder.iterdir()) == ["revocations.json", "revocations.sig"]
    assert (first.serial, [e.digest for e in first.revoked]) == (1, [patch.digest])
    assert revoke(patch, "again", folder, keys.mine) == first  # once is enough
    state.update_revocations(*read_list(folder), policy)
    state.update_revocations(*read_list(folder), policy)  # no news
    with pytest.raises(Revoked, match="test@v2 was revoked on 2026-07-01 by release: answers recipes") as caught:
        check_trust(patch, material, policy, state, allow_downgrade=True)
    assert caught.value.exit_status == 3
    assert [e["what"] for e in state.history()] == ["accept", "revocations"]
    older = small_patch("v1", seed=4)  # what stood in its way is revoked: going back needs no permission
    verified = check_trust(older, signed(older, keys.mine), policy, state)
    assert verified.before is None
    remember(verified, state)
    assert state.highest(BASE_A, "test", verified.revoked) == Accepted(1, older.digest)


def test_lists_only_grow(keys: Keys, policy: Policy, state: TrustState, tmp_path: Path) -> None:
    folder = tmp_path / "mirror"
    revoke(small_patch("v1"), "bad", folder, keys.mine)
    old = read_list(folder)
    new = revoke(small_patch("v2", seed=2), "worse", folder, keys.mine)
    assert (new.serial, len(new.revoked)) == (2, 2)
    assert [e.digest for e in new.revoked] == sorted(e.digest for e in new.revoked)
    state.update_revocations(*read_list(folder), policy)
    with pytest.raises(SignatureError, match="has serial 1; 2 was already accepted"):
        state.update_revocations(*old, policy)
    shrunk = RevocationList(serial=3, updated=new.updated, revoked=new.revoked[:1])
    with pytest.raises(SignatureError, match="no longer holds"):
        state.update_revocations(*sign_list(shrunk, keys.mine), policy)
    forked = RevocationList(serial=2, updated="2020-01-01T00:00:00Z", revoked=new.revoked)
    with pytest.raises(SignatureError, match="two different"):
        state.update_revocations(*sign_list(forked, keys.mine), policy)
    assert len(state.revocations(policy)) == 2


def test_who_may_revoke(keys: Keys, state: TrustState, tmp_path: Path) -> None:
    patch, folder = small_patch(), tmp_path / "mirror"
    material = signed(patch, keys.mine)
    revoke(patch, "spite", folder, keys.other)
    patches_only = Policy(keys=(rule(keys.public, "*"), rule(keys.other_public, "*", may=("patches",))))
    with pytest.raises(SignatureError, match="was made by the key"):
        state.update_revocations(*read_list(folder), only(keys.public))
    with pytest.raises(SignatureError, match="which may sign patches"):
        state.update_revocations(*read_list(folder), patches_only)
    elsewhere = Policy(keys=(rule(keys.public, "*"), rule(keys.other_public, "else-*")))
    state.update_revocations(*read_list(folder), elsewhere)
    check_trust(patch, material, elsewhere, state)  # not that key's business
    with pytest.raises(Revoked):
        check_trust(patch, material, only(keys.public, keys.other_public), state)
    with pytest.raises(SignatureError, match="was made by the key") as caught:
        revoke(small_patch("v2"), "mine", folder, keys.mine)
    assert "the key that signed this list" in caught.value.hint


@pytest.mark.parametrize("harm", ["gone", "altered", "unsigned"])
def test_a_known_list_that_is_damaged_refuses_everything_until_fetched_again(
    keys: Keys, policy: Policy, state: TrustState, tmp_path: Path, harm: str
) -> None:
    folder, patch = tmp_path / "mirror", small_patch("v1")
    revoke(small_patch("v2"), "bad", folder, keys.mine)
    state.update_revocations(*read_list(folder), policy)
    data, signature = sorted((state.root / "revocations").iterdir())
    if harm == "gone":
        data.unlink()
    elif harm == "altered":
        data.write_bytes(data.read_bytes().replace(b"bad", b"ok!"))
    else:
        signature.write_bytes(sign_list(RevocationList.parse(data.read_bytes(), ""), keys.other)[1])
    with pytest.raises(SignatureError):
        check_trust(patch, signed(patch, keys.mine), policy, TrustState(state.root.parent))
    if harm == "gone":  # the memory of its serial stands guard while it is away
        older = sign_list(RevocationList(serial=0, updated="2020-01-01T00:00:00Z", revoked=()), keys.mine)
        with pytest.raises(SignatureError, match="another with serial 1 was already accepted"):
            state.update_revocations(*older, policy)
    state.update_revocations(*read_list(folder), policy)
    check_trust(patch, signed(patch, keys.mine), policy, state)


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", "x" * 501, "a\x9b31m", "a\u202eb"])
def test_a_reason_is_one_line(keys: Keys, tmp_path: Path, reason: str) -> None:
    with pytest.raises(UsageError, match="the reason is"):
        revoke(small_patch(), reason, tmp_path, keys.mine)
    assert not (tmp_path / "revocations.json").exists()
    fields = {"digest": BASE_A, "name": "n", "version": "v", "date": "2026-07-01T00:00:00Z"}
    with pytest.raises(ValidationError):  # nor may a list that somebody else wrote hold it
        Revocation(reason=reason.strip(" "), **fields)


def test_a_pair_torn_by_a_crash_is_refused(keys: Keys, policy: Policy, state: TrustState, tmp_path: Path) -> None:
    revoke(small_patch("v1"), "bad", tmp_path, keys.mine)
    old = read_list(tmp_path)
    revoke(small_patch("v2"), "bad", tmp_path, keys.mine)
    write_list(tmp_path, read_list(tmp_path)[0], old[1])
    with pytest.raises(SignatureError, match="was changed after signing"):
        state.update_revocations(*read_list(tmp_path), policy)


# Channels


def test_a_channel_file_names_a_patch_until_a_date(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    patch = small_patch("v3")
    channel = channel_for(patch, "stable", timedelta(days=7), now=NOON, revocations=2)
    paths = write_channel(tmp_path, channel, keys.mine)
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["channels/stable.json", "channels/stable.sig"]
    found = verify_channel(*read_channel(tmp_path, "stable"), policy, "stable")
    assert found == channel
    found.check_patch(patch)
    found.check_fresh(NOON + timedelta(days=6), revocations=2)
    assert not found.expired(NOON + timedelta(days=7) - timedelta(seconds=1))
    assert found.expired(NOON + timedelta(days=7))
    with pytest.raises(Expired, match="expired at 2026-07-08T12:00:00Z") as caught:
        found.check_fresh(NOON + timedelta(days=8), revocations=2)
    assert caught.value.exit_status == 3
    with pytest.raises(Expired, match="was issued at"):
        found.check_fresh(NOON - timedelta(hours=1), revocations=2)
    with pytest.raises(SignatureError, match="serves list 1"):
        found.check_fresh(NOON, revocations=1)
    with pytest.raises(SignatureError, match="names a patch with version v3; this one has v2"):
        found.check_patch(small_patch("v2"))


def test_one_channel_does_not_pass_for_another(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    write_channel(tmp_path, channel_for(small_patch(), "canary", timedelta(days=1)), keys.mine)
    data, signature = read_channel(tmp_path, "canary")
    with pytest.raises(SignatureError, match=r"expected exactly stable\.json"):
        verify_channel(data, signature, policy, "stable")
    renamed = sign_files({"stable.json": data}, keys.mine)[0]
    with pytest.raises(SignatureError, match="is that of canary"):
        verify_channel(data, renamed, policy, "stable")
    limited = Policy(keys=(rule(keys.public, "*", may=("patches",)),))
    with pytest.raises(SignatureError, match="may not sign channels"):
        verify_channel(data, signature, limited, "canary")
    as_list = sign_files({"revocations.json": data}, keys.mine)[0]
    with pytest.raises(SignatureError, match="kind: input should be 'nest-runtime-revocations'"):
        verify_list(data, as_list, policy)


def test_channels_that_make_no_sense(tmp_path: Path) -> None:
    for name, valid in (("../up", timedelta(days=1)), ("", timedelta(days=1)), ("stable", timedelta(0))):
        with pytest.raises(UsageError):
            channel_for(small_patch(), name, valid)
    with pytest.raises(UsageError, match="no channel's name"):
        read_channel(tmp_path, "../secret")
    text = channel_for(small_patch(), "stable", timedelta(days=1), now=NOON).to_bytes()
    for change, message in (
        ((b"2026-07-02", b"2026-13-02"), "which no calendar has"),
        ((b"2026-07-02", b"2026-06-02"), "not after issued"),
        ((b'"format":1', b'"format":2'), "format is 2; expected 2 with claims, and 1 without"),
        ((b'"format":1', b'"format":3'), "format: input should be 1 or 2"),
        ((b'"serial":1', b'"serial":1,"serial":1'), "twice"),
        ((b"{", b"{ "), "not in canonical form"),
        ((b'"serial":1', b'"serial":"1"'), "serial: input should be a valid integer"),
    ):
        with pytest.raises(SignatureError, match=message):
            Channel.parse(text.replace(*change, 1), "it")


# The store and the guard


def test_signatures_in_the_store_are_checked_again(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    store, patch = Store(tmp_path / "home"), small_patch()
    path = patch.save(tmp_path / "p.safetensors")
    sign_patch(path, keys.mine)
    assert keep_beside(store, patch, path)
    store.add(patch)
    assert [entry.signed for entry in store.list()] == [True]
    for file in (path, *material_paths(path)):
        file.unlink()
    guard = Guard(policy, store)
    verified = guard.check(store.get("v1"))
    guard.accept(patch, verified, who="ann")
    assert guard.state.highest(BASE_A, "test") == Accepted(1, patch.digest)
    signature = next((store.root / "signatures").rglob("*.sig"))
    signature.write_bytes(signed(small_patch("v2"), keys.mine).signature)
    with pytest.raises(SignatureError, match="was changed after signing"):
        Guard(policy, store).check(store.get("v1"))
    signature.unlink()
    with pytest.raises(SignatureError, match="is not signed"):
        Guard(policy, store).check(store.get("v1"))
    store.remove("v1")
    store.gc()
    assert not list((store.root / "signatures").rglob("*.json"))


def test_a_patch_may_carry_signatures_of_several_keys(keys: Keys, tmp_path: Path) -> None:
    store, patch = Store(tmp_path / "home"), small_patch()
    store.add(patch)
    for key in (keys.mine, keys.other):
        keep_signature(store.root, patch, signed(patch, key))
    for public in (keys.public, keys.other_public):
        assert Guard(only(public), store).check(patch).signed_by == public.id


def test_a_stale_signature_beside_a_file_is_not_taken_in(keys: Keys, tmp_path: Path) -> None:
    store, path = Store(tmp_path / "home"), small_patch("v1").save(tmp_path / "p.safetensors")
    sign_patch(path, keys.mine)
    changed = small_patch("v1", seed=3)
    changed.save(path)
    with pytest.raises(SignatureError, match="it says digest"):
        keep_beside(store, changed, path)
    assert not store.root.exists()


def test_when_a_patch_is_revoked_the_newest_good_one_is_found(keys: Keys, policy: Policy, tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    patches = [small_patch(f"v{n}", seed=n) for n in (1, 2, 3, 4)]
    for patch in patches:
        store.add(patch)
        if patch.version != "v4":  # v4 is not signed
            keep_signature(store.root, patch, signed(patch, keys.mine))
    store.add(small_patch("v9", name="another"))
    guard = Guard(policy, store)
    guard.accept(patches[2], guard.check(patches[2]))
    revoke(patches[2], "bad", tmp_path / "mirror", keys.mine)
    guard.state.update_revocations(*read_list(tmp_path / "mirror"), policy)
    found = guard.newest_good(BASE_A, "test")
    assert found is not None
    assert found[0] == patches[1]
    assert guard.newest_good(BASE_B, "test") is None
