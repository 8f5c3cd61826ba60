"""The packed copies of weights that vLLM computes with on CPUs, and how they follow a patch.

vLLM's CPU build packs the weight of every linear layer for its kernels (blocks of oneDNN, tiles of AMX) and empties the
parameter: there would be no rows to change. Here every layer that a patch may change keeps its weight beside the packed
copy. After rows have changed the copy is made anew, where compiled code looks for it. On GPUs nothing is packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nest_runtime.errors import ModelError

NEVER_PATCHED = {"qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "down_proj"}  # names of modules
CACHED_SHAPES = 32  # as vLLM asks of oneDNN
# By which a product of the packed copy may differ, of the largest value: so many roundings, and float32's other order.
ROUNDINGS, LEAST = 8, 1e-4


def keep_weights() -> None:
    """Make vLLM keep the weights that a patch may change; called in every worker before a model is loaded."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    if getattr(pack, "nest_runtime", False):
        return

    def pack_and_keep(layer: Any, remove_weight: bool) -> None:
        """As vLLM's own packing; it leaves the weight where it is wanted."""
        name = str(getattr(layer, "prefix", "")).rpartition(".")[2]
        pack(layer, remove_weight=remove_weight and name in NEVER_PATCHED)

    pack_and_keep.nest_runtime = True  # type: ignore[attr-defined]
    utils.dispatch_cpu_unquantized_gemm = pack_and_keep


def pack_again(module: nn.Module) -> None:
    """Make a module's packed copy anew from its weight, if it has one.

    Raises:
        ModelError: the module computes with a copy of another kind, or the new copy does not compute what the weight
            does.
    """
    linear = getattr(module, "cpu_linear", None)
    weight = getattr(module, "weight", None)
    if linear is None or linear is F.linear or not isinstance(weight, torch.Tensor):
        return
    held = inspect.getclosurevars(linear).nonlocals
    if not held:
        return  # plain torch, which reads the weight itself
    with torch.no_grad():
        _pack(held, weight.detach())
        _check(linear, weight.detach())


def _pack(held: Mapping[str, Any], weight: torch.Tensor) -> None:
    if "handler" in held:
        from vllm import _custom_ops

        # Compiled code reads the address of oneDNN's copy from this tensor. The old copy is freed with ``fresh``.
        fresh = _custom_ops.create_onednn_mm(weight.t(), CACHED_SHAPES)
        address = held["handler"].handler_tensor
        old = address.clone()
        _overwrite(address, fresh.handler_tensor)
        _overwrite(fresh.handler_tensor, old)
    elif "packed_weight" in held:
        _overwrite(held["packed_weight"], torch.ops._C.convert_weight_packed(weight))
    elif "zen_weight" in held:
        copy = held["zen_weight"]
        if copy.data_ptr() != weight.data_ptr():
            _overwrite(copy, torch.ops.zentorch.zentorch_weight_prepack_for_linear(weight))
    else:
        raise ModelError(
            f"this vLLM computes with a copy of the weights that nest-runtime does not know ({', '.join(held)})",
            "serve with --expose, which uses adapters, or use the vLLM version that docs/guide/engines.md names",
        )


def _overwrite(target: torch.Tensor, values: torch.Tensor) -> None:
    with torch.inference_mode(target.is_inference()), torch.no_grad():
        target.copy_(values)


def _check(linear: Any, weight: torch.Tensor) -> None:
    """Compare a product of the packed copy with one of the weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=generator).to(weight.dtype)
    got, wanted = linear(x, weight, None).float(), F.linear(x, weight).float()
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    if not error <= max(ROUNDINGS * torch.finfo(weight.dtype).eps, LEAST):
        raise ModelError(
            f"after a change of rows, vLLM's packed copy of a weight [{len(weight)}, {weight.shape[1]}] computes "
            f"something else than the weight ({error:.1%} off)",
            "report it; serve with --expose, which uses adapters",
        )
