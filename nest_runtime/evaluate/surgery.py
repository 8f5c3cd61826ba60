"""White-box attacks on the model itself: neurons pruned, and the direction that refusals hang on taken away.

Whoever holds the weights can do either; NeST's threat model rules it out. They show what a patch is worth against it.
Each is a context: within it the model is attacked, after it the model is what it was, bit for bit. Enter it inside
``runtime.using(…)``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nest_runtime.errors import EvaluationError
from nest_runtime.evaluate.attacks.evolution import target_losses
from nest_runtime.evaluate.attacks.suffix import TARGET
from nest_runtime.evaluate.cases import Message

if TYPE_CHECKING:
    import torch

    from nest_runtime.patch.patch import Patch

FIRST, LAST = 0.2, 0.9  # of the depth: between them lie the layers whose directions are tried
CHOSEN_BY = 8  # harmful prompts that choose the layer


def rows_of(patch: Patch) -> dict[str, list[int]]:
    """The neurons that a patch lists, by projection."""
    return {site.name: site.neurons.tensor().tolist() for site in patch.sites if site.n_neurons}


def random_rows(model: Any, like: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, list[int]]:
    """As many other neurons of each projection, drawn by seed: the control of a pruning."""
    from nest_runtime.model.anatomy import find_projections

    found = {}
    for projection in find_projections(model):
        if projection.name in like:
            taken = set(like[projection.name])
            free = [row for row in range(projection.d_out) if row not in taken]
            count = min(len(taken), len(free))
            found[projection.name] = sorted(random.Random(f"{seed}/{projection.name}").sample(free, count))
    return found


@contextmanager
def pruned(model: Any, rows: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Silence neurons within the context: their outputs are zero, whatever a patch adds to them.

    Raises:
        EvaluationError: the model has no such projection.
    """
    from nest_runtime.model.anatomy import find_projections
    from nest_runtime.model.projection import module_of

    projections = {projection.name: projection for projection in find_projections(model)}
    unknown = sorted(set(rows) - set(projections))
    if unknown:
        raise EvaluationError(f"the model has no projection {unknown[0]}", "take the patch that was made for it")
    handles = []
    try:
        for name, neurons in rows.items():
            projection = projections[name]
            if projection.experts:
                raise EvaluationError(
                    f"{name} lies in experts, whose neurons are not pruned here", "take a dense model"
                )
            handles.append(_silence(module_of(model, projection), projection, list(neurons)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _silence(module: Any, projection: Any, neurons: list[int]) -> Any:
    import torch

    index = projection.rows(torch.tensor(neurons, dtype=torch.long))

    def run(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, index.to(output.device), 0.0)  # (…, outputs)

    # Behind all hooks that are there: what a patch adds is silenced too.
    return module.register_forward_hook(run)


def refusal_direction(
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Sequence[Message]],
    benign: Sequence[Sequence[Message]],
    target: str = TARGET,
) -> tuple[int, torch.Tensor]:
    """The direction that refusals hang on, under whatever patch is active in the caller's context.

    As Arditi et al. 2024 (arXiv 2406.11717): at each layer the difference between the mean states at the prompts' last
    token; of these the one without which harmful prompts are likeliest to be answered with the target.

    Args:
        model, tokenizer: a causal LM and its tokenizer.
        harmful, benign: conversations; none that is tested with.
        target: how a complying answer begins.

    Returns:
        The layer, and the direction: (d,) float32 of length 1.
    """
    import torch

    depth = len(_layers(model))
    means = [_mean_states(model, tokenizer, talks) for talks in (harmful, benign)]  # twice (layers, d)
    directions = torch.nn.functional.normalize(means[0] - means[1], dim=-1)
    tried = range(int(FIRST * depth), max(int(LAST * depth), int(FIRST * depth) + 1))
    losses = {}
    for layer in tried:
        with without_direction(model, directions[layer]):
            found = target_losses(model, tokenizer, harmful[:CHOSEN_BY], target)
        losses[layer] = sum(loss for loss, _ in found) / len(found)
    best = min(losses, key=lambda layer: losses[layer])
    return best, directions[best]


@contextmanager
def without_direction(model: Any, direction: torch.Tensor) -> Iterator[None]:
    """A context in which a direction is projected out of the residual stream.

    That is done after the embeddings and after every layer.

    Args:
        model: the model.
        direction: (d,) float32, a unit vector.
    """

    def project(_: Any, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        unit = direction.to(states.device, states.dtype)
        changed = states - (states @ unit)[..., None] * unit  # (…, d)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    modules = [model.get_input_embeddings(), *_layers(model)]
    handles = [module.register_forward_hook(project) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean_states(model: Any, tokenizer: Any, talks: Sequence[Sequence[Message]]) -> torch.Tensor:
    """By layer, the mean over conversations of the states at the last token of the prompt. (layers, d) float32."""
    import torch

    from nest_runtime.prompts.examples import encode
    from nest_runtime.train.forward import device_of, hidden_states

    layers = _layers(model)
    sums: list[Any] = [0.0] * len(layers)

    def keep(index: int) -> Any:
        """A hook that adds up a layer's states of the last token, (d,) float32."""

        def run(_: Any, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            sums[index] = sums[index] + states[0, -1].float().cpu()

        return run

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            for talk in talks:
                ids = torch.tensor([encode(tokenizer, list(talk))], device=device_of(model))
                hidden_states(model, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(sums) / len(talks)


def _layers(model: Any) -> Any:
    """The decoder layers."""
    from nest_runtime.model.anatomy import find_projections
    from nest_runtime.train.lower import decoder_layers

    projections = find_projections(model)
    layers = decoder_layers(model, projections[0])[0] if projections else None
    if layers is None:
        raise EvaluationError("the model's decoder layers are not in one list", "other attacks need no layers")
    return layers
