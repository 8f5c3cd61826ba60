"""Claims where they are demanded: channels, followers, policies and admission tests take no patch that falls short."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.errors import ClaimsRefused, SignatureError, TrustError, UsageError
from nest_runtime.hub.channels import Channel, channel_for, read_channel, verify_channel, write_channel
from nest_runtime.hub.demands import Demands, check_met, demands_of
from nest_runtime.hub.publish import push, set_channel
from nest_runtime.hub.repository import RepoRef, parse_repo
from nest_runtime.patch.claims import Claim, Claims
from nest_runtime.patch.patch import Patch
from nest_runtime.store.store import Store
from nest_runtime.trust.check import check_trust
from nest_runtime.trust.policy import Policy, read_policy
from tests.abuse.conftest import Run, refused
from tests.support.store import BASE_A, small_patch
from tests.support.trust import Keys, only, signed

MONTH = timedelta(days=30)


def claiming(patch: Patch, **changes: Any) -> Patch:
    """A patch with claims on two suites; ``limits`` are of the first one's asr and the second one's over-refusal."""
    asr, over = changes.pop("limits", (0.1, 0.2))
    rows = (
        Claim("borderline", "sha256:" + "b" * 64, "over_refusal", over, 0, 50),
        Claim("plain", "sha256:" + "a" * 64, "asr", asr, 0, 50),
    )
    given: dict[str, Any] = {
        "patch": patch.digest,
        "judge": "phrases",
        "judge_digest": "sha256:" + "c" * 64,
        "max_tokens": 16,
        "date": "2026-02-18T12:00:00Z",
        "rows": rows,
        **changes,
    }
    return patch.evolve(claims=Claims(**given))


class Proof:
    """Measures nothing, and remembers what it was asked to; fails for the digests that it is told."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.asked = failing, []  # type: ignore[var-annotated]

    def __call__(self, patch: Patch) -> None:
        self.asked.append(patch.version)
        if patch.digest in self.failing:
            raise ClaimsRefused(f"1 of 2 claims of {patch.name}@{patch.version} do not hold", "measure")


@pytest.fixture
def repo(tmp_path: Path) -> RepoRef:
    return parse_repo(str(tmp_path / "mirror"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "publisher")


def put(repo: RepoRef, store: Store, keys: Keys, patch: Patch, channel: str = "", **options: Any) -> Channel | None:
    push(patch, repo, store=store, material=signed(patch, keys.mine))
    return set_channel(repo, channel, patch.version, store=store, key=keys.mine, **options)[0] if channel else None


# The document.


def test_a_channel_s_demand_is_inside_what_is_signed(tmp_path: Path, keys: Keys) -> None:
    patch = claiming(small_patch("v1"))
    assert patch.claims is not None
    demanding = channel_for(patch, "stable", MONTH, claims=demands_of(patch.claims))
    path, signature = write_channel(tmp_path, demanding, keys.mine)
    policy = only(keys.public)
    found = verify_channel(*read_channel(tmp_path, "stable"), policy, "stable")
    assert (found.format, found.claims) == (2, demands_of(patch.claims))
    document = json.loads(path.read_text(encoding="utf-8"))
    for change in ({"claims": None}, {"format": 1}, {"claims": {**document["claims"], "judge": "local"}}):
        path.write_text(json.dumps({**document, **change}, sort_keys=True, separators=(",", ":")) + "\n")
        with pytest.raises(SignatureError):
            verify_channel(path.read_bytes(), signature.read_bytes(), policy, "stable")


def test_a_channel_without_a_demand_stays_as_it_was() -> None:
    plain = channel_for(small_patch("v1"), "stable", MONTH)
    assert b"claims" not in plain.to_bytes()
    assert Channel.parse(plain.to_bytes(), "it") == plain
    with pytest.raises(ValueError, match="format is 2; expected"):
        Channel(**{**plain.model_dump(), "format": 2})


@pytest.mark.parametrize("limit", [-0.1, 1.1, "0.1", float("nan"), float("inf"), None, True])
def test_a_demand_that_is_none_is_refused(limit: Any) -> None:
    row = {"suite": "plain", "cases": BASE_A, "measure": "asr", "limit": limit}
    with pytest.raises(ValueError, match="limit"):
        Demands(judge="local", judge_digest=BASE_A, rows=(row,))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, "carries none"),
        ({"limits": (0.1001, 0.2)}, "claims at most 0.1001"),
        ({"limits": (0.1, 1.0)}, "claims at most 1"),
        ({"judge": "local"}, "judged by phrases"),
        ({"judge_digest": "sha256:" + "d" * 64}, "judged by phrases"),
        ("another suite", "claims nothing of it"),
        ("same name, other cases", "claims nothing of it"),
        ("fewer rows", "claims nothing of it"),
    ],
)
def test_claims_that_fall_short_of_a_demand(changes: Any, words: str) -> None:
    bar = claiming(small_patch("v1"))
    assert bar.claims is not None
    demands, patch = demands_of(bar.claims), small_patch("v2")
    rows = list(bar.claims.rows)
    if changes == "another suite":
        rows[1] = replace(rows[1], suite="zebra", cases="sha256:" + "e" * 64)
        changes = {"rows": tuple(rows)}
    elif changes == "same name, other cases":
        changes = {"rows": (rows[0], replace(rows[1], cases="sha256:" + "e" * 64))}
    elif changes == "fewer rows":
        changes = {"rows": tuple(rows[:1])}
    candidate = patch if changes is None else claiming(patch, **changes)
    with pytest.raises(ClaimsRefused, match=words):
        check_met(candidate, demands, "channel stable")
    assert ClaimsRefused("").exit_status == 3
    check_met(claiming(patch, limits=(0.0, 0.1)), demands, "channel stable")


