"""vLLM's packed copies of weights on CPUs: the ones that a patch may change follow it, also in compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nest_runtime.errors import ModelError
from nest_runtime.serve.vllm.packing import keep_weights, pack_again

KINDS = {  # oneDNN takes what is large, tiles of AMX what is small and narrow; without AMX all goes to oneDNN
    "small": (torch.bfloat16, 256, 64),
    "large": (torch.bfloat16, 2048, 512),
    "float32": (torch.float32, 256, 64),
}


def packed(kind: str, name: str) -> Any:
    """A layer as vLLM leaves it after loading."""
    utils = pytest.importorskip("vllm.model_executor.layers.utils")
    keep_weights()
    dtype, d_out, d_in = KINDS[kind]
    layer: Any = nn.Module()
    layer.prefix = f"model.layers.0.{name}"
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer


def product(layer: Any, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer computes, and what its weight does."""
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(2)).to(weight.dtype)
    return layer.cpu_linear(x, weight, None), F.linear(x, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_row_reaches_the_packed_copy_and_leaves_it_again(kind: str) -> None:
    layer = packed(kind, "mlp.gate_up_proj")
    before, _ = product(layer, layer.weight)
    row = layer.weight[5].clone()
    layer.weight.data[5] *= -1
    stale, _ = product(layer, layer.weight)
    assert torch.equal(stale, before)  # or there would be nothing to pack again
    pack_again(layer)
    found, wanted = product(layer, layer.weight)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
    assert not torch.equal(found[:, 5], before[:, 5])
    layer.weight.data[5] = row
    pack_again(layer)
    assert torch.equal(product(layer, layer.weight)[0], before)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_computes_with_the_new_copy(kind: str) -> None:
    layer = packed(kind, "mlp.gate_up_proj")
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = layer.cpu_linear(x, layer.weight, None)
        return found

    x = torch.randn(3, layer.weight.shape[1], generator=torch.Generator().manual_seed(3)).to(layer.weight.dtype)
    before = compiled(x)
    layer.weight.data[7] *= -1
    pack_again(layer)
    after = compiled(x)
    assert torch.equal(after[:, :7], before[:, :7])
    assert not torch.equal(after[:, 7], before[:, 7])
    assert torch.equal(after, layer.cpu_linear(x, layer.weight, None))


def test_only_what_no_patch_changes_is_emptied() -> None:
    assert packed("large", "self_attn.o_proj").weight.numel() == 0
    assert packed("large", "mlp.down_proj").weight.numel() == 0
    assert packed("large", "mlp.gate_up_proj").weight.numel() == 2048 * 512
    assert packed("large", "mlp.fc1").weight.numel() == 2048 * 512


def test_a_copy_that_does_not_follow_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed("large", "mlp.gate_up_proj")
    layer.weight.data[:] = 0.5
    monkeypatch.setattr("nest_runtime.serve.vllm.packing._pack", lambda held, weight: None)
    with pytest.raises(ModelError, match="computes something else than the weight"):
        pack_again(layer)


def test_a_copy_of_an_unknown_kind_is_refused() -> None:
    layer = packed("large", "mlp.gate_up_proj")
    blocks = layer.weight.clone()
    layer.cpu_linear = lambda x, weight, bias: F.linear(x, blocks)
    with pytest.raises(ModelError, match="a copy of the weights that nest-runtime does not know \\(blocks\\)"):
        pack_again(layer)
