"""One evaluation from what is asked to its result: the steps that ``nest.evaluate`` and the command eval share.

Which cases, judges, model and patch are meant has been settled before; run.py does the measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nest_runtime.evaluate.attacks import Attack, apply_attacks
from nest_runtime.evaluate.cases import Case
from nest_runtime.evaluate.judges.base import Judge
from nest_runtime.evaluate.report import EvalResult
from nest_runtime.evaluate.run import evaluate

if TYPE_CHECKING:
    from nest_runtime.evaluate.lm_eval import Tasks
    from nest_runtime.evaluate.standard import Standard
    from nest_runtime.model.load import LoadedModel
    from nest_runtime.patch.patch import Patch
    from nest_runtime.progress import Progress
    from nest_runtime.runtime import PatchRuntime


@dataclass(frozen=True)
class Asked:
    """What a model is asked.

    Attributes:
        others: cases of suites and files beside the standard suite.
        standard: the standard suite, or parts of it; None leaves it out.
        tasks: lm-eval's tasks; None leaves them out.
        attacks: jailbreaks to wrap the harmful cases in.
        seed: of the attacks.
    """

    others: Sequence[Case]
    standard: Standard | None = None
    tasks: Tasks | None = None
    attacks: Sequence[Attack] = ()
    seed: int = 0

    @property
    def cases(self) -> list[Case]:
        """Those of all suites, before attacks."""
        return [*(self.standard.cases if self.standard else ()), *self.others]


@dataclass(frozen=True)
class EvalSession:
    """All that one evaluation needs, checked and loaded.

    Attributes:
        asked: what to ask.
        judges: checked (run.check_judges).
        loaded: the bare model.
        patch: what to measure; None is the bare base.
        batch_size, max_new_tokens: of generation.
        workdir: where answers and verdicts are kept, or None.
    """

    asked: Asked
    judges: Sequence[Judge]
    loaded: LoadedModel
    patch: Patch | None
    batch_size: int = 64
    max_new_tokens: int = 64
    workdir: str | Path | None = None

    def run(self, *, with_base: bool = False, progress: Progress | None = None) -> EvalResult:
        """Measure the patch, and on the same cases the base, where that is asked for. The model is bare afterwards.

        Raises:
            BaseMismatch: the patch is for another base.
        """
        from nest_runtime.runtime import PatchRuntime

        with PatchRuntime(self.loaded.model, base_hash=self.loaded.hash) as runtime:
            if self.patch is not None:
                runtime.add(self.patch)
            cases = self._attacked(runtime, progress)
            result = self._measured(runtime, self.patch, cases, progress)
            if not with_base or self.patch is None:
                return result
            return result.compared_with(self._measured(runtime, None, cases, progress))

    def _attacked(self, runtime: PatchRuntime, progress: Progress | None) -> list[Case]:
        if not self.asked.attacks:
            return self.asked.cases
        model = self.loaded
        with runtime.using(None if self.patch is None else self.patch.digest):  # white-box: against what is measured
            return apply_attacks(
                self.asked.cases,
                self.asked.attacks,
                seed=self.asked.seed,
                model=model.model,
                tokenizer=model.tokenizer,
                progress=progress,
            )

    def _measured(
        self, runtime: PatchRuntime, patch: Patch | None, cases: list[Case], progress: Progress | None
    ) -> EvalResult:
        standard = self.asked.standard
        return evaluate(
            self.loaded.model,
            self.loaded.reader,
            cases,
            self.judges,
            tasks=self.asked.tasks,
            questions=None if standard is None else standard.questions,
            sources=None if standard is None else standard.sources,
            runtime=runtime,
            patch=patch,
            model_name=self.loaded.name,
            base_hash=self.loaded.hash,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            workdir=self.workdir,
            progress=progress,
        )
