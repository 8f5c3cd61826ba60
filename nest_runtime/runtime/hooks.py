"""The hooks on the model, and the state they read: what is active, for whom, in which pass.

Each patched module has one forward hook. The trunk (the module that runs the decoder layers) has its ``forward``
wrapped. So a pass has one patch from its first layer to its last, and always ends properly; KeyboardInterrupt would
skip forward hooks. Under torch.compile both are traced: see bank.py. switch.py decides what is active.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import nn

from nest_runtime.errors import NestError
from nest_runtime.model.experts import routed
from nest_runtime.runtime.bank import active_slot, add_from_bank, snapshot
from nest_runtime.runtime.delta import LiveProjection, Loaded
from nest_runtime.runtime.passes import PassLock
from nest_runtime.runtime.selection import Active, Selection, View

_COMPILED_USING = (
    "a using() context of nest-runtime is open: choices per context cannot be part of a compiled graph; "
    "compile without fullgraph=True (it is right then, and slower), or use activate()"
)
_COMPILED_EXPERTS = (
    "a patch of nest-runtime changes experts of this model, which no compiled graph can do; "
    "compile without fullgraph=True: the decoder layers run eagerly then"
)


class Board:
    """State shared by the hooks of one runtime.

    Attributes:
        trunk: the module whose calls are passes.
        active: what is on for everybody; replaced whole, never changed.
        overridden: whether any context has a choice of its own. Compiled graphs guard on it: they read
            the bank while it is False, and leave the graph for an eager pass while it is True.
        experts: whether a patch changes experts. Passes are then never part of a compiled graph.
        closed: whether everything was taken off again.
        traced_slot: during tracing only, the pass's copy of the active slot.
    """

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk = trunk
        self.pass_lock = PassLock()
        self.active = Active()
        self.overridden = False
        self.experts = False
        self.closed = False
        self.traced_slot: torch.Tensor | None = None
        self._lock = threading.Lock()
        self._pinned: Counter[Loaded | None] = Counter()
        self._open = 0
        self._passes = threading.local()
        # Of this instance: contexts of two runtimes do not see each other.
        self._choice: ContextVar[Selection | None] = ContextVar("nest_runtime_choice", default=None)

    @property
    def choice(self) -> Selection | None:
        """What the current context chose, or None if it follows the active patch."""
        return self._choice.get()

    def run_pass(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the trunk's forward as one pass; waits while weights are being written."""
        passes = self._passes
        self.pass_lock.enter()
        try:
            outer, passes.view = getattr(passes, "view", None), self._new_view()
            try:
                return forward(*args, **kwargs)
            finally:
                passes.view = outer
        finally:
            self.pass_lock.leave()

    def view(self) -> View:
        """The pass's view; for a module called on its own, one of this moment."""
        return getattr(self._passes, "view", None) or self._new_view()

    def _new_view(self) -> View:
        active, choice = self.active, self.choice
        return active.view if choice is None else View(active, choice)

    @contextmanager
    def override(self, selection: Selection) -> Iterator[None]:
        """Make a choice for the current thread or asyncio task."""
        self._pin(selection, 1)
        try:
            token = self._choice.set(selection)
            try:
                yield
            finally:
                self._choice.reset(token)
        finally:
            self._pin(selection, -1)

    def pins(self, loaded: Loaded | None = None) -> int:
        """Open contexts: that name ``loaded``, or all of them."""
        with self._lock:
            return self._open if loaded is None else self._pinned[loaded]

    def _pin(self, selection: Selection, step: int) -> None:
        with self._lock:
            for loaded, _ in selection.runs:
                self._pinned[loaded] += step
            self._pinned = +self._pinned
            self._open += step
            unchanged = self.overridden == (self._open > 0)
        if not unchanged:
            with _no_compiling(), self._lock:
                self.overridden = self._open > 0


