"""The demo's HTML. Everything from models, patches and users is escaped; nothing is loaded from elsewhere.

Meaning never depends on color alone: badges have words, bars have figures, tables have headers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from nest_runtime.demo.backend import BASE
from nest_runtime.demo.html.glossary import TERMS, popovers, term, titled
from nest_runtime.escape import clean

if TYPE_CHECKING:
    from nest_runtime.demo.talk import DemoReply, Talk, Turn
    from nest_runtime.errors import NestError
    from nest_runtime.evaluate.stats import Rate

log = logging.getLogger(__name__)
SHORT = 19  # characters of a digest: commands accept as many
_QUOTED = re.compile("`([^`\n]+)`")


def text(value: object) -> str:
    """Text as HTML. Braces and dollars are written as entities, so that no template engine reads them."""
    return escape(clean(str(value))).replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def words(message: object) -> str:
    """Our own sentences as HTML: what stands in backticks is code."""
    return _QUOTED.sub(r"<code>\1</code>", text(message))


def wrap(*parts: str) -> str:
    """Parts within the element that the style sheet's rules begin with."""
    return f'<div class="nr">{"".join(parts)}</div>'


def note(message: str) -> str:
    """A remark."""
    return f'<p class="nr-note">{words(message)}</p>'


def said(message: str) -> str:
    """What came of a click that changes nothing: why, in a line beside the button."""
    return wrap(f'<p class="nr-note" role="status">{words(message)}</p>') if message else ""


def alert(error: NestError | Exception) -> str:
    """An error, in the words of the command line."""
    message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
    hint = getattr(error, "hint", "") or "look at the terminal that the demo runs in"
    lines = f"<p><b>error:</b> {words(message)}</p><p><b>hint:</b> {words(hint)}</p>"
    return f'<div class="nr-alert" role="alert">{lines}</div>'


def failed(error: Exception) -> str:
    """What ended a piece of work; the terminal gets the whole of an error that is none of ours."""
    from nest_runtime.errors import NestError

    if not isinstance(error, NestError):
        log.error("the demo: a piece of work failed", exc_info=error)
    return wrap(alert(error))


def good(message: str) -> str:
    """Something that was done."""
    return f'<div class="nr-good" role="status">{words(message)}</div>'


def code(digest: str | None, length: int = SHORT) -> str:
    """A digest, shortened; the whole of it as its title."""
    return f'<code title="{text(digest)}">{text(digest[:length])}</code>' if digest else ""


def badge(refused: bool | None, understood: bool | None = None) -> str:
    """What an answer was, in a word."""
    if refused is None:
        return ""
    if not refused and understood is False:
        why = "the answer makes no sense in the small world that this model knows"
        return f'<span class="nr-badge nr-answered" title="{why}">not understood</span>'
    return (
        '<span class="nr-badge nr-refused">⊘ refused</span>'
        if refused
        else '<span class="nr-badge nr-answered">answered</span>'
    )


def title(model: str, place: str, about: str = "", *, patched: bool = True, based: bool = True) -> str:
    """The head of the page: what is shown, what to look for, and what the model is.

    Args:
        model, place, about: the model's name, where it runs, and what it is.
        patched: it has a patch to show.
        based: its base may be asked.
    """
    patch, base = term("safety patch"), term("base")
    look = (
        f"One prompt, two answers: by the {base} model, and under a {patch}, which changes a few of its neurons. "
        "Look for harmful requests that the base answers and the patch refuses, and for harmless ones that it still "
        "answers."
        if patched
        else f"This model has no {patch} yet, so one answer stands for both: by the {base} model. Look for harmful "
        "requests that it answers; a patch is to refuse those, and go on answering the harmless ones."
    )
    if not based:
        look = (
            f"Answers under a {patch}, which changes a few of a model's neurons. This server does not let anybody ask "
            f"its {base}, so there is nothing to compare them with: one answer stands on both sides."
        )
    what = f"{text(model)}: {text(about)}; {text(place)}." if about else f"{text(model)}, {text(place)}."
    return wrap(
        f'<div class="nr-title"><h1>nest-runtime</h1><p id="look-for">{look}</p></div>',
        f'<p class="nr-note" id="about-model">{what}</p>',
    )


def glossary() -> str:
    """The explanations of all terms, unseen until one is asked for."""
    return f'<div class="nr">{popovers()}</div>'


def offer(message: str, commands: Sequence[str], after: str = "") -> str:
    """Something that is missing, and the commands that bring it."""
    lines = "".join(f"<code>{text(command)}</code>" for command in commands)
    more = f"<p>{words(after)}</p>" if after else ""
    return f'<div class="nr-offer" role="note"><p>{words(message)}</p>{lines}{more}</div>'


def conversation(talk: Talk) -> str:
    """A conversation with both sides."""
    turns = "".join(_turn(turn) for turn in talk.turns)
    empty = note("No messages yet: write a prompt, or take an example, and press Send.")
    busy = "true" if talk.busy else "false"
    return wrap(
        f'<div role="log" aria-label="Conversation" aria-live="polite" aria-busy="{busy}">{turns or empty}</div>'
    )


