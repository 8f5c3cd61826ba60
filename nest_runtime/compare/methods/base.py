"""What every method of the comparison is: something that can be fitted, applied to the model, and taken off.

A method trains on a :class:`FitData` under a recipe (train/recipe.py): steps, batch, schedule, validation and early
stop are the same for all. It has one value of its own knob, which is the learning rate, or for methods that train
nothing their one setting. Fitting leaves the model as it was, bit for bit; ``applied`` puts the method on it and takes
it off again. compare/compare.py evaluates.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest_runtime.compare.methods.memory import measured
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import Example
from nest_runtime.prompts.generate import generate_answers
from nest_runtime.train.batches import Row
from nest_runtime.train.forward import device_of
from nest_runtime.train.recipe import Recipe

Message = Mapping[str, str]
Conversation = Sequence[Message]
OnBatch = Callable[[list[int], list[str]], None]
Rewrite = Callable[[Conversation], list[dict[str, str]]]
Screen = Callable[[Conversation, str | None], str | None]

# Recipe fields that every method sets itself, and those that only finding and grouping neurons reads.
SET_BY_METHODS = frozenset({"lr", "lr_unit", "loadings", "loadings_lr", "control"})
LOCATING = frozenset(
    {"pooling", "probe", "probe_lr", "probe_steps", "probe_weight_decay", "probe_holdout", "z", "sign"}
    | {"normalization", "depth_from", "depth_to", "k_min", "k_max", "min_silhouette", "align_signs", "relocate"}
)


@dataclass(frozen=True)
class Target:
    """The model to defend, and what names it.

    Attributes:
        model: a causal LM in eval mode, no patch on it.
        tokenizer: its tokenizer.
        base_hash: the model hash, as in a patch's header.
        name: for people.
    """

    model: Any
    tokenizer: Any
    base_hash: str
    name: str = ""


@dataclass(frozen=True)
class FitData:
    """The prompts all methods learn from, split once into training and validation.

    Attributes:
        harmful, benign: all examples, in the user's order; benign ones with the answers to keep.
        train_harmful, train_benign, held_harmful, held_benign: the same, split.
        train, validation: token rows of the two parts, refusals and kept answers included.
    """

    harmful: tuple[Example, ...]
    benign: tuple[Example, ...]
    train_harmful: tuple[Example, ...]
    train_benign: tuple[Example, ...]
    held_harmful: tuple[Example, ...]
    held_benign: tuple[Example, ...]
    train: tuple[Row, ...]
    validation: tuple[Row, ...]

    @property
    def rows(self) -> dict[str, int]:
        """How many rows each part has, without probes."""
        return {"train": len(self.train), "validation": sum(not row.probe for row in self.validation)}


@dataclass(frozen=True)
class Fitted:
    """A fitted method: what it took, what it ships, and how to switch it on.

    Attributes:
        method: its name.
        trainable: numbers that were trained; 0 for methods that train none.
        artifact: the file or folder that ships, or None if nothing does.
        artifact_bytes: its size on disk, files of a folder added up.
        seconds: wall-clock time of fitting; None if it is not known.
        peak_bytes: the most memory that fitting took beyond what was in use before (memory.py); None likewise.
        report: what else is worth keeping, JSON values: steps, losses, counts.
        switch: a context manager that puts the method on the model.
        rewrite: changes a conversation before the model reads it.
        screen: ``(conversation, answer or None) -> answer``: given None, an answer without asking the model,
            or None to ask it; given the model's answer, that or another one.
    """

    method: str
    trainable: int
    artifact: Path | None
    artifact_bytes: int
    seconds: float | None
    peak_bytes: int | None
    report: Mapping[str, Any]
    switch: Callable[[], AbstractContextManager[Any]]
    rewrite: Rewrite | None = None
    screen: Screen | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the method's weights on it; the bare base afterwards, bit for bit."""
        with self.switch():
            yield

    def answers(
        self,
        target: Target,
        conversations: Sequence[Conversation],
        on_batch: OnBatch | None = None,
        *,
        max_new_tokens: int = 64,
        batch_size: int = 64,
    ) -> list[str]:
        """Greedy answers under this method, in the order of the conversations.

        Args:
            target: the model the method was fitted on.
            conversations: messages, ending with the user's turn.
            on_batch: called as (positions, answers) as answers come, e.g. to keep them.
            max_new_tokens: the longest answer.
            batch_size: conversations in one padded batch.
        """
        screen = self.screen or (lambda messages, answer: answer)
        known = [screen(messages, None) for messages in conversations]
        result = [answer or "" for answer in known]
        asked = [index for index, answer in enumerate(known) if answer is None]
        blocked = [index for index, answer in enumerate(known) if answer is not None]

        def keep(positions: list[int], texts: list[str]) -> None:
            """Screen a batch's answers and put them where their conversations stand."""
            places = [asked[position] for position in positions]
            for index, text in zip(places, texts, strict=True):
                result[index] = screen(conversations[index], text) or ""
            if on_batch is not None:
                on_batch(places, [result[index] for index in places])

        if blocked and on_batch is not None:
            on_batch(blocked, [result[index] for index in blocked])
        prompts = [self.rewrite(conversations[i]) if self.rewrite else conversations[i] for i in asked]
        with self.applied():
            generate_answers(
                target.model,
                target.tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_batch=keep,
            )
        return result


