"""General ability by lm-eval (EleutherAI's Language Model Evaluation Harness; extra ``eval``) on the model as it is.

The patch that is active in the caller's context answers. Tasks are loaded, and their data fetched, before anything is
generated. Answers are kept in a ledger, request by request, so that an interrupted run continues.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from nest_runtime.errors import EvaluationError, NestError, UsageError
from nest_runtime.evaluate.ability import Score, finite
from nest_runtime.evaluate.ledger import Ledger
from nest_runtime.evaluate.rounds import Subject
from nest_runtime.install import extra
from nest_runtime.progress import Progress

PREFIX = "lm-eval:"
BOOTSTRAPS = 1000  # for the standard errors of metrics that are no means


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks.

    Attributes:
        loaded: what lm-eval's TaskManager gave.
        names: as asked for, patterns resolved.
        limit: documents of each task, the first ones; None for all.
        shots: examples in the prompt; None for each task's own number.
    """

    loaded: Mapping[str, Any]
    names: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None

    @property
    def group_of(self) -> dict[str, str]:
        """The group that a task or group is a direct part of."""
        groups = self.loaded.get("group_map") or {}
        return {child: group for group, children in groups.items() for child in children}


def split_suites(suites: Iterable[str]) -> tuple[list[str], list[str]]:
    """Suites of cases, and the task names in ``lm-eval:a,b`` among them.

    Raises:
        UsageError: ``lm-eval:`` without a task.
    """
    names = list(suites)
    own = [name for name in names if not name.startswith(PREFIX)]
    asked = [name.removeprefix(PREFIX).split(",") for name in names if name.startswith(PREFIX)]
    tasks = [task.strip() for group in asked for task in group]
    if any(not task for task in tasks):
        raise UsageError(f"{PREFIX} without a task's name", f"name tasks with commas between: {PREFIX}gsm8k,mmlu")
    return own, list(dict.fromkeys(tasks))


def load_tasks(
    names: Sequence[str], *, include: Path | None = None, limit: int | None = None, shots: int | None = None
) -> Tasks:
    """Find tasks by name or pattern and fetch their data.

    Args:
        names: of lm-eval's own tasks and groups, or of those in ``include``.
        include: a folder with task files (YAML) of one's own.
        limit, shots: see :class:`Tasks`.

    Raises:
        NestError: lm-eval is not installed.
        UsageError: there is no such task or folder.
        EvaluationError: a task's data cannot be had.
    """
    _require()
    if include is not None and not include.is_dir():
        raise UsageError(
            f"--lm-eval-include {include} is no folder", "name the folder that holds the tasks' YAML files"
        )
    with _quiet():
        manager, found = _find(names, include)
        loaded = {}
        try:
            loaded = manager.load(found)
        except Exception as error:  # whatever a task's code, a data set's or the network's may raise
            raise EvaluationError(
                f"lm-eval cannot load {', '.join(found)}: {type(error).__name__}: {_first_line(error)}",
                "a task's data comes from the Hub when it is first used: check the connection, or give tasks with "
                "local data by --lm-eval-include DIR",
            ) from error
    for task in loaded["tasks"].values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=0)
    return Tasks(loaded, tuple(found), limit, shots)


def measure(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    subject: Subject,
    *,
    batch_size: int = 64,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Score, ...]:
    """Scores of a model, under whatever patch is active in the caller's context.

    Prompts go through the chat template where the tokenizer has one, examples as earlier turns.

    Args:
        model, tokenizer: a causal LM and its tokenizer; neither is changed.
        tasks: from :func:`load_tasks`.
        subject: names what answers; part of the key under which answers are kept.
        batch_size: requests in one padded batch.
        workdir: where answers are kept; a second run continues from there.
        progress: called as ``(stage, done, total)``.

    Raises:
        EvaluationError: lm-eval cannot run a task on this model.
    """
    from lm_eval import evaluate

    from nest_runtime.evaluate.lm_eval_model import Harness

    ledger = Ledger(None if workdir is None else Path(workdir) / "ability.jsonl")
    with _quiet():
        lm = Harness(model, tokenizer, ledger, subject, batch_size, progress)
        try:
            results = evaluate(
                lm,
                tasks.loaded,
                limit=tasks.limit,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=True,
                apply_chat_template=bool(getattr(tokenizer, "chat_template", None)),
                fewshot_as_multiturn=True,
            )
        except NestError:
            raise
        except Exception as error:  # tasks run code of their own
            raise EvaluationError(
                f"lm-eval fails on {', '.join(tasks.names)}: {type(error).__name__}: {_first_line(error)}",
                "check that the task suits this model (context length, kind of task); other tasks can still be run",
            ) from error
    return tuple(_scores(results, tasks))