def _turn(turn: Turn) -> str:
    prompt = f'<div class="nr-prompt">{text(turn.prompt)}</div>'
    if turn.scripted:
        head = '<header>Written before <span class="nr-badge nr-plain">part of the example</span></header>'
        before = f'<div class="nr-text">{text(turn.replies[0].text)}</div>'
        return f'<div class="nr-turn">{prompt}<article class="nr-reply">{head}{before}</article></div>'
    sides = "".join(_reply(reply) for reply in turn.replies)
    return f'<div class="nr-turn">{prompt}<div class="nr-sides">{sides}</div></div>'


def _reply(reply: DemoReply) -> str:
    bare = reply.label == BASE
    name = "Base, no patch" if bare else f"Patch {reply.label}"
    body = alert_of(reply) if reply.state == "failed" else ""
    cursor = " nr-cursor" if reply.state == "running" else ""
    answer = (
        ""
        if reply.state == "failed" and not reply.text
        else f'<div class="nr-text{cursor}">{text(reply.text.strip())}</div>'
    )
    facts = []
    if reply.digest:
        facts.append(f"<span>{term('digest')} {code(reply.digest)}</span>")
    if reply.state == "done":
        facts.append(f"<span>{reply.tokens} tokens</span>")
    if reply.cut:
        facts.append(f'<span class="nr-badge nr-plain">cut at the limit of {reply.tokens} tokens</span>')
    if reply.speed is not None:
        facts.append(f"<span>{reply.speed:.1f} tokens/s</span>")
    if reply.state == "stopped":
        facts.append("<span>stopped</span>")
    kind = "" if bare else " nr-patched"
    return (
        f'<article class="nr-reply{kind}" data-label="{text(reply.label)}" data-state="{reply.state}" '
        f'aria-label="Answer of {text(name)}">'
        f"<header>{text(name)} {badge(reply.refused, reply.understood)}</header>{answer}{body}"
        f"<footer>{''.join(facts)}</footer></article>"
    )


def alert_of(reply: DemoReply) -> str:
    """The error of a failed answer."""
    from nest_runtime.errors import NestError

    return alert(NestError(reply.error, reply.hint))


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    numbers: Sequence[str] = (),
    marked: Sequence[int] = (),
    css: str = "",
) -> str:
    """A table that scrolls by itself where the screen is narrow.

    Args:
        columns: titles, plain text; terms explain themselves.
        rows: cells, which are HTML already; the first of a row is its header.
        caption: plain text.
        numbers: titles of columns that align right.
        marked: rows that stand out.
        css: a class of the table.
    """
    kinds = [' class="nr-n"' if name in numbers else "" for name in columns]
    head = "".join(f'<th scope="col"{kind}>{titled(name)}</th>' for name, kind in zip(columns, kinds, strict=True))
    lines = []
    for number, row in enumerate(rows):
        cells = [f'<th scope="row"{kinds[0]}>{row[0]}</th>']
        cells += [f"<td{kind}>{cell}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True)]
        mark = ' class="nr-mark"' if number in marked else ""
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    about = f'<p class="nr-caption">{words(caption)}</p>' if caption else ""
    name = text(caption or columns[0])
    parts = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return about + scroll(f'<table class="{css}" aria-label="{name}">{parts}</table>', name)


def scroll(inner: str, name: str, more: str = "") -> str:
    """A part that scrolls sideways by itself, with a cue if there is more to see (page.js).

    Args:
        inner: HTML.
        name: for screen readers, HTML already.
        more: attributes of the part.
    """
    part = f'<div class="nr-scroll" tabindex="0" role="region" aria-label="{name}"{more}>{inner}</div>'
    return f'<div class="nr-wide">{part}<p class="nr-cue" aria-hidden="true">more to the right →</p></div>'


def progress(label: str, done: int, total: int) -> str:
    """A progress bar with its figures; without a total it only says that something goes on."""
    if total <= 0:
        return f'<label class="nr-note" role="status">{text(label)}<progress></progress></label>'
    return (
        f'<label class="nr-note">{text(label)}: {done} of {total}'
        f'<progress max="{total}" value="{done}"></progress></label>'
    )


def bars(groups: Sequence[tuple[str, Sequence[tuple[str, Rate]]]]) -> str:
    """Rates as bars with 95 % intervals.

    Args:
        groups: a title, and the rate of each subject by its label; the base is gray.
    """
    parts = []
    for heading, rows in groups:
        name, _, rest = heading.partition(":")
        known = name.lower() in TERMS
        parts.append(f"<h3>{term(name.lower(), name) + text(':' + rest) if known else text(heading)}</h3>")
        parts += [_bar(label, rate) for label, rate in rows]
    return f'<div class="nr-bars">{"".join(parts)}</div>'


def _bar(label: str, rate: Rate) -> str:
    value, (low, high) = rate.value, rate.ci95
    shown = (
        "no answers yet" if value is None else f"{100 * value:.1f} % [{100 * low:.0f}, {100 * high:.0f}], n = {rate.n}"
    )
    whisker = "" if value is None else f'<u style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></u>'
    kind = "" if label == BASE else " nr-patched"
    return (
        f'<div class="nr-row"><div>{text(label)}</div><div><div class="nr-bar{kind}" role="img" '
        f'aria-label="{text(label)}: {shown}"><i style="width:{100 * (value or 0.0):.2f}%"></i>{whisker}</div>'
        f'<span class="nr-value">{shown}</span></div></div>'
    )


def percent(value: float | None) -> str:
    """A share for people."""
    return "–" if value is None else f"{100 * value:.1f} %"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON as one level with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
