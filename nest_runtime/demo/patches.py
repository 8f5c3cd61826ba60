"""The tab Patches: what there is, what differs, and (with admin) switching, publishing and fetching."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from nest_runtime.demo import markup
from nest_runtime.demo.background import Job
from nest_runtime.demo.state import Desk
from nest_runtime.errors import NestError, UsageError

if TYPE_CHECKING:
    from nest_runtime.patch.patch import Patch
    from nest_runtime.store.entries import Entry

BEAT = 0.5  # seconds between two signs of life of a step that says nothing


@dataclass(frozen=True)
class PatchesParts:
    """What the page fills: the list of patches, and the lists to choose one from."""

    listing: gr.HTML
    old: gr.Dropdown
    new: gr.Dropdown
    admin: AdminParts | None


@dataclass(frozen=True)
class AdminParts:
    """What exists with ``--admin`` only."""

    which: gr.Dropdown
    repo: gr.Textbox
    token: gr.Textbox
    private: gr.Checkbox
    activate: gr.Button
    rollback: gr.Button
    push: gr.Button
    pull: gr.Button
    outcome: gr.HTML


def build(desk: Desk) -> PatchesParts:
    """Lay the tab out; ``connect`` makes the buttons work that change what other tabs show."""
    listing = gr.HTML(elem_id="patches", padding=False)
    gr.HTML(markup.wrap("<h2>Difference of two versions</h2>"), padding=False)
    with gr.Row(equal_height=True):
        old = gr.Dropdown(label="From", interactive=True, filterable=False, elem_id="diff-old")
        new = gr.Dropdown(label="To", interactive=True, filterable=False, elem_id="diff-new")
        compare = gr.Button("Compare", elem_id="diff", elem_classes="nr-go", size="md", min_width=100)
    difference = gr.HTML(elem_id="difference", padding=False)
    compare.click(lambda a, b: diff_html(desk, a, b), [old, new], difference, show_progress="hidden")
    if desk.admin:
        return PatchesParts(listing, old, new, _admin())
    words = "To activate, roll back, push and pull from here, start the demo with --admin."
    gr.HTML(markup.wrap(markup.note(words)), padding=False)
    return PatchesParts(listing, old, new, None)


def _admin() -> AdminParts:
    gr.HTML(markup.wrap("<h2>Change</h2>"), padding=False)
    with gr.Row(equal_height=True):
        which = gr.Dropdown(label="Patch", interactive=True, filterable=False, elem_id="which", scale=2)
        activate = gr.Button(
            "Activate", variant="stop", elem_id="activate", elem_classes="nr-go", size="md", min_width=100
        )
        rollback = gr.Button(
            "Roll back", variant="stop", elem_id="rollback", elem_classes="nr-go", size="md", min_width=100
        )
    with gr.Row(equal_height=True):
        repo = gr.Textbox(
            label="Repository", placeholder="org/name, or org/name@v3 to pull", elem_id="repo", scale=2, min_width=220
        )
        token = gr.Textbox(
            label="Hub token",
            type="password",
            placeholder="empty: this machine's own",
            elem_id="token",
            html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
        )
        private = gr.Checkbox(False, label="Private, where it has to be made", elem_id="private")
    with gr.Row():
        push = gr.Button("Push the patch", variant="stop", elem_id="push", size="md")
        pull = gr.Button("Pull into the store", variant="stop", elem_id="pull", size="md")
    outcome = gr.HTML(elem_id="outcome", padding=False)
    return AdminParts(which, repo, token, private, activate, rollback, push, pull, outcome)


def connect(desk: Desk, parts: AdminParts, refresh: Callable[[], list[Any]], lists: list[Any]) -> None:
    """Make the buttons work.

    Args:
        desk: the demo.
        parts: the buttons.
        refresh: new contents of every list of patches on the page.
        lists: those lists' components.
    """
    tab = Changes(desk, refresh)
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "changes"}
    out = [parts.outcome, parts.token]
    parts.activate.click(tab.activate, parts.which, [parts.outcome, *lists], **quiet)
    parts.rollback.click(tab.rollback, None, [parts.outcome, *lists], **quiet)
    parts.push.click(tab.push, [parts.which, parts.repo, parts.private, parts.token], out, **quiet)
    parts.pull.click(tab.pull, [parts.repo, parts.token], [*out, *lists], **quiet)


class Changes:
    """What the buttons do that exist with ``--admin`` only."""

    def __init__(self, desk: Desk, refresh: Callable[[], list[Any]]) -> None:
        self.desk, self.refresh = desk, refresh

    def activate(self, digest: str | None) -> list[Any]:
        """Make a patch active."""
        return self._switch(lambda: self.desk.backend.activate(self.desk.entry(digest)))

    def rollback(self) -> list[Any]:
        """Go back to the patch before."""
        return self._switch(self.desk.backend.rollback)

    def _switch(self, change: Callable[[], str]) -> list[Any]:
        try:
            if not self.desk.backend.can_switch:
                raise UsageError(
                    f"this demo may not switch patches {self.desk.backend.place}",
                    "start it with --admin-token-file, the file of the server's admin token",
                )
            said = markup.good(change())
        except NestError as error:
            said = markup.alert(error)
        return [markup.wrap(said), *self.refresh()]

    def push(self, digest: str | None, repo: str, private: bool, token: str) -> Iterator[list[Any]]:
        """Publish a patch, with its signature where the store has one."""

        def work(job: Job[str]) -> str:
            from nest_runtime.hub.publish import push
            from nest_runtime.hub.repository import parse_repo
            from nest_runtime.trust.guard import Guard
            from nest_runtime.trust.policy import Policy

            ref, patch = parse_repo(repo.strip()), self.desk.patch(self.desk.entry(digest).digest)
            if ref.revision is not None:
                raise UsageError(f"{repo!r} names a revision; expected a repository", f"give {ref.place}")
            store = self.desk.store
            material = Guard(Policy(require_signature=False), store).material(patch)
            done = push(patch, ref, store=store, material=material, private=private)
            verb = "is there already" if done.unchanged else "pushed"
            place = f"{ref.place}@{done.version}, {done.url}" + ("" if done.signed_by else "; it is not signed")
            return f"{patch.name}@{done.version} ({done.digest[:19]}) {verb}: {place}"

        for said in self._with_hub(work, token):
            yield [said, ""]

    def pull(self, repo: str, token: str) -> Iterator[list[Any]]:
        """Fetch a patch into the store, and offer it everywhere."""

        def work(job: Job[str]) -> str:
            from nest_runtime.hub.fetch import pull
            from nest_runtime.trust.guard import guard_for

            store = self.desk.store
            fetched, entry = pull(repo.strip(), store=store, guard=guard_for(store), why="from the demo")
            checked = fetched.verified is not None and fetched.verified.signed_by is not None
            signed = (
                f"good signature by {fetched.verified.key}"
                if checked and fetched.verified
                else "no signature was checked"
            )
            base = entry.base_model or entry.base_hash[:19]
            return f"pulled {entry.key} ({entry.digest[:19]}) for {base}, from {fetched.ref.place}; {signed}"

        said, unchanged = "", [gr.skip()] * len(self.refresh())
        for said in self._with_hub(work, token):
            yield [said, "", *unchanged]
        yield [said, "", *self.refresh()]

    def _with_hub(self, work: Callable[[Job[str]], str], token: str) -> Iterator[str]:
        """Run a change that speaks with the Hub; yields how far it is, then what came of it."""
        from nest_runtime.hub.huggingface import hub_session

        done: list[str] = []
        step, seconds = "beginning", 0.0

        def body(job: Job[str]) -> None:
            with hub_session(token.strip() or None, job.report):
                done.append(work(job))

        yield markup.wrap(markup.progress(step, 0, 0))
        try:
            for said in Job[str]().run(body, beat=BEAT):
                step, seconds = (said, 0.0) if said is not None else (step, seconds + BEAT)
                waited = f" ({seconds:.0f} s)" if seconds >= 2 else ""
                yield markup.wrap(markup.progress(f"{step}{waited}", 0, 0))
            yield markup.wrap(markup.good(done[0]))
        except NestError as error:
            yield markup.wrap(markup.alert(error))


def listing_html(desk: Desk) -> str:
    """All patches of the model: lineage, size, figures, signature."""
    try:
        entries, active = desk.entries(), desk.backend.active()
        rows = [_row(desk, entry, entries, active) for entry in entries]
    except NestError as error:
        return markup.wrap(markup.alert(error))
    if not rows:
        return markup.wrap(markup.note("There are no patches for this model yet: train one, or pull one."))
    columns = (
        "version",
        "lineage",
        "neurons",
        "trained numbers",
        "file",
        "jailbreak ASR",
        "over-refusal",
        "utility",
        "signature",
    )
    numbers = ("neurons", "trained numbers", "file", "jailbreak ASR", "over-refusal", "utility")
    marked = [n for n, entry in enumerate(entries) if entry.digest == active]
    base = next((figures[1] for figures in (_figures(desk.patch(e.digest)) for e in entries) if figures[1]), "")
    table = markup.table(columns, rows, caption="Patches of this model", numbers=numbers, marked=marked)
    return markup.wrap(table, markup.note(base) if base else "")


def _row(desk: Desk, entry: Entry, entries: list[Entry], active: str | None) -> list[str]:
    patch = desk.patch(entry.digest)
    now = ' <span class="nr-badge nr-active">active</span>' if entry.digest == active else ""
    about = entry.name + (", comes with the package" if entry.builtin else "")
    under = f"<div class='nr-note'>{markup.text(about)}<br>{markup.code(entry.digest)}</div>"
    figures = _figures(patch)[0]
    return [
        f"{markup.text(entry.version)}{now}{under}",
        markup.text(_lineage(entry, entries)),
        f"{patch.neurons:,}",
        f"{patch.parameters:,}",
        _size(entry.bytes),
        *figures,
        markup.text(desk.signature(entry)),
    ]


def _lineage(entry: Entry, entries: list[Entry]) -> str:
    """``from v2, from v1``, as far back as the store knows."""
    by_digest = {item.digest: item for item in entries}
    steps: list[str] = []
    parent = entry.parent
    while parent is not None and len(steps) < len(entries) + 1:
        known = by_digest.get(parent)
        steps.append(known.version if known else f"{parent[:15]}…")
        parent = known.parent if known else None
    return " ← ".join([entry.version, *steps]) if steps else f"{entry.version}, trained anew"


def _figures(patch: Patch) -> tuple[list[str], str]:
    """Attack success, over-refusal and utility that a patch's header states, and the base's as a sentence."""
    metrics = patch.header()["metrics"]
    test, base = _rates(metrics.get("test")), _rates(metrics.get("base"))
    shown = [markup.percent(value) for value in test]
    if base[0] is None:
        return shown, ""
    words = ", ".join(
        f"{name} {markup.percent(v)}"
        for name, v in zip(("jailbreak ASR", "over-refusal", "utility"), base, strict=True)
    )
    return shown, f"The bare base, by the same headers: {words}."


def _rates(figures: Any) -> tuple[float | None, float | None, float | None]:
    flat = markup.flat(figures) if isinstance(figures, dict) else {}
    found = [flat.get(key) for key in ("asr.jailbreak.asr", "over_refusal.rate", "utility.rate")]
    return tuple(float(v) if isinstance(v, int | float) else None for v in found)  # type: ignore[return-value]


def _size(count: int) -> str:
    return f"{count / 1000:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


def diff_html(desk: Desk, old: str | None, new: str | None) -> str:
    """What changed from one patch to another."""
    from nest_runtime.patch.algebra import diff

    try:
        before, after = (desk.patch(desk.entry(digest).digest) for digest in (old, new))
    except NestError as error:
        return markup.wrap(markup.alert(error))
    found = diff(before, after)
    words = f"{before.name}@{before.version} → {after.name}@{after.version}"
    words += " (re-tuned from it)" if found["is_child"] else ""
    words += "" if found["same_base"] else "; for different base models"
    fields = [
        [markup.text(key), _brief(value["old"]), _brief(value["new"])]
        for key, value in found["header"].items()
        if not isinstance(value["old"], dict | list) and not isinstance(value["new"], dict | list)
    ]
    sites = [
        [
            markup.text(row["site"]),
            f"+{row['added']} −{row['removed']} ={row['kept']}",
            f"{row['clusters']['old']} → {row['clusters']['new']}",
            _number(row.get("change_norm")),
            _number(row.get("cosine")),
        ]
        for row in found["sites"]
    ]
    parts = [markup.note(words)]
    if fields:
        parts.append(markup.table(("field", "from", "to"), fields, caption="Header"))
    if sites:
        columns = ("site", "neurons", "clusters", "norm of the change", "cosine")
        parts.append(markup.table(columns, sites, caption="Sites that differ", numbers=columns[3:]))
    else:
        parts.append(markup.note("No site differs."))
    return markup.wrap(*parts)


def _brief(value: Any) -> str:
    words = "–" if value in (None, "") else str(value)
    return markup.code(words) if words.startswith("sha256:") else markup.text(words)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
