"""Prompts for training and evaluation: reading prompt files, digests, chat rendering.

A prompt file gives :class:`Example` values. Its forms are JSONL or a JSON list (``{"prompt", "response"?}`` or
``{"messages"}``), CSV with a header, TXT (a prompt a line) and ``hf://datasets/org/name[@revision][:split]``; see
docs/guide/first-patch.md. ``FILE#column=value`` keeps only the rows whose column has that value, for files that mix
harmful and harmless prompts. A message may hold images (images.py). Nothing here runs a model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nest_runtime.errors import DataError
from nest_runtime.io import canonical_json, expand
from nest_runtime.prompts.builtin import NAMES as BUNDLED
from nest_runtime.prompts.builtin import bundled
from nest_runtime.prompts.content import images_of, plain_content, text_of
from nest_runtime.prompts.control import broken, plain_ids, prompt_ids, text_ids
from nest_runtime.prompts.images import PromptImages, prompt_images, read_parts
from nest_runtime.prompts.readers import SUFFIXES, Row, read_rows
from nest_runtime.prompts.template import templated

PROMPT_COLUMNS = ("prompt", "goal", "behavior", "instruction", "question", "text")
CATEGORY_COLUMNS = ("category", "semanticcategory", "type")
ID_COLUMNS = ("id", "behaviorid")
ROLES = ("system", "user", "assistant")

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One conversation to answer, and the answer to learn if the file gives one.

    Attributes:
        messages: ``{"role", "content"}`` dicts, ending with the user's turn; content is a text, or a list of parts.
        response: the assistant's answer, or None.
        id: the file's id of the row, or ``<file>:<line>``.
        category: the file's category of the row, or None.
        meta: the row's other scalar fields.
    """

    messages: tuple[Message, ...]
    response: str | None = None
    id: str = ""
    category: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """The text of the last user turn."""
        return text_of(self.messages[-1]["content"])


def load_examples(ref: str | Path) -> list[Example]:
    """Read a prompt file.

    Args:
        ref: a path, ``hf://datasets/org/name[@revision][:split]``, or the name of a bundled file (``harmful``,
            ``everyday``, ``borderline``, ``imperatives``, ``pasted``, ``small-talk``); each with ``#column=value`` to
            select rows.

    Returns:
        The examples, in the file's order.

    Raises:
        DataError: a row is wrong; the message names file, line, what was found and what was expected.
    """
    name, wanted = _split_selection(str(ref))
    path = _located(name)
    rows = read_rows(path)
    _check_columns(path, rows)
    if wanted:
        rows = _select(path, rows, *wanted)
    return [_example(path, line, fields) for line, fields in rows]


def check_sides(harmful: Sequence[Example], benign: Sequence[Example]) -> None:
    """Raise DataError where a prompt is harmful and benign at once; needs no model."""
    seen = {canonical_json(plain_content(example.messages)) for example in harmful}
    both = [item for item in benign if canonical_json(plain_content(item.messages)) in seen]
    if both:
        raise DataError(
            f"{len(both)} prompts are harmful and benign at once, first {both[0].id}: {both[0].prompt[:60]!r}",
            "a prompt belongs to one side: give another file, or remove it from one",
        )


def _located(name: str) -> Path:
    """The file of a reference; a file wins over a bundled one of that name."""
    if name.startswith("hf://"):
        return _download(name)
    path = expand(name)
    return bundled(name) if name in BUNDLED and not path.exists() else path


def make_examples(rows: Sequence[Mapping[str, Any]], source: str = "rows") -> list[Example]:
    """Examples from ``{"prompt", "response"?}`` or ``{"messages"}`` mappings, by the rules of a JSONL file."""
    return [_example(Path(source), number, dict(row)) for number, row in enumerate(rows, 1)]


