"""LoRA by PEFT: rank 8 on the attention's query and value projections, or on the FFN's gate and up.

Rank-r updates of whole projections (Hu et al. 2021, arXiv 2106.09685), the paper's main baseline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nest_runtime.compare.methods.base import FitData, Learned, Method, Target
from nest_runtime.compare.methods.parameters import ParameterSet, supervise, tuning_report
from nest_runtime.errors import ModelError
from nest_runtime.model.anatomy import find_projections
from nest_runtime.progress import Progress
from nest_runtime.train.recipe import Recipe

RANK = 8
ALPHA = 16
# Names of the modules that hold query and value, of the architectures that fuse them last.
_QUERY_VALUE = (("q_proj", "v_proj"), ("query", "value"), ("qkv_proj",), ("query_key_value",), ("c_attn",))


class Lora(Method):
    """LoRA r = 8 on q_proj and v_proj, trained with the loss and the loop of NeST's tuning."""

    name = "lora"
    title = "LoRA r=8 (q, v)"
    place = 40
    look = ("#0072B2", "v")
    needs = ("peft",)
    knob = "lr"
    grid = (1e-3, 3e-3, 1e-2, 3e-2)
    fallback = 2e-4

    def modules(self, model: Any) -> list[str]:
        """Leaf names of the modules that get an adapter."""
        return attention_modules(model)

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """Train adapters and write them in PEFT's format, in the dtype that a patch ships."""
        dtype, names = getattr(torch, recipe.delta_dtype), self.modules(target.model)
        with injected(target.model, names, RANK, ALPHA, recipe.seed) as peft_model:
            parameters = ParameterSet(adapter_parameters(peft_model), _switcher(peft_model), dtype)
            result = supervise(target, parameters, data, recipe, value, progress)
            save_adapter(peft_model, folder, dtype)
        report = {**tuning_report(result), "modules": names, "rank": RANK}
        return Learned(folder, report, parameters.trainable, switch=lambda: loaded(target.model, folder))


class LoraFfn(Lora):
    """LoRA r = 8 where NeST's rows are: the first FFN projections."""

    name = "lora-ffn"
    title = "LoRA r=8 (gate, up)"
    place = 41
    look = ("#0072B2", "P")

    def modules(self, model: Any) -> list[str]:
        """The names of the model's first FFN projections."""
        return ffn_modules(model)


def attention_modules(model: Any) -> list[str]:
    """The names of the modules that hold the queries and values.

    Raises:
        ModelError: this architecture's are not known.
    """
    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())}
    for names in _QUERY_VALUE:
        if leaves.issuperset(names):
            return list(names)
    raise ModelError(
        f"{type(model).__name__} has no q_proj and v_proj, nor a fused projection that is known",
        "compare with lora-ffn instead of lora",
    )


def ffn_modules(model: Any) -> list[str]:
    """The names of the modules that a patch can change."""
    return sorted({projection.module.rpartition(".")[2] for projection in find_projections(model)})


@contextmanager
def injected(
    model: Any,
    modules: Sequence[str],
    rank: int,
    alpha: int,
    seed: int,
    *,
    dropout: float = 0.0,
    layers: Sequence[int] | None = None,
) -> Iterator[Any]:
    """``model`` with fresh adapters in it, as a PeftModel; the bare model afterwards.

    Args:
        model: changed in place meanwhile.
        modules: leaf names of the modules to adapt.
        rank, alpha, dropout: LoRA's.
        seed: of the adapters' first values.
        layers: adapt only these decoder layers.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(modules),
        layers_to_transform=None if layers is None else list(layers),
        task_type="CAUSAL_LM",
    )
    with _as_it_was(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft_model = get_peft_model(model, config)
        try:
            yield peft_model
        finally:
            peft_model.unload()


@contextmanager
def loaded(model: Any, folder: Path) -> Iterator[Any]:
    """``model`` with an adapter from disk in it; the bare model afterwards."""
    from peft import PeftModel

    with _as_it_was(model):
        peft_model = PeftModel.from_pretrained(model, str(folder)).eval()
        try:
            yield peft_model
        finally:
            peft_model.unload()


def adapter_parameters(peft_model: Any) -> dict[str, torch.Tensor]:
    """The adapters' parameters by name, in their own dtype: A [r, inputs] and B [outputs, r] of each module."""
    return {name: parameter for name, parameter in peft_model.named_parameters() if "lora_" in name}


def save_adapter(peft_model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write the adapter as PEFT does, its numbers in ``dtype``."""
    from peft import get_peft_model_state_dict

    state = {name: tensor.to(dtype) for name, tensor in get_peft_model_state_dict(peft_model).items()}
    peft_model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # a template with nothing filled in


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Undo what PEFT does to flags and mode; its own ``unload`` restores the modules."""
    flags, training = [(p, p.requires_grad) for p in model.parameters()], model.training
    try:
        yield
    finally:
        model.train(training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None


def _switcher(peft_model: Any) -> Any:
    def switch(on: bool) -> None:
        peft_model.base_model.enable_adapter_layers() if on else peft_model.base_model.disable_adapter_layers()

    return switch
