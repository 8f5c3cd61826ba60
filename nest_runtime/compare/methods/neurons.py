"""NeST and its controls: patches trained by the recipe itself, applied by the runtime.

``nest`` ties the rows of a cluster, as the paper does; ``nest-loadings`` adds one learned number a neuron.
The random controls have as many neurons and clusters per projection, drawn by seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nest_runtime.compare.methods.base import SET_BY_METHODS, FitData, Learned, Method, Target
from nest_runtime.patch.file import read_patch
from nest_runtime.progress import Progress
from nest_runtime.runtime import PatchRuntime
from nest_runtime.train.pipeline import train_patch
from nest_runtime.train.recipe import Recipe

ROW_GRID = (0.04, 0.08, 0.16, 0.32)  # learning rates in units of the rows' own size
LOADINGS_RATE = 3e-2 / 0.16  # of the loadings, beside that of such rows: as in the default recipe


class Nest(Method):
    """NeST with the rows of a cluster tied, as in the paper.

    The learning rate is in the recipe's unit: absolute, or the size of the rows that are changed (``lr_unit``). In the
    second the recipe's own value is the usual one.
    """

    name = "nest"
    title = "NeST"
    place = 70
    look = ("#D55E00", "h")
    knob = "lr"
    grid = (3e-3, 1e-2, 3e-2, 1e-1)
    fallback = 1e-3
    unused = SET_BY_METHODS - {"lr_unit"}
    loadings = "tied"
    control = "none"

    def grid_for(self, recipe: Recipe) -> tuple[float, ...]:
        """The values that the sweep tries, in the recipe's unit."""
        return self.grid if recipe.lr_unit == "absolute" else ROW_GRID

    def fallback_for(self, recipe: Recipe) -> float:
        """The usual value in the recipe's unit."""
        return self.fallback if recipe.lr_unit == "absolute" else recipe.lr

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """Locate, cluster and tune; the patch file is the artifact."""
        chosen = {"loadings": self.loadings, "control": self.control}
        rate = value if recipe.lr_unit == "absolute" else LOADINGS_RATE * value
        settings = recipe.evolve(lr=value, loadings_lr=rate, **chosen)
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
        return Learned(path, result.report, result.patch.parameters, switch=lambda: patched(target, path))


class NestLoadings(Nest):
    """NeST with a learned loading per neuron: beyond the paper."""

    name = "nest-loadings"
    title = "NeST with loadings"
    place = 71
    look = ("#D55E00", "*")
    loadings = "learned"


class RandomNeurons(Nest):
    """NeST on as many random neurons: does locating matter?"""

    name = "random-neurons"
    title = "random neurons"
    place = 60
    look = ("#999999", "<")
    control = "random"


class RandomLoadings(Nest):
    """Random neurons with learned loadings: the control of ``nest-loadings``."""

    name = "random-loadings"
    title = "random neurons with loadings"
    place = 61
    look = ("#999999", ">")
    usual = False
    loadings = "learned"
    control = "random"


@contextmanager
def patched(target: Target, path: Path) -> Iterator[None]:
    """The patch of a file on the model, read back and checked like any other."""
    patch = read_patch(path)
    with PatchRuntime(target.model, base_hash=target.base_hash) as runtime:
        runtime.activate(runtime.add(patch))
        yield
