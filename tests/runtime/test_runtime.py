"""PatchRuntime: what a patch computes, what add() refuses, and that nothing is left behind."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import nest_runtime as nest
from nest_runtime.model.fingerprint import model_hash
from nest_runtime.patch.patch import Patch, Site
from nest_runtime.runtime import PatchRuntime
from nest_runtime.runtime import fold as fold_module
from nest_runtime.runtime.switch import Mode
from tests.conftest import save_tiny
from tests.support.patches import attached, make_patch

IDS = torch.tensor([[1, 7, 30, 45, 100, 9], [1, 8, 31, 46, 101, 10]])


@pytest.fixture(scope="module")
def tiny_phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi-3: gate and up are in one fused module."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-phi", "Phi3ForCausalLM", "Phi3Config", seed=2)


@pytest.fixture
def model(tiny_llama: Path) -> torch.nn.Module:
    return load(tiny_llama)


@pytest.fixture
def runtime(model: torch.nn.Module) -> Iterator[PatchRuntime]:
    with PatchRuntime(model) as runtime:
        yield runtime


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def greedy(model: torch.nn.Module) -> torch.Tensor:
    return model.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0)


def dense(model: torch.nn.Module, patch: Patch) -> torch.nn.Module:
    """W + ΔW written out neuron by neuron on a copy, without any code of the runtime."""
    patched = copy.deepcopy(model)
    for site in patch.sites:
        path, _, half = site.name.partition(":")
        weight = patched.get_submodule(path).weight.data
        first = site.d_out if half == "up" else 0
        deltas, clusters = site.deltas.tensor().double(), site.clusters.tensor()
        for i, neuron in enumerate(site.neurons.tensor().tolist()):
            loading = 1.0 if site.loadings is None else float(site.loadings.tensor()[i])
            row = weight[first + neuron].double() + loading * deltas[int(clusters[i])]
            weight[first + neuron] = row.to(weight.dtype)
    return patched


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """Every tensor's bytes, by key of the state dict."""
    return {
        key: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("loadings", [False, True])
@pytest.mark.parametrize("folder", ["tiny_llama", "tiny_qwen", "tiny_phi"])
def test_hook_and_fold_equal_dense(folder: str, loadings: bool, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(folder))
    patch = make_patch(model, loadings=loadings, scale=0.3)
    base, start = logits(model), fingerprint(model)
    reference = dense(model, patch)
    expected, text = logits(reference), greedy(reference)
    assert not close(expected, base, 1e-2)  # the patch does something
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        for mode in ("hook", "fold", "auto"):
            runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
            assert close(logits(model), expected)
            assert torch.equal(greedy(model), text)
            runtime.deactivate()
            assert torch.equal(logits(model), base)
            assert fingerprint(model) == start
    assert fingerprint(model) == start


def test_conv1d_layout(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "gpt2", "GPT2LMHeadModel", "GPT2Config", n_layer=2, n_head=4, n_embd=64)
    model = load(folder)
    patch = make_patch(model)
    expected = copy.deepcopy(model)
    for site in patch.sites:
        expected.get_submodule(site.name).weight.data += site.dense().t()
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        for mode in ("hook", "fold"):
            runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
            assert close(logits(model), logits(expected))
        with runtime.using(None):
            assert close(logits(model), logits(load(folder)))


def test_nothing_is_touched_before_add_and_after_close(model: torch.nn.Module) -> None:
    def state() -> object:
        return [
            attached(model),
            [(name, sorted(m._buffers), sorted(m.__dict__)) for name, m in model.named_modules()],
        ]

    before, keys = state(), list(model.state_dict())
    runtime = PatchRuntime(model)
    assert state() == before
    runtime.add(make_patch(model))
    runtime.activate("v1")
    assert list(model.state_dict()) == keys
    assert attached(model) != []
    runtime.close()
    runtime.close()
    assert state() == before
    with pytest.raises(nest.NestError, match="closed"):
        runtime.activate("v1")
    with PatchRuntime(model) as second:
        second.add(make_patch(model))


def test_one_runtime_at_a_time(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    patch = make_patch(model)
    runtime.add(patch)
    with pytest.raises(nest.NestError, match="another PatchRuntime"), PatchRuntime(model) as second:
        second.add(patch)
    runtime.activate("v1")
    assert close(logits(model), logits(dense(load_base(model), patch)))


def load_base(model: torch.nn.Module) -> torch.nn.Module:
    return load(Path(model.config._name_or_path))  # type: ignore[union-attr]


def test_properties_and_switching(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    first, second = make_patch(model), make_patch(model, version="v2", seed=1)
    assert runtime.add(first) == "v1"
    assert runtime.add(first) == "v1"
    assert runtime.add(second) == "v2"
    assert (runtime.active, runtime.active_patch, runtime.mode, runtime.current) == (None, None, None, (None,))
    runtime.activate("v1")
    assert (runtime.active, runtime.active_patch, runtime.mode) == ("v1", first, "hook")
    runtime.activate("test@v2", mode="fold")
    assert (runtime.active, runtime.mode, runtime.current) == ("v2", "fold", ("v2",))
    runtime.activate(first.digest)
    assert list(runtime.patches) == ["v1", "v2"]
    assert "active v1" in repr(runtime)
    with pytest.raises(nest.NestError, match="active"):
        runtime.remove("v1")
    runtime.deactivate()
    runtime.remove("v1")
    assert list(runtime.patches) == ["v2"]
    with pytest.raises(nest.PatchNotFound, match="it holds: v2"):
        runtime.activate("v1")
    with pytest.raises(nest.UsageError, match="mode"):
        runtime.activate("v2", mode="merge")  # type: ignore[arg-type]
    assert runtime.active is None


def test_versions_of_two_names(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    runtime.add(make_patch(model))
    assert runtime.add(make_patch(model, name="other", seed=1)) == "other@v1"
    assert list(runtime.patches) == ["test@v1", "other@v1"]
    with pytest.raises(nest.UsageError, match="test@v1, other@v1"):
        runtime.activate("v1")
    runtime.activate("other@v1")
    assert runtime.active == "other@v1"
    with pytest.raises(nest.NestError, match="already here"):
        runtime.add(make_patch(model, seed=5))
    assert len(runtime.patches) == 2


def test_wrong_base_is_refused_with_both_hashes(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    other = "sha256:" + "0" * 64
    patch = make_patch(model, base_hash=other)
    with pytest.raises(nest.BaseMismatch) as caught:
        runtime.add(patch)
    assert other in str(caught.value)
    assert model_hash(model) in str(caught.value)
    assert not runtime.patches
    with pytest.warns(UserWarning, match="forced"):
        runtime.add(patch, force=True)
    assert runtime.forced == (patch.digest,)
    runtime.activate("v1", mode="fold")


def test_changed_rows_are_refused(model: torch.nn.Module) -> None:
    patch = make_patch(model)
    row = int(patch.sites[0].neurons.tensor()[0])
    model.get_submodule(patch.sites[0].name).weight.data[row, 0] += 1  # type: ignore[operator, union-attr]
    with pytest.raises(nest.BaseMismatch, match="rows it changes differ"):
        PatchRuntime(model, base_hash=patch.base_hash).add(patch)
    with pytest.raises(nest.BaseMismatch, match="for base"):
        PatchRuntime(model).add(patch)


def test_sites_that_do_not_fit(runtime: PatchRuntime, model: torch.nn.Module, tiny_phi: Path) -> None:
    with pytest.raises(nest.SiteMismatch, match="which the model lacks"):
        runtime.add(make_patch(load(tiny_phi)), force=True)
    patch = make_patch(model)
    sites = (Site("model.layers.0.mlp.gate_proj", 97, *_parts(patch)), *patch.sites[1:])  # type: ignore[attr-defined]
    with pytest.raises(nest.SiteMismatch, match=r"d_out 97 in patch .*, 96 in the model"):
        runtime.add(patch.evolve(sites=sites))
    assert not runtime.patches


def _parts(patch: Patch) -> tuple[object, ...]:
    site = patch.sites[0]
    return site.deltas, site.neurons, site.clusters


def test_empty_sites(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    patch = make_patch(model, empty=["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"])
    nothing = make_patch(model, version="v0", neurons=0)
    base, expected = logits(model), logits(dense(model, patch))
    runtime.add(nothing)
    runtime.add(patch)
    for mode in ("hook", "fold"):
        runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
        assert close(logits(model), expected)
        runtime.activate("v0", mode=mode)  # type: ignore[arg-type]
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("fail_at", [0, 2, 5])
def test_error_while_folding_leaves_the_last_patch_on(
    runtime: PatchRuntime, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    runtime.add(make_patch(model))
    runtime.add(make_patch(model, version="v2", seed=1))
    start = fingerprint(model)
    runtime.activate("v1", mode="fold")
    folded, real, calls = fingerprint(model), fold_module.anatomy.write_rows, 0

    def failing(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at + 1:
            raise MemoryError("out of memory")
        real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(fold_module.anatomy, "write_rows", failing)
        with pytest.raises(MemoryError):
            runtime.activate("v2", mode="fold")
    assert (runtime.active, runtime.mode) == ("v1", "fold")
    assert fingerprint(model) == folded
    runtime.deactivate()
    assert fingerprint(model) == start


def test_foreign_edits_are_reported_not_overwritten(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    patch = make_patch(model)
    runtime.add(patch)
    weight = model.get_submodule(patch.sites[0].name).weight.data  # type: ignore[union-attr]
    row = int(patch.sites[0].neurons.tensor()[0])
    original = weight[row].clone()  # type: ignore[index]
    weight[row] += 1  # type: ignore[index, operator]
    with pytest.raises(nest.BaseMismatch, match="since the patch was added"):
        runtime.activate("v1", mode="fold")
    assert runtime.active is None
    weight[row] = original  # type: ignore[index, operator]
    runtime.activate("v1", mode="fold")
    folded = weight[row].clone()  # type: ignore[index]
    weight[row] += 1  # type: ignore[index, operator]
    with pytest.raises(nest.BaseMismatch, match="while it was folded in"):
        runtime.deactivate()
    assert runtime.active == "v1"
    weight[row] = folded  # type: ignore[index, operator]
    runtime.deactivate()
    assert torch.equal(weight[row], original)  # type: ignore[index]


def test_what_a_fold_kept_is_no_proof_of_what_stands_there(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    """A second fold copies bytes that the first one kept; edits between the two are seen all the same."""
    patch = make_patch(model)
    runtime.add(patch)
    start = fingerprint(model)
    runtime.activate("v1", mode="fold")
    folded = fingerprint(model)
    runtime.deactivate()
    weight = model.get_submodule(patch.sites[-1].name).weight.data  # type: ignore[union-attr]
    row = int(patch.sites[-1].neurons.tensor()[-1])
    original = weight[row].clone()  # type: ignore[index]
    weight[row] += 1  # type: ignore[index, operator]
    edited = fingerprint(model)
    with pytest.raises(nest.BaseMismatch, match="since the patch was added"):
        runtime.activate("v1", mode="fold")
    assert fingerprint(model) == edited
    weight[row] = original  # type: ignore[index, operator]
    runtime.activate("v1", mode="fold")
    assert fingerprint(model) == folded
    runtime.deactivate()
    assert fingerprint(model) == start


def test_a_fold_in_the_place_of_another_of_the_same_neurons(
    runtime: PatchRuntime, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are written once, and are what they are when the second patch is folded into the base."""
    patch = make_patch(model)
    sites = [replace(site, deltas=-2 * site.deltas.tensor()) for site in patch.sites]
    runtime.add(patch)
    runtime.add(patch.evolve(version="v2", sites=tuple(sites)))
    start, folded = fingerprint(model), {}
    for version in ("v1", "v2"):
        runtime.activate(version, mode="fold")
        folded[version] = fingerprint(model)
        runtime.deactivate()
    runtime.activate("v1", mode="fold")
    real, calls = fold_module.anatomy.write_rows, 0

    def counting(*args: object) -> None:
        nonlocal calls
        calls += 1
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(fold_module.anatomy, "write_rows", counting)
    runtime.activate("v2", mode="fold")
    assert calls == sum(site.n_neurons > 0 for site in patch.sites)
    assert (runtime.active, fingerprint(model)) == ("v2", folded["v2"])
    weight = model.get_submodule(patch.sites[0].name).weight.data  # type: ignore[union-attr]
    row = int(patch.sites[0].neurons.tensor()[0])
    original = weight[row].clone()  # type: ignore[index]
    weight[row] += 1  # type: ignore[index, operator]
    with pytest.raises(nest.BaseMismatch, match="while it was folded in"):
        runtime.activate("v1", mode="fold")
    weight[row] = original  # type: ignore[index, operator]
    runtime.activate("v1", mode="fold")
    assert fingerprint(model) == folded["v1"]
    runtime.deactivate()
    assert fingerprint(model) == start


@pytest.mark.parametrize("fail_at", [0, 2])
def test_error_while_folding_again_leaves_the_base(
    runtime: PatchRuntime, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, fail_at: int
) -> None:
    runtime.add(make_patch(model))
    start = fingerprint(model)
    runtime.activate("v1", mode="fold")
    runtime.deactivate()
    real, calls = fold_module.anatomy.write_rows, 0

    def failing(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == fail_at + 1:
            raise MemoryError("out of memory")
        real(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(fold_module.anatomy, "write_rows", failing)
        with pytest.raises(MemoryError):
            runtime.activate("v1", mode="fold")
    assert runtime.active is None
    assert fingerprint(model) == start


def test_adding_while_another_patch_is_folded(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    first, second = make_patch(model, neurons=60), make_patch(model, version="v2", seed=1, neurons=60)
    expected, start = logits(dense(model, second)), fingerprint(model)
    runtime.add(first)
    runtime.activate("v1", mode="fold")
    runtime.add(second)  # many of its rows are folded now
    runtime.activate("v2", mode="fold")
    assert close(logits(model), expected)
    runtime.deactivate()
    assert fingerprint(model) == start


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_model_moved_to_another_dtype_and_back(tiny_llama: Path, mode: str) -> None:
    model, patch = load(tiny_llama), make_patch(load(tiny_llama), scale=0.3)
    expected = logits(dense(model, patch))
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
        model.to(torch.bfloat16)
        assert close(logits(model).float(), expected, 0.05)
        model.to(torch.float32)
        rounded = load(tiny_llama, torch.bfloat16).float()
        if mode == "hook":  # the update itself was not rounded on the way
            assert close(logits(model), logits(dense(rounded, patch)))
        runtime.activate("v1", mode="fold")
        assert close(logits(model), logits(dense(rounded, patch)), 1e-5 if mode == "hook" else 0.05)
        runtime.deactivate()
        assert fingerprint(model) == fingerprint(rounded)


def test_model_moved_to_another_device(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    """``meta`` stands in for a device: hooks must follow the input, without its values."""
    runtime.add(make_patch(model))
    runtime.activate("v1")
    model.to("meta")
    assert model(IDS.to("meta")).logits.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_model_moved_to_cuda_and_back(tiny_llama: Path, mode: str) -> None:
    model = load(tiny_llama)
    patch = make_patch(model)
    start, expected = fingerprint(model), logits(dense(model, patch))
    with PatchRuntime(model) as runtime:
        runtime.add(patch)
        runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
        model.cuda()
        assert close(logits(model, IDS.cuda()).cpu(), expected, 1e-4)
        runtime.deactivate()
        runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
        model.cpu()
        assert close(logits(model), expected)
    assert fingerprint(model) == start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_loaded_in_another_dtype_than_its_checkpoint(tiny_llama: Path, dtype: torch.dtype) -> None:
    patch = make_patch(load(tiny_llama))
    model = load(tiny_llama, dtype)
    start = fingerprint(model)
    with PatchRuntime(model) as runtime:
        runtime.add(patch)  # the checkpoint's folder vouches for it
        assert runtime.forced == ()
        for mode in ("hook", "fold"):
            runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
            tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
            assert close(logits(model).double(), logits(dense(load(tiny_llama, dtype), patch)).double(), tolerance)
    assert fingerprint(model) == start
    row = int(patch.sites[0].neurons.tensor()[0])
    model.get_submodule(patch.sites[0].name).weight.data[row, 0] += 1  # type: ignore[operator, union-attr]
    with pytest.raises(nest.BaseMismatch):
        PatchRuntime(model).add(patch)
    with pytest.raises(nest.BaseMismatch):
        PatchRuntime(model, base_hash=patch.base_hash).add(patch)


def test_low_precision_deltas(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    patch = make_patch(model, dtype=torch.bfloat16, loadings=True)
    expected = logits(dense(model, patch))
    runtime.add(patch)
    for mode in ("hook", "fold"):
        runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
        assert close(logits(model), expected)


class _Int8Linear(torch.nn.Linear):
    """As quantizers make them: the weight is no float tensor; the output is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None])  # type: ignore[operator]


def _quantize(model: torch.nn.Module) -> None:
    for module in model.modules():
        if type(module) is torch.nn.Linear and module.out_features == 96:
            scale = module.weight.data.abs().amax(1) / 127
            module.__class__ = _Int8Linear
            module.register_buffer("scale", scale)
            quantized = (module.weight.data / scale[:, None]).round().to(torch.int8)
            module.weight = torch.nn.Parameter(quantized, requires_grad=False)


def test_quantized_weights(tiny_llama: Path) -> None:
    patch = make_patch(load(tiny_llama), scale=0.3)
    model = load(tiny_llama)
    _quantize(model)
    base = logits(model)
    with PatchRuntime(model) as runtime:
        runtime.add(patch)  # the checkpoint's folder vouches for it
        runtime.activate("v1", mode="hook")
        assert close(logits(model), logits(dense(load(tiny_llama), patch)), 0.05)
        with pytest.raises(nest.ModelError, match="hook mode"):
            runtime.activate("v1", mode="fold")
        assert runtime.mode == "hook"
        runtime.deactivate()
        assert torch.equal(logits(model), base)
    model.config._name_or_path = ""
    with pytest.raises(nest.BaseMismatch, match="for base"):
        PatchRuntime(model).add(patch)
    PatchRuntime(model, base_hash=patch.base_hash).add(patch)


def test_saving_with_hooks_on_writes_the_base(
    runtime: PatchRuntime, model: torch.nn.Module, tiny_llama: Path, tmp_path: Path
) -> None:
    runtime.add(make_patch(model))
    runtime.activate("v1")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    saved, original = load_file(tmp_path / "model.safetensors"), load_file(tiny_llama / "model.safetensors")
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)
    assert model_hash(tmp_path) == model_hash(tiny_llama)


def test_copying_or_pickling_a_patched_model_is_refused(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    runtime.add(make_patch(model))
    with pytest.raises(nest.NestError, match="close"):
        copy.deepcopy(model)
    with pytest.raises(nest.NestError, match="close"):
        pickle.dumps(model)
    runtime.close()
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_wrappers_of_others_before_and_after(model: torch.nn.Module, mode: Mode) -> None:
    """Accelerate replaces ``forward`` of a module; it may come first or last, go first or last.

    It drops what came after it.
    """
    hooks = pytest.importorskip("accelerate.hooks")
    patch = make_patch(model)
    base, expected = logits(model), logits(dense(model, patch))
    modules = [model.model, *(model.get_submodule(site.name) for site in patch.sites)]

    class Counting(hooks.ModelHook):  # type: ignore[misc, name-defined]
        calls = 0

        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    def put_on() -> list[Counting]:
        counting = [Counting() for _ in modules]
        for module, hook in zip(modules, counting, strict=True):
            hooks.add_hook_to_module(module, hook)
        return counting

    def take_off() -> None:
        for module in modules:
            hooks.remove_hook_from_module(module)

    def patched() -> PatchRuntime:
        runtime = PatchRuntime(model)
        runtime.add(patch)
        runtime.activate("v1", mode=mode)
        assert close(logits(model), expected)
        return runtime

    counting = put_on()
    with patched():
        take_off()
        assert close(logits(model), expected), "they went, and the patch is still on"
    assert torch.equal(logits(model), base)
    assert {hook.calls for hook in counting} == {1}

    runtime = patched()
    counting = put_on()
    assert close(logits(model), expected)
    runtime.close()  # from below them
    assert torch.equal(logits(model), base)
    patched().close()
    assert {hook.calls for hook in counting} == {3}, "each call came through each of theirs once"
    take_off()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_training_through_an_active_patch(runtime: PatchRuntime, model: torch.nn.Module, mode: str) -> None:
    patch = make_patch(model, loadings=True)
    reference = dense(model, patch)
    runtime.add(patch)
    runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
    with torch.inference_mode():
        model(IDS)  # caches made here must not be inference tensors
    for each in (model, reference):
        each.requires_grad_(False)
        each.get_input_embeddings().weight.requires_grad_(True)
        each(IDS, labels=IDS).loss.backward()
    found, expected = (each.get_input_embeddings().weight.grad for each in (model, reference))
    assert close(found, expected, 1e-4)


def test_inference_mode_and_activation_inside_it(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    patch = make_patch(model)
    expected, start = logits(dense(model, patch)), fingerprint(model)
    with torch.inference_mode():
        runtime.add(patch)
        for mode in ("hook", "fold"):
            runtime.activate("v1", mode=mode)  # type: ignore[arg-type]
            assert close(model(IDS).logits, expected)
        with runtime.using(None):
            assert close(model(IDS).logits, logits(load_base(model)))
    runtime.deactivate()
    assert fingerprint(model) == start


def test_peft_on_top(runtime: PatchRuntime, model: torch.nn.Module) -> None:
    peft = pytest.importorskip("peft")
    patch = make_patch(model)
    expected, start = logits(dense(model, patch)), fingerprint(model)
    runtime.add(patch)
    runtime.activate("v1")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], init_lora_weights=True)
    wrapped = peft.get_peft_model(model, config)  # LoRA starts at zero
    assert close(logits(wrapped), expected)
    runtime.activate("v1", mode="fold")
    assert close(logits(wrapped), expected)
    runtime.close()
    unwrapped = wrapped.unload()
    assert fingerprint(unwrapped) == start
    with PatchRuntime(peft.get_peft_model(unwrapped, config)) as second:
        second.add(patch)
        second.activate("v1")
        assert close(logits(second.model), expected)
