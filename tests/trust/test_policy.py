"""Trust policies, and the memory that refuses older patches than those accepted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nest_runtime.errors import (
    Downgrade,
    SignatureError,
    StoreError,
    UsageError,
)
from nest_runtime.patch.patch import Patch
from nest_runtime.trust.check import check_trust, remember
from nest_runtime.trust.policy import KeyRule, Policy, policy_for, read_policy
from nest_runtime.trust.state import Accepted, TrustState
from tests.support.store import BASE_A, BASE_B, small_patch
from tests.support.trust import Keys, make_keys, only, rule, signed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def policy(keys: Keys) -> Policy:
    return only(keys.public)


@pytest.fixture
def state(tmp_path: Path) -> TrustState:
    return TrustState(tmp_path / "home")


# Policies


def write_policy(folder: Path, text: str, name: str = "trust.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def test_a_policy_file(keys: Keys, tmp_path: Path) -> None:
    (tmp_path / "release.pub").write_bytes(keys.public.pem)
    policy = read_policy(
        write_policy(
            tmp_path,
            """
            on_revoked = "stop"
            [[keys]]
            name = "release"
            file = "release.pub"
            names = ["reference-*", "demo"]
            may = ["patches"]
            [minimum_serial]
            "reference-*" = 3
            "reference-safety" = 5
            """,
        )
    )
    assert (policy.require_signature, policy.on_revoked) == (True, "stop")
    assert policy.public_keys == (keys.public,)
    found = policy.rule_of(keys.public.id)
    assert found is not None
    assert [found.allows("patches", name) for name in ("reference-x", "demo", "demo2", "Demo")] == [
        True,
        True,
        False,
        False,
    ]
    assert not found.allows("revocations", "demo")
    assert [policy.floor(name) for name in ("reference-x", "reference-safety", "demo")] == [3, 5, 0]
    as_json = {**policy.model_dump(mode="json")}
    assert read_policy(write_policy(tmp_path, json.dumps(as_json), "trust.json")) == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = 2", "format: input should be 1"),
        ("require = true", "require is no field"),
        ('require_signature = "yes"', "require_signature: input should be a valid boolean"),
        ("require_signature = true", "keys is empty"),
        ('on_revoked = "base"', "on_revoked: input should be 'newest-good' or 'stop'"),
        ("require_signature = false\n[minimum_serial]\nx = -1", r"minimum_serial\.x: input should be greater"),
        ('require_signature = false\n[minimum_serial]\nx = "3"', r"minimum_serial\.x: input should be a valid int"),
        ('[[keys]]\nname = "a"\nnames = ["*"]', r"keys\[0\]\.file is missing"),
        ('[[keys]]\nname = "a"\nfile = "no.pub"\nnames = ["*"]', r"keys\[0\]\.file: the key .* cannot be read"),
        ('[[keys]]\nname = "a"\nfile = "release.pub"', r"keys\[0\]\.names is missing"),
        ('[[keys]]\nname = "a"\nfile = "release.pub"\nnames = []', r"keys\[0\]\.names: tuple should have at least 1"),
        ('[[keys]]\nname = "a"\nfile = "release.pub"\nnames = ["*"]\nmay = ["all"]', r"keys\[0\]\.may\[0\]: input"),
        ('[[keys]]\nname = "a"\npem = "x"\nnames = ["*"]', "the key 'a' holds no public key"),
        ('[[keys]]\nname = "a"\nfile = "release.pub"\nnames = ["*"]\n' * 2, "the name 'a' appears twice"),
        (
            '[[keys]]\nname = "a"\nfile = "release.pub"\nnames = ["*"]\n'
            '[[keys]]\nname = "b"\nfile = "release.pub"\nnames = ["*"]',
            r"keys\[1\] is the same key as keys\[0\]",
        ),
        ("= 1", "is not TOML"),
    ],
)
def test_a_wrong_policy_names_the_field(keys: Keys, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "release.pub").write_bytes(keys.public.pem)
    with pytest.raises(UsageError, match=message) as caught:
        read_policy(write_policy(tmp_path, text))
    assert "trust.toml" in caught.value.message or "the key 'a'" in caught.value.message


def test_the_policy_of_a_commands_options(keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEST_HOME", str(tmp_path / "home"))
    public = keys.mine.with_suffix(".pub")
    assert policy_for() is None
    lax = policy_for([public])
    assert lax is not None
    assert not lax.require_signature
    strict = policy_for([public], require_signature=True)
    assert strict is not None
    assert strict.require_signature
    with pytest.raises(UsageError, match="no key is trusted"):
        policy_for(require_signature=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "other.pub").write_bytes(keys.other_public.pem)
    write_policy(tmp_path / "home", '[[keys]]\nname = "other"\nfile = "other.pub"\nnames = ["x"]')
    both = policy_for([public])
    assert both is not None
    assert both.require_signature
    assert [(r.name, r.names) for r in both.keys] == [("other", ("x",)), ("release", ("*",))]


def test_a_key_signs_the_names_and_purposes_it_is_trusted_with(keys: Keys) -> None:
    patch = small_patch(name="payments")
    material = signed(patch, keys.mine)
    for fields in ({"names": ("reference-*",)}, {"names": ("*",), "may": ("revocations",)}):
        policy = Policy(keys=(KeyRule(name="r", pem=keys.public.pem.decode(), **fields),))
        with pytest.raises(SignatureError, match="payments@v1 is signed by r, which may sign"):
            check_trust(patch, material, policy)
    assert check_trust(patch, material, Policy(keys=(rule(keys.public, "pay*"),))).key == "release"


# Downgrades


def test_a_lower_serial_is_refused_unless_going_back_is_meant(keys: Keys, policy: Policy, state: TrustState) -> None:
    patches = {v: small_patch(v, seed=int(v[1])) for v in ("v1", "v2", "v3")}
    material = {v: signed(p, keys.mine) for v, p in patches.items()}
    for version in ("v1", "v3"):
        remember(check_trust(patches[version], material[version], policy, state), state, who="ann")
    check_trust(patches["v3"], material["v3"], policy, state)  # again: no downgrade
    with pytest.raises(Downgrade, match=r"test@v2 has serial 2; 3 was already accepted"):
        check_trust(patches["v2"], material["v2"], policy, TrustState(state.root.parent))
    allowed = check_trust(patches["v2"], material["v2"], policy, state, allow_downgrade=True)
    assert allowed.before == Accepted(3, patches["v3"].digest)
    assert state.highest(BASE_A, "test") == Accepted(3, patches["v3"].digest)  # a check changes nothing
    remember(allowed, state, who="ann", why="v3 refuses recipes")
    assert state.highest(BASE_A, "test") == Accepted(2, patches["v2"].digest)
    check_trust(patches["v2"], material["v2"], policy, state)  # a restart finds it in order
    last = state.history()[-1]
    assert (last["what"], last["who"], last["why"], last["before"], last["serial"]) == (
        "downgrade",
        "ann",
        "v3 refuses recipes",
        3,
        2,
    )


def test_serials_are_counted_per_model_and_name(keys: Keys, policy: Policy, state: TrustState) -> None:
    def accept(patch: Patch) -> None:
        remember(check_trust(patch, signed(patch, keys.mine), policy, state), state)

    accept(small_patch("v5"))
    accept(small_patch("v1", base=BASE_B))
    accept(small_patch("v1", name="another"))
    with pytest.raises(Downgrade):
        accept(small_patch("v1"))


def test_one_serial_stands_for_one_content(keys: Keys, policy: Policy, state: TrustState) -> None:
    one, two = small_patch("v2"), small_patch("v2b", serial=2, seed=5)
    remember(check_trust(one, signed(one, keys.mine), policy, state), state)
    with pytest.raises(Downgrade, match="under the same serial"):
        check_trust(two, signed(two, keys.mine), policy, state)


def test_the_policys_minimum_stands_whatever_is_allowed(keys: Keys, state: TrustState) -> None:
    policy = Policy(keys=(rule(keys.public, "*"),), minimum_serial={"te*": 2})
    patch = small_patch("v1")
    with pytest.raises(Downgrade, match="asks for 2 or more"):
        check_trust(patch, signed(patch, keys.mine), policy, state, allow_downgrade=True)


def test_an_unsigned_patch_moves_no_memory(keys: Keys, state: TrustState) -> None:
    lax = Policy(keys=(rule(keys.public, "*"),), require_signature=False)
    remember(check_trust(small_patch("v9"), None, lax, state), state)
    assert state.highest(BASE_A, "test") is None


def test_a_race_between_check_and_acceptance_is_lost_by_the_lower(
    keys: Keys, policy: Policy, state: TrustState
) -> None:
    low, high = small_patch("v1"), small_patch("v2", seed=2)
    checked = check_trust(low, signed(low, keys.mine), policy, state)
    remember(check_trust(high, signed(high, keys.mine), policy, state), state)
    with pytest.raises(Downgrade):
        remember(checked, state)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 2}', '{"format": 1, "accepted": {"a": {"b": [["x", 1]]}}, "lists": {}}']
)
def test_a_damaged_memory_is_no_empty_memory(keys: Keys, policy: Policy, state: TrustState, text: str) -> None:
    state.root.mkdir(parents=True)
    (state.root / "state.json").write_text(text)
    patch = small_patch()
    with pytest.raises(StoreError, match=r"state\.json cannot be read"):
        check_trust(patch, signed(patch, keys.mine), policy, state)


def test_many_processes_accept_at_once_and_the_highest_stays(tmp_path: Path) -> None:
    code = (
        "import sys; from nest_runtime.trust.state import TrustState, Accepted; s = TrustState(sys.argv[1])\n"
        "for n in range(int(sys.argv[2]), 20, 2):\n"
        "    s.accept('b', f'n{n}', Accepted(n, 'd'))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([*command, str(start)], env=environment) for start in (0, 1)]
    assert [process.wait(120) for process in running] == [0, 0]
    state = TrustState(tmp_path)
    assert [state.highest("b", f"n{n}") for n in range(20)] == [Accepted(n, "d") for n in range(20)]
    assert len(state.history()) == 20
