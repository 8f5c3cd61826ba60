"""Several processes that train one patch together: who does which share, and how the shares are joined.

Each process holds the whole model and works on its share of prompts and rows; accelerate sets them up
(``accelerate launch``, or its notebook launcher) and carries what they tell each other. A process alone is
a team of one, and nothing here costs it anything. All work folders must be seen by every process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # a process waits while the main one fits probes and clusters


@dataclass(frozen=True)
class Workers:
    """One process among those that work together.

    Attributes:
        rank: its number, from 0.
        count: how many they are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Workers:
        """The process at hand; joins the others on the first call, where a launcher started several."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 and not _joined():
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(int(state.process_index), int(state.num_processes))

    @property
    def main(self) -> bool:
        """Whether this process writes results and speaks to the user."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share: every ``count``-th item, from its rank on."""
        return list(items[self.rank :: self.count])

    def file(self, folder: Path, name: str) -> Path:
        """A file of this process alone in a folder that all of them use; ``name`` itself for one alone."""
        path = folder / name
        return path if self.alone else path.with_stem(f"{path.stem}-{self.rank}of{self.count}")

    def sum_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replace each gradient, of any shape and dtype, by the sum over all processes; none counts as zero."""
        if self.alone:
            return
        from accelerate.utils import reduce

        chosen = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in chosen:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in chosen])  # type: ignore[union-attr]
        total: torch.Tensor = reduce(flat, "sum")
        for parameter, part in zip(chosen, total.split([p.numel() for p in chosen]), strict=True):
            parameter.grad.copy_(part.reshape(parameter.shape))  # type: ignore[union-attr]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Everybody's numbers, added up by position."""
        return list(values) if self.alone else [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank."""
        if self.alone:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def from_main(self, compute: Callable[[], T]) -> T:
        """What the main process makes of ``compute``, for everybody; an error in it is raised by all of them."""
        if self.alone:
            return compute()
        from accelerate.utils import broadcast_object_list

        sent: list[Any] = [None, None]
        if self.main:
            try:
                sent[0] = compute()
            except Exception as error:
                sent[1] = error
        broadcast_object_list(sent)
        if sent[1] is not None:
            raise sent[1]
        return sent[0]

    def wait(self) -> None:
        """Until everybody is here."""
        self.gather(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the block before the others do."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
