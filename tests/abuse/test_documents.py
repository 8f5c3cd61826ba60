"""Documents that say more than their key may say: revocations, channels, tags, signatures."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nest_runtime.hub.channels import channel_for, write_channel
from nest_runtime.hub.fetch import Fetched
from nest_runtime.hub.follow import Follower, FollowHost
from nest_runtime.patch.file import read_patch
from nest_runtime.patch.patch import Patch
from nest_runtime.store.store import Store
from nest_runtime.trust.documents import stamp
from nest_runtime.trust.guard import guard_for
from nest_runtime.trust.material import material_paths
from nest_runtime.trust.revocations import Revocation, RevocationList, sign_list, write_list
from tests.abuse.conftest import Result, Run, refused
from tests.support.store import BASE_A, small_patch
from tests.support.trust import Keys

NOW = datetime.now(UTC)


def policy(home: Path, keys: Keys, other_may: str = '["patches", "channels", "revocations"]') -> None:
    """The release key for ``test*``; the other one for ``other-*`` alone."""
    (home / "trust.toml").write_text(
        f'[[keys]]\nname = "release"\nfile = "{keys.mine.with_suffix(".pub")}"\nnames = ["test*"]\n'
        f'[[keys]]\nname = "other"\nfile = "{keys.other.with_suffix(".pub")}"\nnames = ["other-*"]\nmay = {other_may}\n'
    )


def publish_list(folder: Path, key: Path, patch: Patch, name: str, serial: int = 1) -> None:
    """A signed list with one patch's digest under a name."""
    entry = Revocation(digest=patch.digest, name=name, version=patch.version, reason="made up", date=stamp(NOW))
    folder.mkdir(parents=True, exist_ok=True)
    write_list(folder, *sign_list(RevocationList(serial=serial, updated=stamp(NOW), revoked=(entry,)), key))


def test_a_strangers_list_takes_no_protection_off(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], tmp_path: Path
) -> None:
    """The digest of v3 under a name that the key may speak for: v3 is not revoked, and still stands in v2's way."""
    policy(home, keys)
    for version in ("v2", "v3"):
        assert run("sign", files[version], "--key", keys.mine).status == 0
    assert run("activate", files["v3"]).status == 0
    publish_list(tmp_path / "news", keys.other, read_patch(files["v3"]), "other-safety")
    assert run("revocations", tmp_path / "news").status == 0
    assert run("verify", "v3").status == 0
    refused(run("activate", files["v2"]), 3, "serial 2; 3 was already accepted")


def test_a_list_counts_for_the_patch_that_it_names(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], tmp_path: Path
) -> None:
    """A key trusted with every name: the digest of v3 as another patch's revokes nothing, and permits nothing."""
    (home / "trust.toml").write_text(
        f'[[keys]]\nname = "release"\nfile = "{keys.mine.with_suffix(".pub")}"\nnames = ["*"]\n'
    )
    for version in ("v2", "v3"):
        run("sign", files[version], "--key", keys.mine)
    assert run("activate", files["v3"]).status == 0
    publish_list(tmp_path / "news", keys.mine, read_patch(files["v3"]), "another")
    assert run("revocations", tmp_path / "news").status == 0
    assert run("verify", "v3").status == 0
    refused(run("activate", files["v2"]), 3, "serial 2; 3 was already accepted")


def test_a_strangers_list_revokes_nothing_of_others_in_a_repository(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], tmp_path: Path
) -> None:
    """Neither on pull, nor does its high serial hide that the publisher's own list is withheld."""
    place = tmp_path / "mirror"
    assert run("push", files["v1"], place, "--key", keys.mine).status == 0
    policy(home, keys)
    publish_list(place, keys.other, read_patch(files["v1"]), "other-safety", serial=9)
    assert run("pull", f"{place}@v1").status == 0
    told = channel_for(read_patch(files["v1"]), "stable", timedelta(days=1), revocations=3)
    write_channel(place, told, keys.mine)
    refused(run("channel", "show", place, "stable"), 3, "withholds revocations")
    refused(run("pull", f"{place}@stable"), 3, "withholds revocations")


def test_what_a_key_may_not_say_is_not_shown_as_revoked(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], tmp_path: Path
) -> None:
    policy(home, keys)
    publish_list(tmp_path / "news", keys.other, read_patch(files["v3"]), "test")
    assert run("revocations", tmp_path / "news", "--json").document["revocations"] == []


