"""The layers below the lowest patched one: training never changes their output, so they need no second pass.

A pass that continues from kept states runs the model's own forward with those layers replaced, so masks, rotary
tables and the rest of the decoder stay its own. The result is compared once with a whole pass. If it differs, or the
layers cannot be found, every pass is a whole one: slower, never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nest_runtime.model.anatomy import Projection, unwrap
from nest_runtime.train.forward import device_of, pad_rows, tuned_states, width_multiple

if TYPE_CHECKING:
    from nest_runtime.train.batches import Batch, Row

KEPT_BYTES = 2**30  # of states; rows beyond are run again each time
TOLERANCE = 1e-3  # of the largest hidden state


class LowerLayers:
    """Hidden states that enter the lowest patched layer, a row at a time, kept on the CPU in the model's dtype.

    Args:
        model: the base; deltas at higher layers may be attached, they are not reached.
        lowest: the patched projection of the lowest layer; None keeps nothing.
        budget: bytes of states to keep.
    """

    def __init__(self, model: Any, lowest: Projection | None, budget: int = KEPT_BYTES) -> None:
        self.model, self.budget = model, budget
        self.layers, self.count = decoder_layers(model, lowest) if lowest is not None else (None, 0)
        self.tuples = False  # whether layers give their states in a tuple
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}  # by the row's tokens: (tokens, d)
        self._entered: dict[tuple[int, ...], torch.Tensor] = {}  # those of the batch at hand
        self._bytes = 0
        if self.layers is not None and not self._agrees():
            self.layers = None

    @property
    def usable(self) -> bool:
        """Whether passes continue from kept states."""
        return self.layers is not None

    def hidden(self, batch: Batch, rows: Sequence[Row]) -> torch.Tensor:
        """The decoder's last hidden states of a batch, (rows, width, d) in its dtype, from kept states if it can.

        Args:
            batch: the rows, padded.
            rows: the same, in order; states are kept under their tokens.
        """
        if not self.usable or batch.inputs:  # images are put in place by the decoder itself
            return tuned_states(self.model, batch.ids, batch.mask, batch.inputs)
        entered = [self._state(row, batch.ids.device) for row in rows]
        width = batch.ids.shape[1]
        padded = entered[0].new_zeros(len(rows), width, entered[0].shape[-1])
        for index, state in enumerate(entered):
            padded[index, : len(state)] = state
        return self._leave(padded, batch.ids, batch.mask)

    @contextmanager
    def entered(self, batch: Batch) -> Iterator[None]:
        """A context in which the batch's rows are not run again: all go through together, and nothing is kept."""
        if self.usable and not batch.inputs:
            states = self._enter(batch.ids, batch.mask).detach()
            keys = map(_key, batch.rows)
            self._entered = {key: state[: len(key)] for key, state in zip(keys, states, strict=True)}
        try:
            yield
        finally:
            self._entered = {}

    def _state(self, row: Row, device: torch.device) -> torch.Tensor:
        """A row's states (tokens, d), kept while there is room.

        Each row goes alone: what else is in a batch changes the last bits, and a run that was interrupted ends with
        the bits of one that was not.
        """
        key = _key(row)
        kept = self._entered.get(key, self._kept.get(key))
        if kept is not None:
            return kept
        ids, mask = pad_rows([key], key[-1], device, width_multiple(self.model, len(key)))
        state = self._enter(ids, mask)[0, : len(key)].detach().cpu().clone()
        size = state.numel() * state.element_size()
        if self._bytes + size <= self.budget:
            self._kept[key], self._bytes = state, self._bytes + size
        return state

    def _enter(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What the lowest patched layer is given for a batch, (rows, width, d); the pass ends there."""
        caught: list[torch.Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(args[0] if args else kwargs["tuned_states"])
            raise _Enough

        handle = self.layers[self.count].register_forward_pre_hook(catch, with_kwargs=True)  # type: ignore[index]
        try:
            with torch.no_grad():
                tuned_states(self.model, ids, mask)
        except _Enough:
            pass
        finally:
            handle.remove()
        return caught[0]

    def _leave(self, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The rest of the pass, (rows, width, d), from states (rows, width, d) that enter the lowest patched layer."""
        with self._skipped(states.to(device_of(self.model))):
            return tuned_states(self.model, ids, mask)

    @contextmanager
    def _skipped(self, states: torch.Tensor) -> Iterator[None]:
        assert self.layers is not None
        own = [self.layers[index] for index in range(self.count)]
        for index, layer in enumerate(own):
            self.layers[index] = _Skip(layer, states if index == 0 else None, self.tuples)
        try:
            yield
        finally:
            for index, layer in enumerate(own):
                self.layers[index] = layer

    def _agrees(self) -> bool:
        if self.count == 0:
            return False
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(12, device=device_of(self.model)) * 7 % vocabulary).reshape(2, 6)
        mask = torch.ones_like(ids)
        try:
            with torch.no_grad():
                with self._learned_form():
                    whole = tuned_states(self.model, ids, mask).float()
                ours = self._leave(self._enter(ids, mask), ids, mask).float()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # a decoder that its layers' places do not suffice for
        return ours.shape == whole.shape and float((ours - whole).abs().max()) <= TOLERANCE * float(whole.abs().max())

    @contextmanager
    def _learned_form(self) -> Iterator[None]:
        """Learn from a whole pass within it whether layers give tuples."""

        def look(_: nn.Module, __: Any, output: Any) -> None:
            self.tuples = isinstance(output, tuple)

        handle = self.layers[0].register_forward_hook(look)  # type: ignore[index]
        try:
            yield
        finally:
            handle.remove()


class _Enough(Exception):
    """Raised when the pass has come far enough."""


class _Skip(nn.Module):
    """In a layer's place: gives the states it was made with, or what it is given; else like the layer."""

    def __init__(self, layer: nn.Module, states: torch.Tensor | None, in_tuple: bool) -> None:
        super().__init__()
        self.__dict__.update(_layer=layer, _states=states, _in_tuple=in_tuple)  # the layer is no submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = self.__dict__["_states"]
        if states is None:
            states = args[0] if args else kwargs["tuned_states"]
        return (states,) if self.__dict__["_in_tuple"] else states


def _key(row: Row) -> tuple[int, ...]:
    return (*row.prompt, *row.answer)


def decoder_layers(model: Any, lowest: Projection) -> tuple[nn.ModuleList | None, int]:
    """The list of decoder layers that a projection's layer is in, and its index there."""
    match = re.match(rf"(.+)\.{lowest.layer}\.", lowest.module)
    if match is None:
        return None, 0
    for root in (model, unwrap(model)):
        try:
            found = root.get_submodule(match[1])
        except AttributeError:
            continue
        if isinstance(found, nn.ModuleList):
            return found, lowest.layer
    return None, 0