class _LiveOnly:
    """Bound to one live model: a copy would patch the wrong model, or none."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self._refuse()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise NestError(
            "a model with a PatchRuntime on it can be neither copied nor pickled: the copy would lose its patch",
            "call runtime.close() first; save_pretrained works at any time and writes the base in hook mode",
        )


class SiteHook(_LiveOnly):
    """The forward hook of one patched module."""

    def __init__(self, board: Board, key: str) -> None:
        self._board = board
        self._key = key

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        board = self._board
        if not torch.compiler.is_compiling():
            return board.view().apply(self._key, module, (args[0],), output)
        if board.overridden:
            return self._outside_graph(module, args[0], output)
        slot = active_slot(board.trunk) if board.traced_slot is None else board.traced_slot
        return add_from_bank(module, args[0], output, slot)

    @torch.compiler.disable(reason=_COMPILED_USING)
    def _outside_graph(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._board.view().apply(self._key, module, (x,), y)


class ExpertsHook(SiteHook):
    """The forward hook of a module that holds experts; gets keyword arguments too."""

    def __call__(  # type: ignore[override]
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: torch.Tensor
    ) -> torch.Tensor:
        return self._eagerly(module, args, kwargs, output)

    @torch.compiler.disable(reason=_COMPILED_EXPERTS)
    def _eagerly(self, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        return self._board.view().apply(self._key, module, routed(args, kwargs), output)


class PassForward(_LiveOnly):
    """Replaces the trunk's ``forward``."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._forward = board.trunk.forward
        # Without its __dict__: that of somebody else's wrapper may have come from an earlier one of ours.
        functools.update_wrapper(self, self._forward, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        board = self._board
        if board.closed:  # another wrapper still holds this one
            return self._forward(*args, **kwargs)
        if not torch.compiler.is_compiling():
            return board.run_pass(self._forward, args, kwargs)
        if board.experts:
            return self._experts_outside_graph(args, kwargs)
        if board.overridden:
            return self._outside_graph(args, kwargs)
        board.traced_slot = snapshot(active_slot(board.trunk))
        output = self._forward(*args, **kwargs)
        board.traced_slot = None  # a later graph of one layer must not see this one's
        return output

    @torch.compiler.disable(reason=_COMPILED_USING)
    def _outside_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._board.run_pass(self._forward, args, kwargs)

    @torch.compiler.disable(reason=_COMPILED_EXPERTS)
    def _experts_outside_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._board.run_pass(self._forward, args, kwargs)


class Wiring:
    """The hooks on one model: put on as patches need them, taken off together."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._handles: dict[str, Any] = {}
        self._forward: PassForward | None = None
        self._before: Any = None

    def cover(self, projections: Mapping[str, LiveProjection], keys: Mapping[str, Any]) -> None:
        """Hook the modules named by ``keys`` that have no hook yet."""
        missing = {p.key: p for p in projections.values() if p.key in keys and p.key not in self._handles}
        if self._forward is None:
            trunk = self._board.trunk
            self._before = trunk.__dict__.get("forward")  # a wrapper of somebody else (accelerate)
            self._forward = PassForward(self._board)
            trunk.forward = self._forward
        for key, live in missing.items():
            if live.projection.experts:
                self._board.experts = True
                hook = ExpertsHook(self._board, key)
                self._handles[key] = live.module.register_forward_hook(hook, with_kwargs=True)
            else:
                self._handles[key] = live.module.register_forward_hook(SiteHook(self._board, key))
        if missing:
            _forget_graphs()

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles.values():
            handle.remove()
        trunk = self._board.trunk
        if self._forward is not None and trunk.__dict__.get("forward") is self._forward:
            del trunk.forward
            if self._before is not None:
                trunk.forward = self._before
        self._handles, self._forward = {}, None
        self._board.closed = True
        _forget_graphs()


def _no_compiling() -> AbstractContextManager[Any]:
    """Waits for graphs being traced in other threads: what they read must not change under them."""
    convert_frame = sys.modules.get("torch._dynamo.convert_frame")
    return getattr(convert_frame, "compile_lock", None) or nullcontext()


def _forget_graphs() -> None:
    """Graphs compiled before a hook came or went do not notice it (dynamo guards no hooks): compile anew."""
    torch.compiler.reset()


def trunk_of(model: nn.Module, path: str) -> nn.Module:
    """The module that runs the decoder layers: called once in every forward pass, through any head or wrapper.

    Args:
        model: the model.
        path: dotted path in it of any module inside a layer, e.g. ``model.layers.0.mlp.up_proj``.
    """
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    layers = numbered[0] - 1 if numbered else 0
    return model.get_submodule(".".join(parts[:layers]))
