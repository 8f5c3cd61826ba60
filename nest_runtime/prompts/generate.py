"""Greedy answers to many conversations: batched by length, left-padded, stopped at the end of the answer (decoding.py).

Shared by training (the base's own benign answers) and evaluation. Whatever patch is active in the
caller's context answers; nothing here switches patches, samples, or streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from nest_runtime.errors import DataError
from nest_runtime.progress import Progress
from nest_runtime.prompts.decoding import Decoding, last_logits, plain_attention, shared_length, shares_well
from nest_runtime.prompts.examples import encode_prompt, render
from nest_runtime.prompts.images import PromptImages, batch_inputs

Conversation = Sequence[Mapping[str, Any]]
Encoded = tuple[list[int], PromptImages | None]
OnBatch = Callable[[list[int], list[str]], None]


@dataclass(frozen=True)
class ModelAnswer:
    """A greedy answer: its ``text``, and whether it is ``whole``: it ended by itself, before the limit."""

    text: str
    whole: bool


OnAnswers = Callable[[list[int], list[ModelAnswer]], None]


def generate_answers(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    stop: Sequence[str] = (),
    on_batch: OnBatch | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The model's greedy answers, in the order of ``conversations``.

    Args:
        model: a causal LM; used as it is (device, dtype, active patch).
        tokenizer: its tokenizer; not changed. For prompts with images a prompts.images.ImageReader.
        conversations: lists of ``{"role", "content"}``, ending with the user's turn.
        max_new_tokens: the longest answer, in tokens.
        batch_size: conversations in one padded batch.
        stop: texts that end an answer; the answer is cut before the first one.
        on_batch: called after every batch with the positions answered and their answers, e.g. to save them.
        progress: called as ``("generate", done, total)``.

    Returns:
        Answers without special tokens, surrounding spaces stripped.

    Raises:
        DataError: a conversation holds a token without an embedding row.
    """

    def keep(positions: list[int], answers: list[ModelAnswer]) -> None:
        if on_batch is not None:
            on_batch(positions, [answer.text for answer in answers])

    found = answer_conversations(
        model,
        tokenizer,
        conversations,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        stop=stop,
        on_batch=keep,
        progress=progress,
    )
    return [answer.text for answer in found]


def answer_conversations(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    stop: Sequence[str] = (),
    not_first: Sequence[int] = (),
    on_batch: OnAnswers | None = None,
    progress: Progress | None = None,
) -> list[ModelAnswer]:
    """Greedy answers that also say whether they are whole. Arguments as in :func:`generate_answers`.

    Args:
        not_first: tokens that no answer may begin with.
    """
    encoded = [encode_prompt(tokenizer, messages) for messages in conversations]
    _check_ids(model, [ids for ids, _ in encoded])
    order = sorted(range(len(encoded)), key=lambda index: (len(encoded[index][0]), index))
    config = greedy_config(model, tokenizer, max_new_tokens)
    config.begin_suppress_tokens = list(not_first) or None
    answers: list[ModelAnswer] = [ModelAnswer("", True)] * len(encoded)
    ways = _Ways(model, encoded)
    for start in range(0, len(order), batch_size):
        positions = order[start : start + batch_size]
        found = _answer_batch(model, tokenizer, [encoded[index] for index in positions], config, stop, ways)
        for index, answer in zip(positions, found, strict=True):
            answers[index] = answer
        if on_batch is not None:
            on_batch(positions, found)
        if progress is not None:
            progress("generate", min(start + batch_size, len(order)), len(order))
    return answers


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends an answer, sorted.

    This is the one place that decides it, for serving, chat, evaluation and training.

    They are those of the model's generation config (of its config where that has none), the tokenizer's, and the one
    that the chat template writes after an assistant's turn: checkpoints exist in which these three differ.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids = configured if isinstance(configured, list | tuple) else [configured]
    more = [getattr(tokenizer, "eos_token_id", None), _template_end(tokenizer)]
    return sorted({int(item) for item in [*ids, *more] if item is not None})


def _template_end(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an assistant's answer, where it writes a token of its own."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    answer = "An answer."
    try:
        text = render(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], False)
    except DataError:  # a template for prompts only
        return None
    after = text.rpartition(answer)[2].lstrip()
    added: dict[str, int] = tokenizer.get_added_vocab()
    found = [token for token in added if token and after.startswith(token)]
    return added[max(found, key=len)] if found else None


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens that give no text when special tokens are skipped, as they are written."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**named, **added}


