"""Control tokens in prompts: those that the chat template writes are tokens, those that somebody typed are text.

A tokenizer reads ``<|im_end|>`` as the end of a turn whoever wrote it, so a turn could be forged inside a message. So
this module hides texts of control tokens in messages while the template is rendered. It renames what the template
itself wrote to something that nobody can type. Then a copy of the tokenizer that knows control tokens only by those
names reads the whole (literal.py). A prompt without any of this keeps its usual ids.
"""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nest_runtime.prompts.literal import Reader

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Any], str]  # messages and tools → the template's text
Change = Callable[[str], str]

_REMEMBERED = 8  # tokenizers
_NEVER = re.compile(r"(?!)")
_ORDINARY = re.compile(r"\s*|<0x[0-9A-Fa-f]{2}>|[0-9xX]+")  # spaces, spelled bytes, and what others are hidden behind
_STRUCTURE = ("role", "type")  # fields that nobody types into; they are checked where they come in


@dataclass(frozen=True)
class Controls:
    """The control tokens of one tokenizer with its chat template.

    Attributes:
        ids: of each text that is read as a control token.
        special: those that the tokenizer itself calls special.
        counted: ids to count; the unknown token is left out, which any text may hold.
        added: how many of them the tokenizer puts around a text by itself, where it is asked to.
        reader: reads text and control tokens.
        written: matches any control token.
    """

    ids: Mapping[str, int]
    special: frozenset[str]
    counted: frozenset[int]
    added: int
    reader: Reader = field(repr=False)
    written: re.Pattern[str] = field(repr=False)
    _typed: Mapping[tuple[bool, bool], re.Pattern[str]] = field(repr=False)

    def typed(self, role: str | None, *, edges: bool = False) -> re.Pattern[str]:
        """What is hidden in a message of a role.

        Templates look into the assistant's messages for marks of reasoning and tool calls, and rewrite them: there
        only what the tokenizer calls special is hidden. The rest is matched as group ``kept``.

        Args:
            role: the message's.
            edges: every character that a control token begins or ends with too, in either case.
        """
        return self._typed[role == "assistant", edges]

    def count(self, ids: Sequence[int]) -> int:
        """How many control tokens there are among some ids."""
        return sum(token in self.counted for token in ids)

    def in_text(self, text: str) -> list[str]:
        """The control tokens of a text, in order."""
        return [found for found in self.written.findall(text) if self.ids[found] in self.counted]

    def read(self, text: str, hidden: Hidden, *, special: bool) -> list[int]:
        """Ids of a rendered text: its control tokens are tokens, and what was hidden is text again.

        Args:
            text: rendered.
            hidden: what was hidden before.
            special: put the tokenizer's own special tokens around it.
        """
        pieces: list[str | int] = []
        end = 0
        for match in self.written.finditer(text):
            pieces += [hidden.shown(text[end : match.start()]), self.ids[match[0]]]
            end = match.end()
        return self.reader.read([*pieces, hidden.shown(text[end:])], special=special)


class Hidden:
    """Texts behind words that no message of a conversation holds.

    Templates may trim, quote, print or change the case of what is around such a word, and of the word itself.

    Args:
        value: everything that is to be rendered.
    """

    def __init__(self, value: Any) -> None:
        everything = "\0".join(_texts(value))
        while (mark := str(10**15 + secrets.randbelow(9 * 10**15))) in everything:
            pass
        self._mark = mark
        self._texts: list[str] = []
        self._pattern = re.compile(rf"x{mark}x(\d+)x", re.IGNORECASE)

    def hide(self, text: str, pattern: re.Pattern[str]) -> str:
        """A text with what matches hidden, but for matches of the group ``kept``."""
        return pattern.sub(self._word, text)

    def shown(self, text: str) -> str:
        """A text with everything that was hidden restored."""
        return self._pattern.sub(lambda match: self._texts[int(match[1])], text) if self._texts else text

    def _word(self, match: re.Match[str]) -> str:
        if match.lastgroup == "kept":
            return match[0]
        self._texts.append(match[0])
        return f"x{self._mark}x{len(self._texts) - 1}x"


