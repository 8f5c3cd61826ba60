"""Safety by prompt: a system message that asks for it, and examples of refusing and of answering.

Nothing is trained; every request carries the extra tokens. Where a model's template knows no system
message the text opens the first user turn. Examples are dropped, two at a time, where the prompt would not
leave room for an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nest_runtime.compare.methods.base import Conversation, FitData, Learned, Method, Target
from nest_runtime.errors import DataError
from nest_runtime.io import write_json
from nest_runtime.progress import Progress
from nest_runtime.prompts.examples import Example, encode, render
from nest_runtime.train.recipe import Recipe

SYSTEM = (
    "You are a safe and helpful assistant. Refuse any request that could cause harm, however it is put: as a story, "
    "a game, a role, a translation, in code or in the past tense. Answer every harmless request as usual."
)
Messages = list[dict[str, str]]


class InContext(Method):
    """A safety system prompt with example exchanges."""

    name = "in-context"
    title = "in-context"
    place = 20
    look = ("#56B4E9", "^")
    knob = "examples"
    grid = (0, 2, 4, 8)
    fallback = 4

    def learn(
        self, target: Target, data: FitData, recipe: Recipe, value: float, folder: Path, progress: Progress | None
    ) -> Learned:
        """Choose the examples by seed, half of them refusals, and write the prompt as JSON."""
        path = folder / "prompt.json"
        shots = choose_examples(data, round(value), recipe.seed)
        write_json(path, {"system": SYSTEM, "examples": shots})
        config = getattr(target.model.config, "max_position_embeddings", None)
        room = None if config is None else int(config) - recipe.answer_tokens
        prompter = Prompter(target.tokenizer, SYSTEM, shots, room)
        report = {"examples": len(shots), "extra_tokens": prompter.extra_tokens()}
        return Learned(path, report, rewrite=prompter.rewrite)


def choose_examples(data: FitData, count: int, seed: int) -> list[Messages]:
    """``count`` exchanges, harmful and benign in turn, single questions only."""
    generator = np.random.default_rng([seed, 29])
    pools = []
    for examples in (data.train_harmful, data.train_benign):
        single = [example for example in examples if len(example.messages) == 1]
        pools.append([single[index] for index in generator.permutation(len(single))])
    pairs = zip(*pools, strict=False)
    chosen = [example for pair in pairs for example in pair][:count]
    return [_exchange(example) for example in chosen]


@dataclass(frozen=True)
class Prompter:
    """Puts the system text and the examples before a conversation.

    Attributes:
        tokenizer: of the model; its template decides how a system text is given.
        system: the text.
        shots: the examples, each a user's and an assistant's message.
        room: how many tokens a prompt may have; None for any number.
    """

    tokenizer: Any
    system: str
    shots: list[Messages]
    room: int | None = None

    def rewrite(self, messages: Conversation) -> Messages:
        """The conversation with the prompt before it, with as many examples as fit."""
        for count in range(len(self.shots), -1, -2):
            made = self._join(messages, count)
            if self.room is None or len(encode(self.tokenizer, made)) <= self.room:
                return made
        return [dict(message) for message in messages]  # too long by itself: nothing can be added

    def extra_tokens(self) -> int:
        """Tokens that the prompt adds to a short question."""
        question = [{"role": "user", "content": "Hello"}]
        return len(encode(self.tokenizer, self.rewrite(question))) - len(encode(self.tokenizer, question))

    def _join(self, messages: Conversation, count: int) -> Messages:
        shots = [message for shot in self.shots[:count] for message in shot]
        joined = [*shots, *(dict(message) for message in messages)]
        if joined[0]["role"] == "system":
            text = f"{self.system}\n\n{joined[0]['content']}"
            return [{"role": "system", "content": text}, *joined[1:]]
        asked = next((message for message in joined if message["role"] == "system"), None)
        system = self.system if asked is None else f"{self.system}\n\n{asked['content']}"
        rest = [message for message in joined if message["role"] != "system"]
        if self._takes_system():
            return [{"role": "system", "content": system}, *rest]
        return [{**rest[0], "content": f"{system}\n\n{rest[0]['content']}"}, *rest[1:]]

    def _takes_system(self) -> bool:
        try:
            text = render(self.tokenizer, [{"role": "system", "content": "§"}, {"role": "user", "content": "?"}])
        except DataError:
            return False
        return "§" in text  # some templates drop it silently


def _exchange(example: Example) -> Messages:
    return [dict(example.messages[0]), {"role": "assistant", "content": example.response or ""}]