def research(keys: Keys, place: Path, run: Run, tmp_path: Path) -> None:
    """The mirror as its keeper changes it: the same publisher's research patch, signed, in place of the safety one."""
    patch = small_patch("v9", name="test-research", seed=9)
    file = patch.save(tmp_path / "research.safetensors")
    elsewhere = tmp_path / "elsewhere"
    assert run("push", file, elsewhere, "--key", keys.mine, "--channel", "stable").status == 0
    shutil.copytree(elsewhere, place, dirs_exist_ok=True)


def test_another_patch_under_a_known_place(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], tmp_path: Path
) -> None:
    """Signed by the right key, for the right base, and newer: but what this place holds is known by its name."""
    policy(home, keys)
    place = tmp_path / "mirror"
    assert run("push", files["v1"], place, "--key", keys.mine, "--channel", "stable").status == 0
    for reference in ("stable", "test@stable", "test@v1"):
        assert run("pull", f"{place}@{reference}").status == 0, reference
    refused(run("pull", f"{place}@other-safety@stable"), 3, "called test", "expected other-safety")
    research(keys, place, run, tmp_path)
    for reference in ("@stable", "@v9", "", "@test@stable"):
        refused(run("pull", f"{place}{reference}"), 3, "test-research", "test")
    assert run("pull", f"{place}@test-research@stable").status == 0  # somebody says that it is meant
    assert run("pull", f"{place}@stable").status == 0  # and from then on that name is the place's


def test_a_name_in_a_reference_holds_on_a_fresh_machine(run: Run, home: Path, keys: Keys, tmp_path: Path) -> None:
    place = tmp_path / "mirror"
    place.mkdir()
    research(keys, place, run, tmp_path)
    shutil.rmtree(home)
    home.mkdir()
    policy(home, keys)
    refused(run("pull", f"{place}@test-safety@stable"), 3, "test-research")
    refused(run("pull", f"{place}@test-safety@v9"), 3, "test-research")


@pytest.mark.parametrize("reference", ["@stable", "@test@stable"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_follower_is_not_led_to_another_patch(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], tmp_path: Path, reference: str, restarted: bool
) -> None:
    policy(home, keys)
    place, store = tmp_path / "mirror", Store(home)
    assert run("push", files["v1"], place, "--key", keys.mine, "--channel", "stable").status == 0
    on: list[Patch] = []

    class Host(FollowHost):
        def active_digest(self) -> str | None:
            return on[-1].digest if on else None

        def switch(self, fetched: Fetched) -> None:
            on.append(fetched.patch)

    def follower() -> Follower:
        return Follower(
            f"{place}{reference}",
            base_hash=BASE_A,
            store=store,
            host=Host(),
            guard=guard_for(store),
        )

    first = follower()
    assert first.poll().kind == "switched"
    research(keys, place, run, tmp_path)
    outcome = (follower() if restarted else first).poll()
    assert outcome.kind == "refused"
    assert "test-research" in str(outcome.error)
    assert [patch.name for patch in on] == ["test"]


def tag(place: Path, name: str, file: Path, run: Run, keys: Keys) -> None:
    """Put an older version, signed as it was, under another tag, as whoever keeps the mirror can."""
    older = place.with_name(f"older-{name}")
    assert run("push", file, older, "--key", keys.mine).status == 0
    shutil.copytree(older / "tags" / file.stem, place / "tags" / name)


def test_a_tag_never_passes_for_a_channel(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], tmp_path: Path
) -> None:
    """On a fresh machine: neither beside the channel's file, nor where that is withheld, whatever it is called."""
    place = tmp_path / "mirror"
    for channel in ("stable", "prod"):
        assert run("push", files["v2"], place, "--key", keys.mine, "--channel", channel).status == 0
    for channel in ("stable", "prod"):
        tag(place, channel, files["v1"], run, keys)
    shutil.rmtree(home)
    home.mkdir()
    policy(home, keys)
    for channel in ("stable", "prod"):
        assert run("pull", f"{place}@{channel}", "--json").document["version"] == "v2"
    shutil.rmtree(home / "store")
    shutil.rmtree(place / "channels")
    refused(run("pull", f"{place}@stable"), 1, "has no channel 'stable'")
    refused(run("pull", f"{place}@prod"), 3, "expected prod")