def settings(tasks: Tasks, tokenizer: Any) -> dict[str, Any]:
    """How the tasks are run, for the report."""
    shots = {name: task.get_config("num_fewshot") for name, task in tasks.loaded["tasks"].items()}
    return {
        "lm_eval": metadata.version("lm-eval"),
        "limit": tasks.limit,
        "shots": shots,
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
    }


def _require() -> None:
    if find_spec("lm_eval") is None:
        raise NestError(f"suites {PREFIX}… need lm-eval, which is not installed", extra("eval"))


def _find(names: Sequence[str], include: Path | None) -> tuple[Any, list[str]]:
    """The manager of a folder's own tasks where they are all there, else of lm-eval's too (which takes a while)."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        manager = TaskManager(include_path=str(include), include_defaults=False)
        found = [manager.match_tasks([name]) for name in names]
        if all(found):
            return manager, list(dict.fromkeys(name for group in found for name in group))
    manager = TaskManager(include_path=None if include is None else str(include))
    found = [manager.match_tasks([name]) for name in names]
    for name, group in zip(names, found, strict=True):
        if not group:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(close)}? " if close else ""
            raise UsageError(f"lm-eval has no task {name!r}", f"{hint}`lm-eval ls tasks` lists them")
    return manager, list(dict.fromkeys(name for group in found for name in group))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _scores(results: Mapping[str, Any], tasks: Tasks) -> Iterator[Score]:
    """Every metric of every task and group, in lm-eval's order, groups before their parts."""
    groups = tasks.loaded.get("group_map") or {}
    order = sorted(results["results"], key=lambda name: name not in groups)  # stable
    for task in order:
        figures = results["results"][task]
        for key, value in figures.items():
            metric, comma, extraction = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            samples = _samples(results, _leaves(task, groups), metric, extraction)
            stderr = figures.get(f"{metric}_stderr,{extraction}")
            n = (figures.get("sample_count") or {}).get(key) or figures.get("sample_len") or len(samples)
            yield Score(
                task=task,
                metric=metric,
                filter=extraction,
                value=float(value),
                stderr=finite(float(stderr)) if isinstance(stderr, int | float) else None,
                n=int(n),
                higher_is_better=results.get("higher_is_better", {}).get(task, {}).get(metric),
                group=tasks.group_of.get(task, ""),
                samples=samples if samples and abs(fmean(samples.values()) - value) < 1e-9 else {},
            )


def _leaves(task: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    if task not in groups:
        return [task]
    return [leaf for child in groups[task] for leaf in _leaves(child, groups)]


def _samples(results: Mapping[str, Any], leaves: Sequence[str], metric: str, extraction: str) -> dict[str, float]:
    """The documents' own values of a metric, as far as they are numbers."""
    return {
        f"{leaf}/{sample['doc_id']}": float(sample[metric])
        for leaf in leaves
        for sample in results["samples"].get(leaf, [])
        if sample["filter"] == extraction and isinstance(sample.get(metric), int | float)
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' own bars and remarks; failures come as errors anyway."""
    import datasets
    import lm_eval.api.task
    from tqdm import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [logger.level for logger in loggers]
    bars = datasets.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **options: tqdm(items, **{**options, "disable": True})
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        if bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