@dataclass(frozen=True)
class Learned:
    """What a method made of the data: :class:`Fitted` without the measurements."""

    artifact: Path | None
    report: Mapping[str, Any]
    trainable: int = 0
    switch: Callable[[], AbstractContextManager[Any]] = nullcontext
    rewrite: Rewrite | None = None
    screen: Screen | None = None


class Method(ABC):
    """One way to make a model safer. Subclasses give its name and ``learn``.

    Attributes:
        name: as users type it.
        title: as tables print it.
        place: the order of its row in tables; the base's is 0.
        look: color and marker in all pictures; None takes the next free one.
        usual: whether ``compare`` takes it if no methods are named.
        needs: packages beyond this one's own; each is also the name of the extra that installs it.
        knob: the one setting that the sweep chooses: ``lr`` if something is trained; "" if there is none.
        grid: the knob's values that the sweep tries; as many for every method that has a knob.
        fallback: the value for a model without a sweep. A method may have others for other recipes (``grid_for``).
        seeded: whether another seed can give another result.
        unused: names of recipe fields without effect on it.
        revision: changed whenever the method comes to compute something else with the same settings: finished cells
            of a comparison are then made again.
    """

    name: str
    title: str
    place: int = 100
    look: tuple[str, str] | None = None
    usual: bool = True
    needs: tuple[str, ...] = ()
    knob: str = "lr"
    grid: tuple[float, ...] = ()
    fallback: float = 0.0
    seeded: bool = True
    unused: frozenset[str] = SET_BY_METHODS | LOCATING
    revision: str = "1"

    def grid_for(self, recipe: Recipe) -> tuple[float, ...]:
        """The values that the sweep tries under a recipe."""
        return self.grid

    def fallback_for(self, recipe: Recipe) -> float:
        """The value under a recipe, for a model without a sweep."""
        return self.fallback

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
        """Learn from ``data``, write the artifact, and measure what that takes.

        Args:
            target: the bare model; the same bits afterwards.
            data: what to learn from.
            recipe: steps, batches, schedule, early stop and seed; the same for every method.
            value: of the knob.
            workdir: the artifact goes into a folder of the method's name here; whatever is there is removed.
            progress: called as (stage, done, total).

        Raises:
            TrainingError, ModelError: it cannot be fitted on this model.
        """
        folder = workdir / self.name
        if folder.exists():  # an interrupted run's
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        with measured(device_of(target.model)) as cost:
            learned = self.learn(target, data, recipe, value, folder, progress)
        return Fitted(
            method=self.name,
            trainable=learned.trainable,
            artifact=learned.artifact,
            artifact_bytes=artifact_size(learned.artifact),
            seconds=cost.seconds,
            peak_bytes=cost.peak_bytes,
            report=learned.report,
            switch=learned.switch,
            rewrite=learned.rewrite,
            screen=learned.screen,
        )

    @abstractmethod
    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """What ``fit`` measures: learn, and write the artifact into the empty ``folder``."""


def artifact_size(path: Path | None) -> int:
    """Bytes of a file, or of all files below a folder."""
    if path is None:
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
