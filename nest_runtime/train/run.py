"""One training run: its stages in order, what they share, and the clock.

pipeline.py is the door to this: it checks the arguments and keeps the work folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nest_runtime.io import read_json, write_json
from nest_runtime.model.anatomy import Projection, unwrap
from nest_runtime.model.base_rows import rows_digest
from nest_runtime.patch.patch import Patch
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import Example
from nest_runtime.prompts.generate import ModelAnswer, answer_conversations, end_token_ids, pad_token_id
from nest_runtime.train.activations import PooledActivations, pooled_activations
from nest_runtime.train.causal import refusal_effects
from nest_runtime.train.cluster import cluster
from nest_runtime.train.deltas import Deltas
from nest_runtime.train.forward import device_of
from nest_runtime.train.locate import chosen_projections, keep_neurons, locate
from nest_runtime.train.recipe import Recipe
from nest_runtime.train.result import TrainResult, created_now, data_note, notes_on, patch_site
from nest_runtime.train.sites import LocatedSite, SitesFile
from nest_runtime.train.stages import stage_folder, stage_key
from nest_runtime.train.teaching import ASKED, Teaching, own_refusals, refusal_row, teach
from nest_runtime.train.tune import TuneResult, tune
from nest_runtime.train.warm_start import Moved, WarmStart, carried_values, moved_to, parent_sites, parent_values
from nest_runtime.train.workers import Workers

REFUSAL_TOKENS = 24  # of the base's answers that show how it refuses
_LOCATE_FIELDS = ("pooling", "probe", "probe_lr", "probe_steps", "probe_weight_decay", "probe_holdout", "seed")


class Run:
    """One training run: what its stages share, and the clock."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        projections: Sequence[Projection],
        settings: Recipe,
        base_hash: str,
        base_model: str,
        folder: Path,
        progress: Progress | None,
        workers: Workers | None = None,
    ) -> None:
        self.model, self.tokenizer, self.projections, self.settings = model, tokenizer, projections, settings
        self.base_hash, self.base_model, self.folder, self.progress = base_hash, base_model, folder, progress
        self.workers = workers or Workers()
        self.seconds: dict[str, float] = {}
        self.moved: Moved | None = None  # of a parent made for another base

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """A context whose seconds are added to a stage's."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began

    def rounded_seconds(self) -> dict[str, float]:
        """Seconds by stage, to two digits."""
        return {stage: round(value, 2) for stage, value in self.seconds.items()}

    def locate(self, harmful: Sequence[Example], benign: Sequence[Example]) -> SitesFile:
        """Activations, probes, clusters."""
        settings, examples = self.settings, [*harmful, *benign]
        projections = chosen_projections(self.projections, settings)
        labels = [1] * len(harmful) + [0] * len(benign)
        key = stage_key(
            base=self.base_hash,
            prompts=[list(example.messages) for example in examples],
            labels=labels,
            settings={field: getattr(settings, field) for field in _LOCATE_FIELDS},
            sites=[projection.name for projection in projections],
            batches=[settings.prompt_batch, settings.batch_tokens],
        )
        with self.clock("locate"):
            activations = pooled_activations(
                self.model,
                self.tokenizer,
                [example.messages for example in examples],
                projections,
                pooling=settings.pooling,
                batch_size=settings.prompt_batch,
                batch_tokens=settings.batch_tokens,
                workdir=self.folder,
                key=self.base_hash,
                workers=self.workers,
                progress=self.progress,
            )
            found = self.workers.from_main(
                lambda: (
                    self.probe(activations, labels, key)
                    if settings.score == "probe"
                    else self.causal(projections, harmful)
                )
            )
        with self.clock("cluster"):
            found = self.workers.from_main(lambda: cluster(activations, found, settings, progress=self.progress))
        data = {"harmful": data_note(harmful), "benign": data_note(benign)}
        return SitesFile(tuple(found), settings.to_json(), data, self.base_hash, self.base_model)

    def probe(self, activations: PooledActivations, labels: Sequence[int], key: str) -> list[LocatedSite]:
        """Probes of pooled activations, finished ones taken up again."""
        folder = stage_folder(self.folder, "probes", key)
        device = device_of(self.model)
        return locate(activations, labels, self.settings, workdir=folder, device=device, progress=self.progress)

    def causal(self, projections: Sequence[Projection], harmful: Sequence[Example]) -> list[LocatedSite]:
        """Sites of the neurons that the base's refusals rest on."""
        settings, ends = self.refusing(harmful), end_token_ids(self.model, self.tokenizer)
        rows = [refusal_row(self.tokenizer, example, settings, ends) for example in harmful]
        pad = pad_token_id(self.model, self.tokenizer)
        effects = refusal_effects(
            self.model, rows, projections, pad, step_tokens=settings.step_tokens, progress=self.progress
        )
        return keep_neurons(projections, effects, [None] * len(projections), settings)

    def train(
        self,
        harmful: Sequence[Example],
        benign: Sequence[Example],
        rehearsal: Sequence[Example],
        parent: Patch | None,
        name: str,
        version: str,
        serial: int | None,
    ) -> TrainResult:
        """Run all stages: answers, locate, cluster, tune.

        Args:
            harmful: prompts to refuse.
            benign: prompts to answer as before.
            rehearsal: earlier harmful prompts to tune on besides; empty without a parent.
            parent: the patch to start from, or None.
            name, version: of the new patch.
            serial: of the new patch; None counts up from the parent's.

        Returns:
            The patch and the report.

        Raises:
            DataError, TrainingError: the prompts or the training do not allow a patch.
        """
        with self.clock("answers"):
            teaching = self.teaching(harmful, benign, rehearsal)
        sites, starts, carried = self.sites(teaching.harmful.located, teaching.benign.located, parent)
        rows, held = teaching.train, teaching.validation
        loadings = self.settings.loadings
        deltas = Deltas(self.model, self.projections, sites, loadings, starts)
        with self.clock("tune"):
            key = stage_key(
                base=self.base_hash,
                parent=parent.digest if parent else None,
                settings=self.settings.to_json(),
                sites=[[site.site, list(site.neurons), list(site.clusters)] for site in sites],
                rows=[row.content for row in [*rows, *held]],
                split=len(rows),
            )
            with self.workers.main_first():
                folder = stage_folder(self.folder, "tune", key)
            tuned = tune(
                self.model,
                self.tokenizer,
                deltas,
                rows,
                held,
                self.settings,
                workdir=folder,
                workers=self.workers,
                progress=self.progress,
            )
        data = {"harmful": data_note(harmful), "benign": data_note(benign)}
        if rehearsal:
            data["rehearsal"] = data_note(rehearsal)
        patch = self.patch(deltas, sites, tuned, parent, data, name, version, serial)
        return TrainResult(patch, self.report(patch, deltas, tuned, carried, teaching))

    def teaching(
        self, harmful: Sequence[Example], benign: Sequence[Example], rehearsal: Sequence[Example] = ()
    ) -> Teaching:
        """The rows to learn from, with the base's answers where the benign prompts bring none."""
        settings, ends = self.refusing(harmful), end_token_ids(self.model, self.tokenizer)

        def answers(examples: Sequence[Example], beginnings: Sequence[str] = ()) -> list[ModelAnswer]:
            return self.answers(examples, "otherwise" if beginnings else "answers", beginnings=beginnings)

        return teach(self.tokenizer, harmful, benign, rehearsal, settings, ends, answers)

    def refusing(self, harmful: Sequence[Example]) -> Recipe:
        """The recipe with the base's own refusal among its texts, where it asks for that and the base refuses."""
        if not self.settings.own_refusals or self.settings.refusals:
            return self.settings
        shown = [example for example in harmful if not example.response][:ASKED]
        asked = self.answers(shown, "refusals", REFUSAL_TOKENS) if shown else []
        return self.settings.evolve(refusals=own_refusals(asked))

    def answers(
        self, examples: Sequence[Example], stage: str = "answers", tokens: int = 0, beginnings: Sequence[str] = ()
    ) -> list[ModelAnswer]:
        """The base's own greedy answers, at most ``tokens`` (or ``answer_tokens``) long; saved batch by batch.

        None begins with the first token of one of the ``beginnings``.
        """
        prompts = [list(example.messages) for example in examples]
        tokens, size = tokens or self.settings.answer_tokens, self.settings.prompt_batch
        banned = sorted({self.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in beginnings})
        more = {"banned": banned} if banned else {}
        key = stage_key(base=self.base_hash, prompts=prompts, tokens=tokens, size=size, **more)
        with self.workers.main_first():
            path = self.workers.file(stage_folder(self.folder, stage, key), "answers.json")
        known: dict[str, list[Any]] = read_json(path) or {}
        left = [place for place in self.workers.share(range(len(prompts))) if str(place) not in known]

        def keep(positions: list[int], answers: list[ModelAnswer]) -> None:
            found = zip(positions, answers, strict=True)
            known.update({str(left[position]): [answer.text, answer.whole] for position, answer in found})
            write_json(path, known)

        answer_conversations(
            self.model,
            self.tokenizer,
            [prompts[place] for place in left],
            max_new_tokens=tokens,
            batch_size=size,
            not_first=banned,
            on_batch=keep,
            progress=self.progress,
        )
        everything = {place: value for part in self.workers.gather(known) for place, value in part.items()}
        return [ModelAnswer(*everything[str(place)]) for place in range(len(prompts))]

    def sites(
        self, harmful: Sequence[Example], benign: Sequence[Example], parent: Patch | None
    ) -> tuple[tuple[LocatedSite, ...], WarmStart | None, float | None]:
        """The sites to tune, their starting values, and how much of a parent those carry."""
        if parent is not None and parent.base_hash != self.base_hash:
            found = self.locate(harmful, benign).sites
            self.moved = moved_to(parent, found, self.projections, self.settings.loadings)
            return self.moved.sites, self.moved.starts, round(self.moved.carried, 6)
        if parent is not None and not self.settings.relocate:
            self.seconds.update(locate=0.0, cluster=0.0)
            return parent_sites(parent, self.projections), parent_values(parent), 1.0
        found = self.locate(harmful, benign).sites
        if parent is None:
            return found, None, None
        starts, carried = carried_values(parent, found, self.settings.loadings)
        return found, starts, round(carried, 6)

    def patch(
        self,
        deltas: Deltas,
        sites: Sequence[LocatedSite],
        tuned: TuneResult,
        parent: Patch | None,
        data: Mapping[str, Any],
        name: str,
        version: str,
        serial: int | None,
    ) -> Patch:
        """The validated Patch of tuned rows, with its header.

        Args:
            deltas: the tuned rows and loadings.
            sites: all sites, those without neurons too.
            tuned: figures before and after tuning.
            parent: the patch that training started from, or None.
            data: digests and counts of the prompts, for the header.
            name, version, serial: of the new patch; a serial of None counts up from the parent's.
        """
        made = {found.site.site: found for found in deltas.sites}
        dtype = getattr(torch, self.settings.delta_dtype)
        values = tuple(patch_site(site, made.get(site.site), dtype) for site in sites)
        return Patch(
            name=name,
            version=version,
            serial=serial if serial is not None else (parent.serial + 1 if parent else 1),
            base_hash=self.base_hash,
            rows_digest=rows_digest(self.model, {site.name: site.neurons.tensor() for site in values}),
            base_model=self.base_model,
            architecture=type(unwrap(self.model)).__name__,
            parent=parent.digest if parent else None,
            sites=values,
            method=self.method(parent),
            data=data,
            metrics={"validation": {"before": tuned.before, "after": tuned.after}},
            created=created_now(),
        )

    def method(self, parent: Patch | None) -> dict[str, Any]:
        """How the patch was made, for its header."""
        facts = {"name": "NeST", "paper": "arXiv 2602.16835", "recipe": self.settings.to_json()}
        if parent is not None and self.moved is not None:
            facts["retargeted_from"] = {"base_hash": parent.base_hash, "base_model": parent.base_model}
        return facts

    def report(
        self, patch: Patch, deltas: Deltas, tuned: TuneResult, carried: float | None, teaching: Teaching
    ) -> dict[str, Any]:
        """What ``train --json`` prints: counts, figures, history and seconds, as JSON values."""
        moved = None if self.moved is None else {key: getattr(self.moved, key) for key in ("kept", "added", "dropped")}
        return {
            "digest": patch.digest,
            "parameters": patch.parameters,
            "trainable": deltas.trainable,
            "neurons": patch.neurons,
            "clusters": patch.clusters,
            "parent": patch.parent,
            "parent_kept": carried,
            **({"parent_neurons": moved} if moved else {}),
            "rows": {"train": len(teaching.train), "validation": sum(not row.probe for row in teaching.validation)},
            "validation": {"before": tuned.before, "after": tuned.after},
            "steps": tuned.steps,
            "best_step": tuned.best_step,
            "history": tuned.history,
            "notes": [*teaching.notes, *notes_on(tuned)],
            "seconds": self.rounded_seconds(),
        }
