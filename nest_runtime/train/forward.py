"""Forward passes for training: padded batches, the decoder without its head, logits only where they are needed.

An 8B model's logits over a batch of prompts are larger than everything else together. Training needs them at answer
tokens only, and locating needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nest_runtime.errors import TrainingError
from nest_runtime.model.anatomy import unwrap


def device_of(model: Any) -> torch.device:
    """Where the model reads its tokens."""
    return model.get_input_embeddings().weight.device


SHORT = 128  # tokens of a row up to which plain attention is the faster one while tuning on a CPU
WIDTHS = 16  # rows are padded to multiples of so many tokens while tuning


def width_multiple(model: Any, tokens: int) -> int:
    """The number that a batch's width is a multiple of while tuning: ``WIDTHS``, or 1 if the model ends before that.

    Few widths are few shapes: oneDNN keeps what it made for each of the last thousand shapes of a product, about a
    megabyte each.

    Args:
        model: its configuration says how many positions there are.
        tokens: of the longest row.
    """
    config: Any = unwrap(model).config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return WIDTHS if positions is None or padded(tokens) <= positions else 1


def padded(tokens: int, multiple: int = WIDTHS) -> int:
    """The width that a row of some tokens is padded to."""
    return -(-tokens // multiple) * multiple


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask, both (rows, width) int64; causal attention never sees right padding.

    Args:
        rows: token ids.
        pad_id: the padding token.
        device: where both go.
        multiple: the width is a multiple of this.
    """
    width = padded(max(len(row) for row in rows), multiple)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return ids.to(device), mask.to(device)


def length_batches(lengths: Sequence[int], batch_size: int, batch_tokens: int) -> list[list[int]]:
    """Positions in batches of similar length: at most ``batch_size`` rows, and ``batch_tokens`` padded tokens."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        current = batches[-1] if batches else None
        if current and len(current) < batch_size and (len(current) + 1) * lengths[index] <= batch_tokens:
            current.append(index)
        else:
            batches.append([index])
    return batches


def even_batches(lengths: Sequence[int], tokens: int, stretch: float = 1.3) -> list[list[int]]:
    """Positions in batches of similar length: at most ``tokens`` padded tokens, with hardly any padding."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        current = batches[-1] if batches else []
        fits = current and (len(current) + 1) * lengths[index] <= tokens
        if fits and lengths[index] <= stretch * lengths[current[0]] + 8:
            current.append(index)
        else:
            batches.append([index])
    return batches


def decoder_of(model: Any) -> nn.Module:
    """The model without its language-model head."""
    inner = unwrap(model)
    decoder = getattr(inner, "base_model", None)
    if isinstance(decoder, nn.Module) and decoder is not inner:
        return decoder
    return inner.get_decoder()  # type: ignore[operator]


def hidden_states(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, inputs: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The decoder's last hidden states, (rows, width, d) in the model's dtype, of ids and mask (rows, width) int64.

    ``inputs`` are those of images (images.batch_inputs).
    """
    passed = dict(inputs or {})
    return decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False, **passed).last_hidden_state


def tuning_attention(ids: torch.Tensor) -> AbstractContextManager[None]:
    """A context in which attention over ids (rows, width) int64 is computed as is fastest forward and backward.

    On a CPU the backward pass of torch's fused attention takes twice as long for short rows as that of the plain
    products. The backward pass goes in it too: checkpointed layers run forward there once more.
    """
    return sdpa_kernel(SDPBackend.MATH) if ids.device.type == "cpu" and ids.shape[1] <= SHORT else nullcontext()


def tuned_states(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, inputs: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """As :func:`hidden_states`, for tuning: (rows, width, d) in the model's dtype, of ids and mask (rows, width)."""
    with tuning_attention(ids):
        return hidden_states(model, ids, mask, inputs)


def dtype_of(model: Any) -> torch.dtype:
    """The dtype the model computes in: its embeddings'."""
    return model.get_input_embeddings().weight.dtype


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Let decoder layers checkpoint in eval mode if they were told to (``model.activation_checkpointing_enable()``).

    transformers does this in training mode alone. Only the layers themselves are switched, not their contents, and
    their own dropout is off: the pass computes the same as without.

    Raises:
        TrainingError: the reentrant kind, which gives no gradient if a layer's input needs none.
    """
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for layer in layers:
        if getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise TrainingError(
                "the model checkpoints activations with use_reentrant=True, which loses gradients of a frozen base",
                "enable checkpointing without use_reentrant",
            )
    kept = [(layer, layer.training, _dropouts(layer)) for layer in layers]
    try:
        for layer, _, dropouts in kept:
            layer.training = True
            vars(layer).update(dict.fromkeys(dropouts, 0.0))
        yield
    finally:
        for layer, training, dropouts in kept:
            layer.training = training
            vars(layer).update(dropouts)


def _dropouts(layer: nn.Module) -> dict[str, float]:
    return {key: value for key, value in vars(layer).items() if "dropout" in key and isinstance(value, float)}


class Readout:
    """Logits at chosen positions only, if the model's head allows it.

    Heads differ: some scale or cap logits. The result is compared once with the model's own logits. If they differ, the
    whole forward pass is used instead: slower, never wrong.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.sliced = self._agrees()

    def logits(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        where: torch.Tensor,
        inputs: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits float32 (chosen, vocabulary) at the positions where ``where`` (rows, width) is true."""
        if self.sliced:
            return self.head(hidden_states(self.model, ids, mask, inputs)[where])
        passed = dict(inputs or {})
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **passed).logits[where].float()

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 (n, vocabulary) of hidden states (n, d)."""
        config: Any = unwrap(self.model).config
        logits = unwrap(self.model).get_output_embeddings()(hidden)  # type: ignore[operator]
        if getattr(config, "logits_scaling", None):
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None):
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)
        return (torch.tanh(logits / cap) * cap if cap else logits).float()

    @property
    def vocabulary(self) -> int:
        """How many logits there are at a token."""
        return int(unwrap(self.model).get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    def _agrees(self) -> bool:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(6, device=device_of(self.model)) * 7 % vocabulary)[None]
        mask = torch.ones_like(ids)
        with torch.no_grad():
            whole = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
            ours = self.head(hidden_states(self.model, ids, mask)[0])
        scale = max(float(whole.abs().max()), 1e-6)
        return ours.shape == whole.shape and float((ours - whole).abs().max()) <= 1e-3 * scale