# Publishing.


def test_a_channel_that_demands_claims_takes_no_patch_without(repo: RepoRef, store: Store, keys: Keys) -> None:
    proof = Proof()
    first = put(repo, store, keys, claiming(small_patch("v1", seed=1)), "stable", demand=True, prove=proof)
    assert first is not None
    assert first.claims is not None
    with pytest.raises(ClaimsRefused, match="carries none"):
        put(repo, store, keys, small_patch("v2", seed=2), "stable", prove=proof)
    with pytest.raises(ClaimsRefused, match=r"claims at most 0\.5"):
        put(repo, store, keys, claiming(small_patch("v3", seed=3), limits=(0.5, 0.2)), "stable", prove=proof)
    good = claiming(small_patch("v4", seed=4), limits=(0.05, 0.2))
    with pytest.raises(ClaimsRefused, match="do not hold"):
        put(repo, store, keys, good, "stable", prove=Proof(good.digest))
    with pytest.raises(ClaimsRefused, match="were not measured"):
        put(repo, store, keys, good, "stable")
    second = put(repo, store, keys, good, "stable", prove=proof)
    assert second is not None
    assert (second.version, second.claims) == ("v4", first.claims)  # the bar stays where it was
    assert proof.asked == ["v1", "v4"]


def test_a_demand_is_raised_and_lifted_by_word_only(repo: RepoRef, store: Store, keys: Keys) -> None:
    proof = Proof()
    put(repo, store, keys, claiming(small_patch("v1", seed=1)), "stable", demand=True, prove=proof)
    stricter = put(
        repo, store, keys, claiming(small_patch("v2", seed=2), limits=(0.0, 0.1)), "stable", demand=True, prove=proof
    )
    assert stricter is not None
    assert stricter.claims is not None
    assert stricter.claims.rows[1].limit == 0.0
    weaker = claiming(small_patch("v3", seed=3))
    with pytest.raises(ClaimsRefused, match=r"demands over_refusal .* of at most 0\.1; test@v3 claims at most 0\.2"):
        put(repo, store, keys, weaker, "stable", demand=True, prove=proof)  # a new bar must clear the old one
    lifted = put(repo, store, keys, weaker, "stable", demand=False)
    assert lifted is not None
    assert (lifted.format, lifted.claims) == (1, None)


def test_a_file_is_renewed_without_measuring_if_it_is_one_s_own(repo: RepoRef, store: Store, keys: Keys) -> None:
    proof = Proof()
    put(repo, store, keys, claiming(small_patch("v1")), "stable", demand=True, prove=proof)
    put(repo, store, keys, claiming(small_patch("v1")), "stable", prove=proof)
    assert proof.asked == ["v1"]
    set_channel(repo, "stable", "v1", store=store, key=keys.other, prove=proof)  # another's word is nothing to go by
    assert proof.asked == ["v1", "v1"]


