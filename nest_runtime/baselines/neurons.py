"""NeST and its controls: patches trained by the recipe itself, applied by the runtime.

``nest`` ties the rows of a cluster, as the paper does; ``nest-loadings`` adds one learned number a neuron.
The random controls have as many neurons and clusters per projection, drawn by seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from nest_runtime.baselines.base import FitData, Fitted, Progress, Target, artifact_size
from nest_runtime.baselines.memory import measured
from nest_runtime.baselines.parameters import fresh_folder
from nest_runtime.patchfile import read_patch
from nest_runtime.runtime import PatchRuntime
from nest_runtime.train.forward import device_of
from nest_runtime.train.recipe import train_patch
from nest_runtime.train.settings import Recipe


class Nest:
    """NeST with the rows of a cluster tied, as in the paper."""

    name: ClassVar[str] = "nest"
    title: ClassVar[str] = "NeST"
    knob: ClassVar[str] = "lr"
    grid: ClassVar[tuple[float, ...]] = (3e-3, 1e-2, 3e-2, 1e-1)
    fallback: ClassVar[float] = 1e-3
    seeded: ClassVar[bool] = True
    revision: ClassVar[str] = "1"
    changes: ClassVar[dict[str, Any]] = {"loadings": "tied", "control": "none"}

    def fit(
        self,
        target: Target,
        data: FitData,
        recipe: Recipe,
        *,
        value: float,
        workdir: Path,
        progress: Progress | None = None,
    ) -> Fitted:
        """Locate, cluster and tune; the patch file is the artifact."""
        folder = fresh_folder(workdir, self.name)
        settings = recipe.evolve(lr=value, loadings_lr=value, lr_unit="absolute", **self.changes)
        with measured(device_of(target.model)) as cost:
            result = train_patch(
                target.model,
                target.tokenizer,
                data.harmful,
                data.benign,
                recipe=settings,
                name=self.name,
                version="v1",
                base_hash=target.base_hash,
                base_model=target.name,
                workdir=folder / "work",
                progress=progress,
            )
            path = result.patch.save(folder / "patch.safetensors")
        return Fitted(
            method=self.name,
            trainable=result.patch.parameters,
            artifact=path,
            artifact_bytes=artifact_size(path),
            seconds=cost.seconds,
            peak_bytes=cost.peak_bytes,
            report=result.report,
            switch=lambda: _patched(target, path),
        )


class NestLoadings(Nest):
    """NeST with a learned loading per neuron: beyond the paper."""

    name: ClassVar[str] = "nest-loadings"
    title: ClassVar[str] = "NeST with loadings"
    changes: ClassVar[dict[str, Any]] = {"loadings": "learned", "control": "none"}


class RandomNeurons(Nest):
    """NeST on as many random neurons: does locating matter?"""

    name: ClassVar[str] = "random-neurons"
    title: ClassVar[str] = "random neurons"
    changes: ClassVar[dict[str, Any]] = {"loadings": "tied", "control": "random"}


class RandomLoadings(Nest):
    """Random neurons with learned loadings: the control of ``nest-loadings``."""

    name: ClassVar[str] = "random-loadings"
    title: ClassVar[str] = "random neurons with loadings"
    changes: ClassVar[dict[str, Any]] = {"loadings": "learned", "control": "random"}


@contextmanager
def _patched(target: Target, path: Path) -> Iterator[None]:
    """The patch of a file on the model, read back and checked like any other."""
    patch = read_patch(path)
    with PatchRuntime(target.model, base_hash=target.base_hash) as runtime:
        runtime.activate(runtime.add(patch))
        yield
