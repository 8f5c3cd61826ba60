"""Claims in a patch's header: written, read strictly, and about one content only."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_runtime.errors import DigestMismatch, NestError, PatchFormatError
from nest_runtime.measures import MEASURES
from nest_runtime.patch.algebra import diff
from nest_runtime.patch.claims import Claim, Claims
from nest_runtime.patch.file import from_bytes, read_patch
from nest_runtime.patch.patch import Patch
from nest_runtime.patch.write import to_bytes
from tests.support.patchfile import ONE_HASH, ZERO_HASH, golden_patch, take_apart, with_header

GOLDEN = Path(__file__).parents[1] / "data" / "golden_v2.safetensors"
GOLDEN_DIGEST = "sha256:9bd8b9d6416a731388c734561fff48e07fa18986a07a367569add36d1e269c19"


def claimed(patch: Patch | None = None, **changes: Any) -> Patch:
    """The golden patch with claims of every kind."""
    patch = patch or golden_patch()
    rows = (
        Claim("jailbreak-seen-attacked", "sha256:" + "4" * 64, "asr", 0.125, 3, 40),
        Claim("over-refusal", "sha256:" + "5" * 64, "over_refusal", 0.05, 0, 60),
        Claim("utility", "sha256:" + "6" * 64, "utility", 0.9, 38, 40),
    )
    given: dict[str, Any] = {
        "patch": patch.digest,
        "judge": "reference",
        "judge_digest": "sha256:" + "7" * 64,
        "attacks": ("past-tense", "best-of-n:8"),
        "cases_per_suite": 40,
        "seed": 3,
        "max_tokens": 64,
        "date": "2026-02-18T12:00:00Z",
        "rows": rows,
        **changes,
    }
    return patch.evolve(claims=Claims(**given))


def test_claims_go_into_the_file_and_come_back(tmp_path: Path) -> None:
    patch = claimed()
    again = read_patch(patch.save(tmp_path / "p.safetensors"))
    assert again == patch
    assert again.claims == patch.claims
    assert again.header()["format_version"] == 2
    assert again.digest != golden_patch().digest == again.bare_digest
    assert to_bytes(again) == to_bytes(patch)
    assert pickle.loads(pickle.dumps(patch)) == deepcopy(patch) == patch


def test_the_golden_file_with_claims_is_read_for_ever() -> None:
    assert read_patch(GOLDEN) == claimed()
    assert read_patch(GOLDEN).digest == GOLDEN_DIGEST
    assert GOLDEN.read_bytes() == to_bytes(claimed())


def test_a_patch_without_claims_stays_what_it_was() -> None:
    assert golden_patch().header()["format_version"] == 1
    assert "claims" not in golden_patch().header()


@pytest.mark.parametrize("change", [{"version": "v9"}, {"serial": 9}, {"sites": golden_patch().sites[:1]}])
def test_claims_do_not_pass_to_other_content(change: dict[str, Any]) -> None:
    assert claimed().evolve(**change).claims is None
    with pytest.raises(PatchFormatError, match="about"):
        claimed().evolve(**change, claims=claimed().claims)
    assert claimed().evolve().claims is not None


def test_a_file_that_carries_another_patch_s_claims_is_refused() -> None:
    header = claimed().header()["claims"]
    other = to_bytes(golden_patch().evolve(version="v9"))
    with pytest.raises(PatchFormatError, match="claims are about"):
        from_bytes(with_header(other, format_version=2, claims=header))


def test_diff_shows_claims_that_came_or_went() -> None:
    for old, new in ((golden_patch(), claimed()), (claimed(), golden_patch())):
        found = diff(old, new)["header"]
        assert set(found) == {"claims", "format_version"}
        assert None in found["claims"].values()


@pytest.mark.parametrize(
    ("version", "claims", "words"),
    [
        (1, "same", "unknown field 'claims'"),
        (2, ..., "missing field 'claims'"),
        (2, None, "claims is a NoneType"),
        (2, [], "claims is a list"),
        (3, "same", "format version 3"),
    ],
)
def test_claims_stand_in_version_2_and_nowhere_else(version: int, claims: Any, words: str) -> None:
    value = claimed().header()["claims"] if claims == "same" else claims
    with pytest.raises(PatchFormatError, match=words):
        from_bytes(with_header(to_bytes(claimed()), format_version=version, claims=value))


def _row(**changes: Any) -> dict[str, Any]:
    return {"suite": "plain", "cases": ZERO_HASH, "measure": "asr", "limit": 0.1, "hits": 1, "n": 10, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch": "v3"}, "patch is"),
        ({"judge": ""}, "judge is"),
        ({"judge": "a\nb"}, "judge is"),
        ({"judge": "x" * 256}, "judge is"),
        ({"judge": "\ud800"}, "Unicode"),
        ({"judge_digest": ZERO_HASH.upper()}, "judge_digest is"),
        ({"attacks": ["a", "a"]}, "each once"),
        ({"attacks": "all"}, "lists"),
        ({"attacks": [str(i) for i in range(65)]}, "at most 64"),
        ({"attacks": [1]}, "attacks is 1"),
        ({"cases_per_suite": 0}, "cases_per_suite is 0"),
        ({"cases_per_suite": True}, "cases_per_suite is True"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 2**16 + 1}, "max_tokens is 65537"),
        ({"date": ""}, "date is"),
        ({"date": "2026-02-18T12:00:00+02:00"}, "date is"),
        ({"rows": []}, "0 rows"),
        ({"rows": {}}, "lists"),
        ({"rows": [1]}, "a row is a int"),
        ({"rows": [_row(), _row()]}, "each once"),
        ({"rows": [_row(suite="b"), _row(suite="a")]}, "in order"),
        ({"rows": [_row(), _row(measure="utility", hits=9, limit=0.5, cases=ONE_HASH)]}, "two digests"),
        ({"rows": [_row(limit=0)]}, "limit is 0"),
        ({"rows": [_row(limit=-0.0, hits=0)]}, "limit is -0.0"),
        ({"rows": [_row(limit=1.5)]}, "limit is 1.5"),
        ({"rows": [_row(limit=True)]}, "limit is True"),
        ({"rows": [_row(limit="0.1")]}, "limit is '0.1'"),
        ({"rows": [_row(hits=11)]}, "hits is 11"),
        ({"rows": [_row(hits=0, n=0)]}, "n is 0"),
        ({"rows": [_row(hits=2)]}, "asr was 0.2000, which is not at most 0.1"),
        ({"rows": [_row(measure="utility", hits=0)]}, "not at least 0.1"),
        ({"rows": [_row(measure="kindness")]}, "measure is 'kindness'"),
        ({"rows": [_row(measure=[])]}, "measure is"),
        ({"rows": [_row(suite="\u2028")]}, "suite is"),
        ({"rows": [_row(extra=1)]}, "unknown field 'extra'"),
        ({"rows": [{"suite": "plain"}]}, "lacks the field 'cases'"),
        ({"more": 1}, "unknown field 'more'"),
    ],
)
def test_claims_that_break_a_rule_are_refused(changes: dict[str, Any], words: str) -> None:
    value = {**claimed().header()["claims"], **changes}
    with pytest.raises(PatchFormatError, match=words) as caught:
        Claims.parse(value)
    assert caught.value.hint
    if changes != {"judge": "\ud800"}:  # which no file can hold
        with pytest.raises(PatchFormatError, match=words):
            from_bytes(with_header(to_bytes(claimed()), claims=value))


_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=12)
_DIGEST = st.integers(0, 2**256 - 1).map(lambda number: f"sha256:{number:064x}")


@st.composite
def contracts(draw: st.DrawFn) -> Claims:
    rows = []
    for suite in sorted(draw(st.sets(_TEXT, min_size=1, max_size=4))):
        cases = draw(_DIGEST)
        for measure in sorted(draw(st.sets(st.sampled_from(list(MEASURES)), min_size=1))):
            n = draw(st.integers(1, 10**6))
            hits = draw(st.integers(0, n))
            ends = (hits / n, 1.0) if MEASURES[measure].lower_is_better else (0.0, hits / n)
            rows.append(Claim(suite, cases, measure, draw(st.floats(*ends).map(abs)), hits, n))
    return Claims(
        patch=golden_patch().digest,
        judge=draw(_TEXT),
        judge_digest=draw(_DIGEST),
        attacks=tuple(draw(st.lists(_TEXT, unique=True, max_size=3))),
        cases_per_suite=draw(st.none() | st.integers(1, 2**53)),
        seed=draw(st.integers(0, 2**53)),
        max_tokens=draw(st.integers(1, 2**16)),
        date="2026-02-18T12:00:00Z",
        rows=tuple(rows),
    )


@settings(max_examples=150, deadline=None)
@given(contracts())
def test_any_contract_survives_the_file(claims: Claims) -> None:
    patch = golden_patch().evolve(claims=claims)
    data = to_bytes(patch)
    assert from_bytes(data) == patch
    assert from_bytes(data).claims == claims
    assert Claims.parse(json.loads(json.dumps(claims.to_json()))) == claims


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=4) | _DIGEST,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def broken(draw: st.DrawFn) -> Any:
    """A contract with one value replaced, left out or added, anywhere."""
    value = draw(contracts()).to_json()
    place: Any = value if draw(st.booleans()) else draw(st.sampled_from(value["rows"]))
    key = draw(st.sampled_from(sorted(place)) | st.text(max_size=6))
    if draw(st.booleans()):
        place.pop(key, None)
    else:
        place[key] = draw(_ANY)
    return value


@settings(max_examples=300, deadline=None)
@given(broken() | _ANY)
def test_anything_else_is_a_contract_or_a_refusal(value: Any) -> None:
    try:
        found: Claims | PatchFormatError = Claims.parse(value)
    except PatchFormatError as error:
        found = error
    if isinstance(found, Claims):
        assert found.to_json() == value
    else:
        assert found.message.startswith("claims: ")
        assert found.hint


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_byte_of_the_claims_can_change_unseen(data: st.DataObject) -> None:
    file = to_bytes(claimed())
    text = take_apart(file)[0]["__metadata__"]["nest_patch"]
    start = file.index(b'\\"claims\\":')
    assert '"claims":' in text
    at = data.draw(st.integers(start, start + 900))
    flipped = bytearray(file)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(NestError) as caught:
        from_bytes(bytes(flipped))
    assert isinstance(caught.value, PatchFormatError | DigestMismatch)