def test_a_forged_file_of_one_s_own_key_is_not_gone_by(repo: RepoRef, store: Store, keys: Keys) -> None:
    """Whoever keeps the mirror takes the demand out of the file, and leaves the signature."""
    put(repo, store, keys, claiming(small_patch("v1", seed=1)), "stable", demand=True, prove=Proof())
    path = Path(repo.place) / "channels" / "stable.json"
    forged = {**json.loads(path.read_text(encoding="utf-8")), "format": 1}
    del forged["claims"]
    path.write_text(json.dumps(forged, sort_keys=True, separators=(",", ":")) + "\n", encoding="utf-8")
    with pytest.raises(SignatureError, match="changed after signing"):
        put(repo, store, keys, small_patch("v2", seed=2), "stable", prove=Proof())


def test_push_refuses_before_anything_is_sent(run: Run, home: Path, tmp_path: Path, keys: Keys) -> None:
    mirror = tmp_path / "mirror"
    bare = small_patch("v1").save(tmp_path / "bare.safetensors")
    words = ("push", bare, f"{mirror}/", "--key", keys.mine, "--channel", "stable")
    refused(run(*words, "--demand-claims"), 3, "carries no claims that channel stable")
    assert not (mirror / "channels").exists()
    assert not list(mirror.rglob("*.safetensors"))
    refused(run("push", bare, f"{mirror}/", "--key", keys.mine, "--demand-claims"), 2, "--channel")
    assert run(*words).status == 0  # a channel that demands nothing


# Those who follow, and policies.


def test_a_follower_takes_no_patch_that_falls_short(
    run: Run, home: Path, tmp_path: Path, keys: Keys, repo: RepoRef, store: Store
) -> None:
    """A tool that knows nothing of demands, or a key that is misused, points the demanding channel elsewhere."""
    bar = claiming(small_patch("v1", seed=1))
    put(repo, store, keys, bar, "stable", demand=True, prove=Proof())
    bare = small_patch("v2", seed=2)
    put(repo, store, keys, bare)
    assert bar.claims is not None
    write_channel(Path(repo.place), channel_for(bare, "stable", MONTH, claims=demands_of(bar.claims)), keys.mine)
    public = keys.mine.with_suffix(".pub")
    refused(run("pull", f"{repo.place}@stable", "--trust", public), 3, "channel stable demands claims", "carries none")


def test_a_policy_asks_for_claims(tmp_path: Path, keys: Keys) -> None:
    policy = Policy(**{**only(keys.public).model_dump(), "require_claims": True})
    bare, good = small_patch("v1"), claiming(small_patch("v1"))
    with pytest.raises(ClaimsRefused, match="the trust policy asks for them"):
        check_trust(bare, signed(bare, keys.mine), policy)
    assert check_trust(good, signed(good, keys.mine), policy).digest == good.digest
    with pytest.raises(SignatureError):  # claims stand in for no signature
        check_trust(good, None, policy)


@pytest.mark.parametrize("value", ["yes", '"true"', "1", "[]"])
def test_a_policy_that_asks_unclearly_is_refused(tmp_path: Path, value: str) -> None:
    file = tmp_path / "trust.toml"
    file.write_text(f"format = 1\nrequire_signature = false\nrequire_claims = {value}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"require_claims|TOML"):
        read_policy(file)


def test_a_policy_that_asks_for_claims_holds_at_every_door(run: Run, home: Path, tmp_path: Path, keys: Keys) -> None:
    key = keys.mine.with_suffix(".pub")
    (home / "trust.toml").write_text(
        f'format = 1\nrequire_claims = true\n[[keys]]\nname = "k"\nfile = "{key}"\nnames = ["*"]\n', encoding="utf-8"
    )
    bare = small_patch("v1").save(tmp_path / "bare.safetensors")
    good = claiming(small_patch("v2")).save(tmp_path / "good.safetensors")
    for file in (bare, good):
        assert run("sign", file, "--key", keys.mine).status == 0
    refused(run("verify", bare), 3, "carries no claims")
    refused(run("activate", bare), 3, "carries no claims")
    assert run("activate", good).status == 0
    assert isinstance(ClaimsRefused("x"), TrustError)