def embedding_rows(model: Any) -> int:
    """How many token ids the model has embeddings for; a tokenizer may have more, added without resizing the model."""
    return int(model.get_input_embeddings().weight.shape[0])


def pad_token_id(model: Any, tokenizer: Any) -> int:
    """The id to pad with: the tokenizer's, else its end token, else 0.

    It must have an embedding row: padding is masked, but computed all the same.
    """
    rows = embedding_rows(model)
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None and value < rows:
            return int(value)
    return 0


def greedy_config(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """A greedy configuration of our own, so that sampling settings of the checkpoint do not leak in."""
    ends = end_token_ids(model, tokenizer)
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad_token_id(model, tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        use_cache=True,
    )


def _check_ids(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    rows = embedding_rows(model)
    wrong = next((token for ids in prompts for token in ids if token >= rows), None)
    if wrong is not None:
        raise DataError(
            f"a prompt holds token {wrong}; the model's embedding has {rows} rows",
            "leave tokens out of prompts that were added to the tokenizer and not to the model",
        )


class _Ways:
    """How batches of one model may be decoded (decoding.py): asked once for all of them."""

    def __init__(self, model: Any, prompts: Sequence[Encoded]) -> None:
        self._model = model
        self.plain = all(images is None for _, images in prompts) and plain_attention(model)
        self._shares: bool | None = None

    def shared(self, rows: Sequence[Sequence[int]]) -> int:
        """How many tokens at the beginning of a batch are computed once for all rows."""
        length = shared_length(rows) if self.plain else 0
        if length and self._shares is None:
            self._shares = shares_well(self._model, min(rows, key=len))
        return length if self._shares else 0


def _answer_batch(
    model: Any, tokenizer: Any, prompts: list[Encoded], config: GenerationConfig, stop: Sequence[str], ways: _Ways
) -> list[ModelAnswer]:
    rows = [ids for ids, _ in prompts]
    shared, width = ways.shared(rows), max(len(row) for row in rows)
    ids = torch.full((len(rows), width), int(config.pad_token_id or 0))  # (rows, width)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        for part, end in ((row[:shared], shared), (row[shared:], width)):  # padding is behind what all rows share
            ids[index, end - len(part) : end] = torch.tensor(part, dtype=torch.long)
            mask[index, end - len(part) : end] = 1
    embeddings = model.get_input_embeddings().weight
    ids = ids.to(embeddings.device)
    starts = [width - len(row) for row in rows]
    inputs = batch_inputs([image for _, image in prompts], ids, starts, embeddings.dtype)
    criteria = StoppingCriteriaList([_StopTexts(tokenizer, stop, width)] if stop else [])
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask.to(ids.device),
            **inputs,
            generation_config=config,
            stopping_criteria=criteria,
            custom_generate=Decoding(shared) if ways.plain else None,
            **last_logits(model),
        )
    ends = config.eos_token_id
    wanted = set(ends if isinstance(ends, list) else [ends])
    return [_answer(tokenizer, row, wanted, stop) for row in output[:, width:].tolist()]


def _answer(tokenizer: Any, row: list[int], ends: set[int | None], stop: Sequence[str]) -> ModelAnswer:
    """An answer up to its end token or the first stop text; those match special tokens, which are not shown."""
    length = next((index for index, token in enumerate(row) if token in ends), len(row))
    whole = str(tokenizer.decode(row[:length], skip_special_tokens=False))
    places = [place for item in stop if (place := whole.find(item)) >= 0]
    if not places:
        return ModelAnswer(str(tokenizer.decode(row[:length], skip_special_tokens=True)).strip(), length < len(row))
    text = whole[: min(places)]
    for token in sorted(special_tokens(tokenizer).values(), key=len, reverse=True):
        text = text.replace(token, "")
    return ModelAnswer(text.strip(), True)


class _StopTexts(StoppingCriteria):
    """Ends a row once its answer holds one of the stop texts; decoding works for every tokenizer."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_width: int) -> None:
        self.tokenizer, self.stop, self.prompt_width = tokenizer, tuple(stop), prompt_width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_width :], skip_special_tokens=False)
        done = [any(item in text for item in self.stop) for text in texts]
        return torch.tensor(done, device=input_ids.device)