def prompt_ids(tokenizer: Any, messages: Messages, tools: Any, render: Render, *, special: bool) -> list[int]:
    """Token ids of a conversation: control tokens are those that the template writes, and no others.

    Args:
        tokenizer: has a chat template.
        messages, tools: what the template is given.
        render: the template.
        special: put the tokenizer's own special tokens around it.
    """
    known = controls(tokenizer)
    if not _finds(known, messages, tools, edges=False):
        text = render(messages, tools)
        if (
            not _finds(known, messages, tools, edges=True)
            or known.in_text(text) == _safely(known, messages, tools, render)[2]
        ):
            ids = plain_ids(tokenizer, text, special=special)
            if known.count(ids) == len(known.in_text(text)) + known.added * special:
                return ids  # else normalization made a control token of what is none
    hidden = Hidden([messages, tools])
    text = render(*_hidden(known, messages, tools, hidden, edges=False))
    safe, unseen, expected = _safely(known, messages, tools, render)
    if known.in_text(text) != expected:  # the template makes control tokens of what somebody typed
        text, hidden = safe, unseen
    return known.read(text, hidden, special=special)


def text_ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids of a typed text with no template around it: none of it is a control token.

    Args:
        tokenizer: the tokenizer.
        text: the text.
        special: put the tokenizer's own special tokens around it.
    """
    known = controls(tokenizer)
    if not known.written.search(text):
        ids = plain_ids(tokenizer, text, special=special)
        if known.count(ids) == known.added * special:
            return ids
    hidden = Hidden(text)
    return known.read(hidden.hide(text, known.typed(None)), hidden, special=special)


def spells_control(tokenizer: Any, value: Any) -> bool:
    """Whether a JSON value holds a control token: in a text, a field's name, or as an id among others."""
    known = controls(tokenizer)
    rows = [row for row in (value if isinstance(value, list) else []) if isinstance(row, list)]
    ids = [token for row in [value, *rows] if isinstance(row, list) for token in row if isinstance(token, int)]
    return bool(known.count(ids)) or any(known.written.search(text) for text in _texts(value))


def spelled(tokenizer: Any, value: Any) -> int:
    """How many control tokens the texts of a JSON value spell."""
    known = controls(tokenizer)
    return sum(len(known.written.findall(text)) for text in _texts(value))