@pytest.mark.parametrize("version", ["stable", "canary", "beta", "main", "prod"])
def test_a_version_that_is_called_like_a_channel_is_not_pushed(
    run: Run, keys: Keys, files: dict[str, Path], tmp_path: Path, version: str
) -> None:
    place = tmp_path / "mirror"
    assert run("push", files["v1"], place, "--key", keys.mine, "--channel", "prod").status == 0
    named = small_patch(version, seed=5, serial=5).save(tmp_path / "named.safetensors")
    refused(run("push", named, place, "--key", keys.mine), 2, version)
    refused(run("channel", "set", place, "v1", "v1", "--key", keys.mine), 2, "v1")


def forge(file: Path, keys: Keys) -> tuple[bytes, bytes]:
    """A signature that names the publisher's key and is not its own: over the right files, with a bit turned."""
    import base64
    import json

    manifest, signature = material_paths(file)
    bundle = json.loads(signature.read_bytes())
    raw = bytearray(base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"]))
    raw[-1] ^= 1
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(bytes(raw)).decode()
    return manifest.read_bytes(), json.dumps(bundle, separators=(",", ":"), ensure_ascii=False).encode()


def activated(run: Run, home: Path, keys: Keys) -> Result:
    """An activation of the stored v1 under a policy that wants the publisher's signature."""
    return run("activate", "v1", "--trust", keys.mine.with_suffix(".pub"), "--require-signature")


def test_a_forged_signature_overwrites_no_good_one(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], tmp_path: Path
) -> None:
    """By ``add``, by ``pull`` without a policy, and by an activation that refuses it."""
    place, trust = tmp_path / "mirror", ("--trust", keys.mine.with_suffix(".pub"), "--require-signature")
    assert run("push", files["v1"], place, "--key", keys.mine).status == 0
    assert run("sign", files["v1"], "--key", keys.mine).status == 0
    manifest, signature = forge(files["v1"], keys)
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(files["v1"], bad / "v1.safetensors")
    for path, data in zip(material_paths(bad / "v1.safetensors"), (manifest, signature), strict=True):
        path.write_bytes(data)
    for root in (place, place / "tags" / "v1"):
        (root / "patch.sig").write_bytes(signature)
    shutil.rmtree(home)
    home.mkdir()
    assert run("add", files["v1"]).status == 0
    assert activated(run, home, keys).status == 0
    for attack in (("add", bad / "v1.safetensors"), ("pull", f"{place}@v1")):
        assert run(*attack).status == 0, attack
        assert activated(run, home, keys).status == 0, attack
    refused(run("pull", f"{place}@v1", *trust), 3, "is false")
    refused(run("activate", bad / "v1.safetensors", *trust), 3, "is false")
    assert activated(run, home, keys).status == 0


def test_a_good_signature_is_found_beside_forged_ones(
    run: Run, home: Path, keys: Keys, files: dict[str, Path], tmp_path: Path
) -> None:
    """Whichever came first, and whoever else has signed."""
    assert run("sign", files["v1"], "--key", keys.mine).status == 0
    manifest, signature = forge(files["v1"], keys)
    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(files["v1"], bad / "v1.safetensors")
    for path, data in zip(material_paths(bad / "v1.safetensors"), (manifest, signature), strict=True):
        path.write_bytes(data)
    assert run("add", bad / "v1.safetensors").status == 0
    refused(activated(run, home, keys), 3, "is false")
    assert run("sign", "v1", "--key", keys.other).status == 0
    assert run("add", files["v1"]).status == 0
    assert activated(run, home, keys).status == 0
    assert run("verify", "v1", "--trust", keys.mine.with_suffix(".pub")).status == 0
    assert run("verify", "v1", "--trust", keys.other.with_suffix(".pub")).status == 0


@pytest.mark.parametrize("version", ["Stable", "CANARY", "Beta", "latest", "HEAD", "Main"])
def test_a_version_that_reads_like_a_channel_is_not_pushed(run: Run, home: Path, tmp_path: Path, version: str) -> None:
    path = small_patch("v1").evolve(version=version).save(tmp_path / "x.safetensors")
    refused(run("push", path, f"{tmp_path}/mirror/"), 2, version, "is reserved")
