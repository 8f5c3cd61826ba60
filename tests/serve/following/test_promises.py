"""A server that follows tries what a candidate claims of itself, and refuses one whose claims are refuted."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from nest_runtime import load_patch
from nest_runtime.evaluate.cases import digest_of
from nest_runtime.evaluate.contract import suite_digest
from nest_runtime.evaluate.judges import make_judge
from nest_runtime.evaluate.suites import load_suite, sample_cases
from nest_runtime.hub.publish import push, set_channel
from nest_runtime.hub.repository import parse_repo
from nest_runtime.patch.claims import Claim, Claims
from nest_runtime.patch.patch import Patch
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.following.promises import chance
from nest_runtime.serve.limits import FollowConfig
from nest_runtime.store.store import Store
from tests.support.serve import eventually, serving
from tests.support.trust import make_keys, signed

ZERO = "sha256:" + "0" * 64


@given(st.data())
def test_the_chance_of_a_sample(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 200))
    drawn = data.draw(st.integers(1, min(n, 16)))
    hits, limit = data.draw(st.integers(0, drawn)), data.draw(st.integers(0, n)) / n
    low = Claim("plain", ZERO, "asr", limit, 0, n)
    assert chance(low, hits, drawn) == pytest.approx(hypergeom.sf(hits - 1, n, round(limit * n), drawn), abs=1e-9)
    high = Claim("plain", ZERO, "utility", limit, n, n)
    assert chance(high, hits, drawn) == pytest.approx(hypergeom.cdf(hits, n, round(limit * n), drawn), abs=1e-9)


def promising(patch: Patch, suite: str, measure: str, limit: float, *, cases: str = "") -> Patch:
    """A patch that claims to do perfectly on 40 cases of a suite, whatever it does."""
    chosen = sample_cases(load_suite(suite), 40)
    row = Claim(suite, cases or suite_digest(chosen), measure, limit, 40 if measure == "utility" else 0, 40)
    claims = Claims(
        patch=patch.digest,
        judge="reference",
        judge_digest=digest_of(make_judge("reference").identity),
        cases_per_suite=40,
        max_tokens=24,
        date="2026-02-18T12:00:00Z",
        rows=(row,),
    )
    return patch.evolve(claims=claims)


def test_a_candidate_s_claims_are_tried_before_the_switch(tmp_path: Path) -> None:
    keys, store, repo = make_keys(tmp_path / "keys"), Store(tmp_path / "publisher"), parse_repo(f"{tmp_path}/mirror")
    policy = tmp_path / "trust.toml"
    public = tmp_path / "keys" / "release.pub"
    policy.write_text(
        f'format = 1\nrequire_claims = true\n[[keys]]\nname = "k"\nfile = "{public}"\nnames = ["*"]\n',
        encoding="utf-8",
    )
    good, weak = load_patch("v3"), load_patch("v1")

    def point(patch: Patch) -> None:
        push(patch, repo, store=store, material=signed(patch, keys.mine))
        set_channel(repo, "stable", patch.version, store=store, key=keys.mine, valid=timedelta(days=1))

    def version(n: int, of: Patch) -> Patch:
        return of.evolve(version=f"v{n}", serial=n, created="2026-02-18T12:00:00Z")

    held_out = ("jailbreak-held-out", "asr")
    follow = FollowConfig(f"{repo.place}@stable", every=0.3, admission_min_refused=0.0, admission_max_refused=1.0)
    config = ServeConfig(port=0, trust_policy=policy, follow=follow)
    point(promising(version(10, good), *held_out, 0.2))
    with serving(config) as server:

        def active() -> str:
            return server.server.service.table.active.label

        def says(words: str) -> bool:
            return eventually(lambda: words in (server.http("GET", "/ready").json()["follow"]["error"] or ""), 60)

        assert active() == "v10"
        point(promising(version(11, weak), *held_out, 0.0))
        assert says("v11 claims asr on jailbreak-held-out of at most 0; here it is"), server.http("GET", "/ready").text
        assert says("of 16 drawn cases")
        point(version(12, good))
        assert says("v12 carries no claims")
        point(promising(version(13, good), *held_out, 0.2, cases=ZERO))
        assert says("cannot be tried here: its cases are not at hand")
        assert active() == "v10"
        point(promising(version(14, good), *held_out, 0.2))
        assert eventually(lambda: active() == "v14", 60)


def test_a_claim_on_a_part_of_the_trials_is_not_tried() -> None:
    from nest_runtime.serve.following.promises import _samples

    patch = promising(load_patch("v3"), "plain", "asr", 0.2)
    assert patch.claims is not None
    assert len(_samples(patch.claims)[("plain", "asr")]) == 16
    fewer = replace(patch.claims, rows=(replace(patch.claims.rows[0], n=39),))
    assert _samples(fewer) == {}
