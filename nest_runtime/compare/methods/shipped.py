"""A patch that exists already, as one more row of the comparison: nothing is trained, nothing is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nest_runtime.compare.methods.base import FitData, Fitted, Learned, Method, Target
from nest_runtime.compare.methods.neurons import patched
from nest_runtime.errors import UsageError
from nest_runtime.patch.patch import Patch
from nest_runtime.patch.values import thaw_json
from nest_runtime.progress import Progress
from nest_runtime.runtime import PatchRuntime
from nest_runtime.train.recipe import Recipe


class Shipped(Method):
    """A finished patch. What its training took is known only where its header says so.

    Args:
        patch: for the model that is compared on.
        name: of its row.
    """

    knob = ""
    seeded = False

    def __init__(self, patch: Patch, name: str) -> None:
        self.patch, self.name, self.title = patch, name, name
        self.revision = patch.digest

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
        """Write the patch; seconds are those in its header, memory is not known."""
        fitted = super().fit(target, data, recipe, value=value, workdir=workdir, progress=progress)
        return replace(fitted, seconds=training_seconds(self.patch), peak_bytes=None)

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """Nothing to learn: the patch file as it ships."""
        path = self.patch.save(folder / "patch.safetensors")
        report = {"digest": self.patch.digest, "neurons": self.patch.neurons, "data": thaw_json(self.patch.data)}
        return Learned(path, report, self.patch.parameters, switch=lambda: patched(target, path))


def shipped(patches: Sequence[Patch], target: Target) -> list[Shipped]:
    """One row per patch, named ``name@version``; each is put on the model once, to see that it fits.

    Raises:
        UsageError: a patch is given twice.
        BaseMismatch, SiteMismatch: a patch was made for another model.
    """
    rows: dict[str, Shipped] = {}
    for patch in patches:
        name = patch.label
        if patch.digest in {row.revision for row in rows.values()}:
            raise UsageError(f"the patch {name} is given twice", "name each patch once")
        with PatchRuntime(target.model, base_hash=target.base_hash) as runtime:
            runtime.add(patch)
        if name in rows:  # another patch of the same name and version
            name = f"{name}-{patch.digest.removeprefix('sha256:')[:8]}"
        rows[name] = Shipped(patch, name)
    return list(rows.values())


def training_seconds(patch: Patch) -> float | None:
    """``metrics.seconds`` of the header, a number or numbers by stage; None if it is not there."""
    found = patch.metrics.get("seconds")
    values = list(found.values()) if isinstance(found, Mapping) else [found]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return sum(numbers) if numbers and len(numbers) == len(values) else None
