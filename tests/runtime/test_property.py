"""Random sequences of everything a PatchRuntime can do, with errors among them, against a plain model of it."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import AutoModelForCausalLM

import nest_runtime as nest
from nest_runtime.patch.patch import Patch
from nest_runtime.runtime import PatchRuntime
from nest_runtime.runtime import fold as fold_module
from tests.conftest import save_tiny
from tests.support.patches import make_patch

IDS = torch.tensor([[1, 7, 30, 45, 100, 9], [1, 8, 31, 46, 101, 10]])
VERSIONS = ("v1", "v2", "v3")
some_version = st.sampled_from(VERSIONS)
some_choice = st.sampled_from((None, *VERSIONS))
some_mode = st.sampled_from(("hook", "fold", "auto"))


class World:
    """One model for all sequences, and what each patch alone gives."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_tiny(Path(folder), "LlamaForCausalLM", "LlamaConfig")
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.start = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.patches: dict[str, Patch] = {
            version: make_patch(self.model, version=version, seed=seed, neurons=30, scale=0.3, loadings=seed % 2 == 0)
            for seed, version in enumerate(VERSIONS)
        }
        self.foreign = make_patch(self.model, version="v9", base_hash="sha256:" + "0" * 64)
        self.expected = {None: self.logits(self.model)}
        for version, patch in self.patches.items():
            patched = copy.deepcopy(self.model)
            for site in patch.sites:
                patched.get_submodule(site.name).weight.data += site.dense()
            self.expected[version] = self.logits(patched)

    @staticmethod
    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(IDS).logits  # (rows, tokens, vocab)

    def changed(self) -> list[str]:
        now = self.model.state_dict()
        assert list(now) == list(self.start)
        return [key for key, value in self.start.items() if not torch.equal(value, now[key])]


class RuntimeMachine(RuleBasedStateMachine):
    world: World

    @initialize()
    def begin(self) -> None:
        self.runtime = PatchRuntime(self.world.model, base_hash=self.world.patches["v1"].base_hash)
        self.held = {"v1", "v2"}
        for version in sorted(self.held):
            self.runtime.add(self.world.patches[version])
        self.active: str | None = None
        self.mode: str | None = None

    @rule(version=some_version)
    def add(self, version: str) -> None:
        assert self.runtime.add(self.world.patches[version]) == version
        self.held.add(version)

    @rule(version=some_version)
    def add_what_is_refused(self, version: str) -> None:
        with pytest.raises(nest.BaseMismatch):
            self.runtime.add(self.world.foreign)
        if version in self.held:
            with pytest.raises(nest.NestError, match="already here"):
                self.runtime.add(self.world.patches[version].evolve(serial=99))

    @rule(version=some_version)
    def remove(self, version: str) -> None:
        if version not in self.held:
            with pytest.raises(nest.PatchNotFound):
                self.runtime.remove(version)
        elif version == self.active:
            with pytest.raises(nest.NestError, match="is active"):
                self.runtime.remove(version)
        else:
            self.runtime.remove(version)
            self.held.discard(version)

    @rule(version=some_version)
    def fold(self, version: str) -> None:
        self.activate(version, "fold")

    @rule(version=some_version, mode=some_mode)
    def activate(self, version: str, mode: str) -> None:
        if version not in self.held:
            with pytest.raises(nest.PatchNotFound):
                self.runtime.activate(version, mode=mode)  # type: ignore[arg-type]
            return
        self.runtime.activate(version, mode=mode)  # type: ignore[arg-type]
        self.active, self.mode = version, "fold" if mode == "fold" else "hook"

    @rule()
    def deactivate(self) -> None:
        self.runtime.deactivate()
        self.active = self.mode = None
        assert not self.world.changed()

    @precondition(lambda self: self.held)
    @rule(version=some_version, mode=some_mode, fail_at=st.integers(1, 8))
    def fail_while_writing(self, version: str, mode: str, fail_at: int) -> None:
        """The n-th write of rows raises; the switch happens whole or not at all."""
        if version not in self.held:
            return
        real, calls = fold_module.anatomy.write_rows, 0

        def failing(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise MemoryError("out of memory")
            real(*args)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(fold_module.anatomy, "write_rows", failing)
            try:
                self.runtime.activate(version, mode=mode)  # type: ignore[arg-type]
            except MemoryError:
                return
        self.active, self.mode = version, "fold" if mode == "fold" else "hook"

    @rule(choice=some_choice, inner=some_choice)
    def use(self, choice: str | None, inner: str | None) -> None:
        if {choice, inner} - self.held - {None}:
            with pytest.raises(nest.PatchNotFound), self.runtime.using(choice), self.runtime.using(inner):
                pass
            return
        with self.runtime.using(choice):
            self.check(self.world.logits(self.world.model), choice)
            with self.runtime.using_rows([inner, choice]):
                mixed = self.world.logits(self.world.model)
                self.check(mixed[:1], inner, rows=slice(0, 1))
                self.check(mixed[1:], choice, rows=slice(1, 2))
            if choice:
                with pytest.raises(nest.NestError, match=r"in use|is active"):
                    self.runtime.remove(choice)

    @precondition(lambda self: self.held)
    @rule()
    def fail_in_a_pass(self) -> None:
        with self.runtime.using_rows([None] * 3), pytest.raises(nest.UsageError):
            self.world.logits(self.world.model)

    @invariant()
    def outputs_are_those_of_the_active_patch(self) -> None:
        if not hasattr(self, "runtime"):
            return
        assert (self.runtime.active, self.runtime.mode) == (self.active, self.mode)
        assert set(self.runtime.patches) == self.held
        self.check(self.world.logits(self.world.model), self.active)
        if self.mode != "fold":
            assert not self.world.changed()

    def check(self, found: torch.Tensor, version: str | None, rows: slice = slice(None)) -> None:
        expected = self.world.expected[version]
        assert float((found - expected[rows]).abs().max()) <= 1e-5 * float(expected.abs().max())

    def teardown(self) -> None:
        if hasattr(self, "runtime"):
            self.runtime.close()
            assert not self.world.changed()
            assert torch.equal(self.world.logits(self.world.model), self.world.expected[None])


def test_random_sequences() -> None:
    RuntimeMachine.world = World()
    RuntimeMachine.TestCase.settings = settings(
        max_examples=100,
        stateful_step_count=30,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    RuntimeMachine.TestCase().runTest()