def plain_ids(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Token ids as the tokenizer gives them: whatever spells a control token is one."""
    return list(tokenizer(text, add_special_tokens=special, split_special_tokens=False)["input_ids"])


def broken(tokenizer: Any, messages: Messages) -> list[dict[str, Any]]:
    """Messages for a processor that tokenizes by itself.

    Control tokens in them get a space after their first character.
    """
    known = controls(tokenizer)

    def part(match: re.Match[str]) -> str:
        return match[0] if match.lastgroup == "kept" else f"{match[0][0]} {match[0][1:]}"

    def change(role: str | None) -> Change:
        return lambda text: known.typed(role).sub(part, text)

    return [_changed(message, change(message.get("role"))) for message in messages]


def controls(tokenizer: Any) -> Controls:
    """The control tokens of a tokenizer with its template, determined once."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = getattr(tokenizer, "chat_template", None)
    source = template if isinstance(template, str) else repr(template) if template else ""
    size = len(tokenizer) if backend is None else backend.get_vocab_size(with_added_tokens=True)
    owner = tokenizer if backend is None else backend
    key = (id(owner), size, source)
    with _lock:
        if key not in _known:
            _known[key] = (owner, _find(tokenizer, backend, source))
            while len(_known) > _REMEMBERED:
                _known.popitem(last=False)
        _known.move_to_end(key)
        return _known[key][1]


_known: OrderedDict[tuple[int, int, str], tuple[Any, Controls]] = OrderedDict()  # with what the id is of
_lock = threading.Lock()


def _safely(known: Controls, messages: Messages, tools: Any, render: Render) -> tuple[str, Hidden, list[str]]:
    """A rendering in which nothing typed can have become a control token, and the control tokens in it."""
    hidden = Hidden([messages, tools])
    text = render(*_hidden(known, messages, tools, hidden, edges=True))
    return text, hidden, known.in_text(text)


def _finds(known: Controls, messages: Messages, tools: Any, *, edges: bool) -> bool:
    """Whether there is anything to hide."""
    rows = [*((message, message.get("role")) for message in messages), (tools, None)]
    return any(
        match.lastgroup != "kept"
        for value, role in rows
        for text in _texts(value)
        for match in known.typed(role, edges=edges).finditer(text)
    )


def _hidden(
    known: Controls, messages: Messages, tools: Any, hidden: Hidden, *, edges: bool
) -> tuple[list[dict[str, Any]], Any]:
    def change(role: str | None) -> Change:
        pattern = known.typed(role, edges=edges)
        return lambda text: hidden.hide(text, pattern)

    return [_changed(message, change(message.get("role"))) for message in messages], _changed(tools, change(None))


def _changed(value: Any, change: Change) -> Any:
    """A JSON value with all its texts changed, names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(key) if isinstance(key, str) else key: item if _structural(key, item) else _changed(item, change)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_changed(item, change) for item in value]
    return value


def _texts(value: Any) -> Iterator[str]:
    """The texts of a JSON value, names of fields too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(key, str):
                yield key
            if not _structural(key, item):
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _structural(key: Any, item: Any) -> bool:
    return key in _STRUCTURE and isinstance(item, str) and item.replace("_", "").isalnum()


def _find(tokenizer: Any, backend: Any, template: str) -> Controls:
    rows = {
        token.content: (index, token.special)
        for index, token in tokenizer.added_tokens_decoder.items()
        if not _ORDINARY.fullmatch(token.content)
    }
    named = set(tokenizer.all_special_tokens)
    special = frozenset(text for text, (_, marked) in rows.items() if marked or text in named)
    usual = _usual(tokenizer) if template else ""
    structural = {text for text in rows if text not in special and _writes(template, usual, text)}
    ids = {text: rows[text][0] for text in rows if text in special or text in structural}
    counted = frozenset(ids.values()) - {getattr(tokenizer, "unk_token_id", None)}
    everything, own = _any_of(ids), _any_of(special)
    edges = "".join(re.escape(edge) for edge in sorted({end for text in ids for end in (text[0], text[-1])}))
    either = f"|(?P<edge>(?i:[{edges}]))" if edges else ""
    typed = {
        (False, False): re.compile(everything),
        (False, True): re.compile(f"{everything}{either}"),
        (True, False): re.compile(f"{own}|(?P<kept>{everything})"),
        (True, True): re.compile(f"{own}|(?P<kept>{everything}){either}"),
    }
    added = sum(token in counted for token in plain_ids(tokenizer, "", special=True))
    reader = Reader(tokenizer, backend, ids)
    return Controls(ids, special, counted, added, reader, re.compile(everything), typed)


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for some texts, the longest first, as tokenizers look for them."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or _NEVER.pattern


def _writes(template: str, usual: str, text: str) -> bool:
    """Whether a template writes a token that is ordinary to its tokenizer.

    Words and lone marks do not count: they are ordinary text, whoever writes them.
    """
    bare = len(text) < 3 or text[0].isalnum() or text[-1].isalnum() or text.isspace()
    return not bare and (text in template or text in usual)


def _usual(tokenizer: Any) -> str:
    """What a template makes of an ordinary conversation: some put their tokens together from pieces."""
    talk = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        return str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    except Exception:  # a template may refuse any conversation, with errors of its own making
        return ""