def examples_digest(examples: Sequence[Example]) -> str:
    """``sha256:<hex>`` over messages, responses and targets, in order; ids and other meta do not count."""
    content = [
        [
            plain_content(example.messages),
            example.response,
            *([example.meta["target"]] if "target" in example.meta else []),
        ]
        for example in examples
    ]
    return "sha256:" + hashlib.sha256(canonical_json(content)).hexdigest()


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text that a model reads for a conversation: by its chat template, or the bare prompt if it has none.

    Args:
        tokenizer: the model's.
        messages: the conversation.
        add_generation_prompt: end with the beginning of the answer.
        tools: what the model may call, for templates that know tools.
        variables: further variables of the template.

    Raises:
        DataError: the template refuses the conversation (for example a system message).
    """
    if not getattr(tokenizer, "chat_template", None):
        if images_of(messages):
            raise DataError("a prompt holds an image, and the model has no chat template to place it", _NO_TEMPLATE)
        return "\n\n".join(text_of(message["content"]) for message in messages)
    given: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **(variables or {})}
    if tools:
        given["tools"] = list(tools)
    return templated(tokenizer, messages, given)


_NO_TEMPLATE = "leave prompts with images out, or give the model's tokenizer a chat template"


def encode(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    allow_special: bool = False,
) -> list[int]:
    """Token ids of the rendered conversation, ready for the answer; a template's own BOS is not doubled.

    Control tokens that a message spells are text; only those that the template writes are tokens (control.py). This is
    the only way from messages to ids, so that a patch is trained and judged on the tokens that the server sends.

    Args:
        tokenizer, messages, tools, variables: as in :func:`render`.
        allow_special: read what messages spell as control tokens, too. A turn can then be forged inside a message.

    Raises:
        DataError: as :func:`render`; or the tokenizer's control tokens cannot be separated from text.
    """
    if images_of(messages):
        return encode_prompt(tokenizer, messages)[0]
    has_template = bool(getattr(tokenizer, "chat_template", None))
    special = bool(getattr(tokenizer, "adds_special", not has_template))
    if allow_special:
        return plain_ids(tokenizer, render(tokenizer, messages, tools=tools, variables=variables), special=special)
    if not has_template:
        return text_ids(tokenizer, render(tokenizer, messages), special=special)

    def rendered(hidden: Sequence[Mapping[str, Any]], given: Any) -> str:
        return render(tokenizer, hidden, tools=given, variables=variables)

    return prompt_ids(tokenizer, messages, tools, rendered, special=special)


def encode_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], PromptImages | None]:
    """The same, with the conversation's images by reference; None if it has none.

    Raises:
        DataError: it has images and the tokenizer reads none (images.ImageReader does), or one cannot be read.
    """
    if images_of(messages):
        # The model's processor tokenizes by itself: what spells a control token is taken apart.
        apart = broken(tokenizer, messages)
        return prompt_images(tokenizer, messages, render(tokenizer, apart))
    return encode(tokenizer, messages), None


def _split_selection(ref: str) -> tuple[str, tuple[str, str] | None]:
    match = re.fullmatch(r"(.+)#([^#=]+)=([^#]*)", ref)
    if match is None or Path(ref).exists():
        return ref, None
    return match[1], (match[2], match[3])


def _lower(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key).strip().lower(): value for key, value in fields.items()}


def _check_columns(path: Path, rows: list[Row]) -> None:
    """A CSV without a prompt column fails once, for the header, not for each row."""
    if path.suffix.lower() not in (".csv", ".parquet"):
        return
    fields = rows[0][1]
    if not set(_lower(fields)) & {*PROMPT_COLUMNS, "messages"}:
        found = ", ".join(repr(str(key)) for key in fields)
        raise DataError(
            f"{path}:1: no prompt column; found {found}; expected 'prompt', 'goal' or 'Behavior'",
            "rename the column that holds the prompts to 'prompt'",
        )


def _select(path: Path, rows: list[Row], column: str, value: str) -> list[Row]:
    lowered = [(row, _lower(row[1]).get(column.lower())) for row in rows]
    kept = [row for row, found in lowered if str(found) == value]
    if not kept:
        seen = sorted({str(found) for _, found in lowered if found is not None})[:8]
        what = f"values there: {', '.join(seen)}" if seen else f"columns: {', '.join(map(str, rows[0][1]))}"
        raise DataError(f"{path}: no row has {column} = {value!r}", what)
    return kept


def _example(path: Path, line: int, fields: dict[str, Any]) -> Example:
    where, low = f"{path}:{line}", _lower(fields)
    if "messages" in low and not isinstance(low["messages"], str):
        messages, response = _messages(where, low["messages"], path.parent)
    else:
        messages, response = ({"role": "user", "content": _prompt(where, low)},), None
    given = low.get("response")
    if given is not None and not isinstance(given, str):
        raise DataError(
            f"{where}: 'response' is {type(given).__name__}; expected a string", "quote it, or leave it out"
        )
    if given and response:
        raise DataError(f"{where}: both 'response' and a last assistant message", "keep one of the two")
    ident = next((str(low[key]) for key in ID_COLUMNS if low.get(key) not in (None, "")), f"{path.name}:{line}")
    category = next((str(low[key]) for key in CATEGORY_COLUMNS if low.get(key) not in (None, "")), None)
    used = {
        *PROMPT_COLUMNS,
        *CATEGORY_COLUMNS,
        *ID_COLUMNS,
        "messages",
        "response",
        "instances",
        "input",
        "contextstring",
    }
    meta = {key: value for key, value in low.items() if key not in used and isinstance(value, str | int | float | bool)}
    return Example(messages, response or given or None, ident, category, meta)


def _prompt(where: str, low: Mapping[str, Any]) -> str:
    key = next((key for key in PROMPT_COLUMNS if low.get(key) is not None), None)
    if key is None:
        found = ", ".join(repr(name) for name in low) or "nothing"
        raise DataError(f"{where}: no 'prompt' and no 'messages'; found {found}", 'write {"prompt": "…"}')
    value = low[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {type(value).__name__}; expected a string", "quote the prompt")
    if not value.strip():
        raise DataError(f"{where}: {key!r} is empty; expected a prompt", "fill the prompt in, or delete the row")
    context = low.get("contextstring")
    if key == "behavior" and isinstance(context, str) and context.strip():
        return f"{context}\n\n---\n\n{value}"  # HarmBench's own form for contextual behaviors
    extra = low.get("input")
    instances = low.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        extra = instances[0].get("input")
    return f"{value}\n\n{extra}" if key == "instruction" and isinstance(extra, str) and extra.strip() else value


def _messages(where: str, value: Any, folder: Path) -> tuple[tuple[Message, ...], str | None]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' is {type(value).__name__}; expected a list that is not empty", _SHAPE)
    for number, item in enumerate(value, 1):
        content = item.get("content") if isinstance(item, dict) else None
        if not isinstance(content, str | list) or not content or (isinstance(content, str) and not content.strip()):
            raise DataError(f"{where}: message {number} has no text 'content'", _SHAPE)
        if item.get("role") not in ROLES:
            raise DataError(f"{where}: message {number} has role {item.get('role')!r}", f"roles are {', '.join(ROLES)}")
    messages = tuple({"role": item["role"], "content": _content(where, item["content"], folder)} for item in value)
    response = text_of(messages[-1]["content"]) if messages[-1]["role"] == "assistant" else None
    if response is not None:
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{where}: no user message before the answer", _SHAPE)
    return messages, response


def _content(where: str, content: Any, folder: Path) -> Any:
    return content if isinstance(content, str) else read_parts(where, content, folder)


_SHAPE = 'write {"messages": [{"role": "user", "content": "…"}]}'


def _download(ref: str) -> Path:
    """Fetch one file of a Hub dataset into the Hub cache and return its path."""
    match = re.fullmatch(r"hf://datasets/([^/@:]+/[^/@:]+)(?:@([^:]+))?(?::(.+))?", ref)
    if match is None:
        raise DataError(f"{ref!r} is no dataset reference", "expected hf://datasets/org/name[@revision][:split]")
    repo, revision, split = match[1], match[2], match[3]
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
        chosen = pick_split(ref, names, split)
        return Path(hf_hub_download(repo, chosen, repo_type="dataset", revision=revision))
    except DataError:
        raise
    except Exception as error:  # huggingface_hub raises its own, httpx's and OSError
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot read dataset {repo} from the Hub: {type(error).__name__}: {first}",
            "check the name, your network and (for gated data sets) your token",
        ) from error


def pick_split(ref: str, names: Sequence[str], split: str | None) -> str:
    """The data file of a Hub dataset to read: the split's, else train's, else the only one.

    Raises:
        DataError: listing the data files there.
    """
    data = sorted(
        (name for name in names if Path(name).suffix.lower() in SUFFIXES and not Path(name).name.startswith(".")),
        key=lambda name: (SUFFIXES.index(Path(name).suffix.lower()), name),
    )
    words = {name: re.split(r"[^a-z0-9]+", name.lower()) for name in data}
    found = [name for name in data if (split or "train").lower() in words[name]]
    if not found and split is None and len(data) == 1:
        found = data
    if not found:
        listed = ", ".join(data[:8]) or "none"
        raise DataError(f"{ref}: no data file of split {split or 'train'!r}; data files there: {listed}", _SPLIT_HINT)
    return found[0]


_SPLIT_HINT = "name one of the splits: hf://datasets/org/name:split"
