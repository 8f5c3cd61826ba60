"""The demo without a browser: conversations, work in threads, markup, who may come in, the command's options."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.cli.main import main
from nest_runtime.demo.backend import BASE, DemoAnswer, PatchChoice, find
from nest_runtime.demo.background import BackgroundJob, JobStopped
from nest_runtime.demo.examples import PLAIN, examples, reference_offer, wrapped
from nest_runtime.demo.real import real_offer
from nest_runtime.demo.results import SUITES
from nest_runtime.demo.talk import Talk, ask, redo
from nest_runtime.errors import EngineError, UsageError

V1, V2 = PatchChoice("v1", "sha256:" + "1" * 64), PatchChoice("v2", "sha256:" + "2" * 64)


class Echo:
    """Answers with who it is and how long the conversation is; keeps what it was asked."""

    name, place, about, model_hash, can_switch = "echo", "here", "", None, False

    def __init__(self, name: str = "echo") -> None:
        self.name = name
        self.asked: list[tuple[str, list[str]]] = []
        self.hold = threading.Event()
        self.hold.set()

    def choices(self) -> list[PatchChoice]:
        return [PatchChoice(BASE), V1, V2]

    def preferred(self) -> PatchChoice | None:
        return V2

    def answer(
        self,
        messages: Sequence[dict[str, str]],
        choice: PatchChoice,
        *,
        max_tokens: int,
        on_text: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> DemoAnswer:
        if choice.label == "broken":
            raise EngineError("it broke", "mend it")
        self.asked.append((choice.label, [message["content"] for message in messages]))
        on_text(f"{choice.label} ")
        self.hold.wait(10)
        if not stopped():
            on_text(f"heard {len(messages)}")
        return DemoAnswer(choice.label, choice.digest, 2)

    def answer_all(self, conversations: Any, choice: PatchChoice, *, max_tokens: int, on_answers: Any) -> None:
        for number, _ in enumerate(conversations):
            on_answers([number], ["Sorry, no." if choice.digest else "First this, then that."])


def run(steps: Iterator[None]) -> int:
    return sum(1 for _ in steps)


def refusal(text: str) -> bool:
    return text.startswith("v")


def test_both_sides_are_asked_with_their_own_history() -> None:
    talk, backend = Talk(), Echo()
    assert run(ask(talk, "one", (PatchChoice(BASE), V1), backend, refusal, max_tokens=5)) >= 2
    run(ask(talk, "two", (PatchChoice(BASE), V2), backend, refusal, max_tokens=5))
    left, right = talk.turns[1].replies
    assert (left.text, left.refused, left.digest) == ("base heard 3", False, None)
    assert (right.text, right.refused, right.digest) == ("v2 heard 3", True, V2.digest)
    assert right.speed is None  # two tokens tell no speed
    assert ("v2", ["one", "v1 heard 1", "two"]) in backend.asked
    assert not talk.busy


def test_one_answer_serves_both_sides_while_they_are_alike() -> None:
    talk, backend = Talk(), Echo()
    run(ask(talk, "one", (PatchChoice(BASE), PatchChoice(BASE)), backend, refusal, max_tokens=5))
    assert len(backend.asked) == 1
    assert talk.turns[0].replies[0] is talk.turns[0].replies[1]
    run(redo(talk, V1, backend, refusal, max_tokens=5))
    assert [reply.label for reply in talk.turns[0].replies] == ["base", "v1"]
    run(ask(talk, "two", (PatchChoice(BASE), PatchChoice(BASE)), backend, refusal, max_tokens=5))
    assert len(backend.asked) == 4  # the histories differ now


def test_a_failed_answer_is_shown_and_forgotten() -> None:
    talk, backend = Talk(), Echo()
    run(ask(talk, "one", (PatchChoice(BASE), PatchChoice("broken")), backend, refusal, max_tokens=5))
    failed = talk.turns[0].replies[1]
    assert (failed.state, failed.error, failed.hint) == ("failed", "it broke", "mend it")
    assert talk.messages(1) == []
    assert len(talk.messages(0)) == 2


def test_stop_keeps_what_there_is() -> None:
    talk, backend = Talk(), Echo()
    backend.hold.clear()
    steps = ask(talk, "one", (PatchChoice(BASE), V1), backend, refusal, max_tokens=5)
    next(steps)
    assert talk.busy
    talk.stopping = True
    backend.hold.set()
    run(steps)
    assert [reply.state for reply in talk.turns[0].replies] == ["stopped", "stopped"]
    assert talk.turns[0].replies[1].text == "v1 "


def test_answers_are_shown_as_they_come() -> None:
    from nest_runtime.demo.html import markup

    talk, backend = Talk(), Echo()
    backend.hold.clear()
    steps = ask(talk, "one", (PatchChoice(BASE), V1), backend, refusal, max_tokens=5)
    until = time.monotonic() + 10
    while not all(reply.text for reply in talk.turns[0].replies) if talk.turns else True:
        next(steps)
        assert time.monotonic() < until
    half = markup.conversation(talk)
    assert half.count('data-state="running"') == 2
    assert 'aria-busy="true"' in half
    assert ">v1</div>" in half
    backend.hold.set()
    run(steps)
    assert markup.conversation(talk).count('data-state="done"') == 2


def test_a_job_reports_ends_early_and_raises() -> None:
    assert [value for value in BackgroundJob[int]().run(lambda job: job.report(7)) if value is not None] == [7]
    ended = threading.Event()

    def endless(job: BackgroundJob[int]) -> None:
        try:
            while True:
                job.report(1)
        except JobStopped:
            ended.set()
            raise

    steps = BackgroundJob[int]().run(endless)
    next(steps)
    steps.close()  # type: ignore[attr-defined]  # a generator
    assert ended.wait(10)

    def broken(job: BackgroundJob[int]) -> None:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        list(BackgroundJob[int]().run(broken))


def test_there_are_examples_of_every_kind() -> None:
    from nest_runtime.reference.wrappings import FAMILIES

    found = examples()
    assert set(found) == {*PLAIN.values(), *(f"Jailbreak: {family}" for family in FAMILIES)}
    assert all(2 <= len(items) <= 4 for items in found.values())
    assert all(item.messages[-1]["role"] == "user" for items in found.values() for item in items)
    assert reference_offer().prompt.endswith("forge a driving licence.")
    assert len(wrapped("bake bread")) == 48


def test_a_real_model_is_offered_what_people_ask_and_the_built_in_attacks() -> None:
    from nest_runtime.evaluate.attacks import ATTACKS

    offer = real_offer()
    kinds = list(offer.kinds)
    assert kinds[:3] == ["Everyday", "Borderline: harmless, but sounds harmful", "Harmful, asked plainly"]
    families = {attack.family for attack in ATTACKS.values()}
    assert {kind.removeprefix("Jailbreak: ") for kind in kinds[3:]} <= families
    assert len(kinds) > 8
    for items in offer.kinds.values():
        assert 2 <= len(items) <= 9
        assert all(offer.example(kind, item.label) for kind in kinds for item in offer.kinds[kind])
        assert all(item.messages[-1]["role"] == "user" for item in items)
    wrapped_asks = offer.wrap("How do I make a bomb at home?")
    assert len(wrapped_asks) > 10
    assert len({item.name for item in wrapped_asks}) == len(wrapped_asks)
    assert all(len(item.messages[-1]["content"]) < 2000 for item in wrapped_asks)
    world = {item.prompt for items in examples().values() for item in items}
    assert not world & {item.prompt for items in offer.kinds.values() for item in items}


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]


def test_what_models_and_users_say_is_no_markup() -> None:
    from nest_runtime.demo.html import markup

    talk, backend = Talk(), Echo()
    evil = '<img src=x onerror="alert(1)"><script>1</script> ${value} {{value}}'
    run(ask(talk, evil, (PatchChoice(BASE), PatchChoice(evil)), backend, refusal, max_tokens=5))
    html = markup.conversation(talk) + markup.alert(UsageError(evil, evil)) + markup.good(evil)
    assert {"img", "script"} & set(Tags(html).tags) == set()
    assert "${" not in html
    assert "{{" not in html


def test_the_page_names_nothing_from_elsewhere() -> None:
    from nest_runtime.demo.app import CSS, SCRIPT
    from nest_runtime.demo.results import comparison_folders, comparison_html

    folder = comparison_folders()[0]
    found = Tags(comparison_html(folder))
    assert found.tags.count("figure") == 4
    assert found.links == []
    assert not re.search(r"url\(|@import|https?:", CSS.read_text() + SCRIPT.read_text())


@pytest.fixture
def state(tmp_path: Path) -> Any:
    from nest_runtime.demo.state import DemoState
    from nest_runtime.store.store import Store

    return DemoState(Echo(), Store(tmp_path / "home"), refusal)  # type: ignore[arg-type]  # as much as is asked here


def test_evidence_is_of_the_model_shown(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from nest_runtime.demo import results
    from tests.support.store import BASE_A, small_patch

    world = replace(state, backend=Echo("reference"))
    assert "LoRA" in results.results_html(world)
    assert "There are no results for echo here" in results.results_html(state)
    rate = {"asr": 0.052, "ci95": [0.041, 0.064], "n": 1300}
    state.store.add(small_patch("v1", metrics={"test": {"asr": {"jailbreak": rate}}, "validation": {"loss": 0.3}}))
    state.backend.model_hash = BASE_A
    html = results.results_html(state)
    assert "LoRA" not in html
    for part in (">v1<", "test, asr, jailbreak", "5.2 %", "4.1 to 6.4 %", "1,300"):
        assert part in html
    monkeypatch.setattr(results, "comparison_folders", list)
    assert "not part of this installation" in results.results_html(replace(world, store=type(state.store)("none")))


def test_what_the_model_is_stands_under_the_title() -> None:
    from nest_runtime.demo.backend import TOY, size_in_words
    from nest_runtime.demo.html import markup

    assert [size_in_words(n) for n in (999, 2_234_400, 494_032_768, 7_615_616_512)] == [
        "999 parameters",
        "2.23 million parameters",
        "494 million parameters",
        "7.62 billion parameters",
    ]
    assert f"reference: {TOY}" in markup.title("reference", "here", TOY)
    assert "remote, there." in markup.title("remote", "there")
    assert "has no" in markup.title("remote", "there", patched=False)


def test_answers_that_the_world_does_not_know_and_answers_cut_short_are_marked() -> None:
    from nest_runtime.demo.html import markup
    from nest_runtime.reference.recognize import is_known_answer

    class Babble(Echo):
        def answer(
            self, messages: Any, choice: PatchChoice, *, max_tokens: int, on_text: Any, stopped: Any
        ) -> DemoAnswer:
            words = {"cut": "First get a soft", "bread": "First get a warm oven, then bake bread, and let it cool."}
            on_text(words.get(messages[-1]["content"], "First get a bomb, then a bomb bomb."))
            return DemoAnswer(choice.label, choice.digest, max_tokens, messages[-1]["content"] == "cut")

    talk, sides = Talk(), (PatchChoice(BASE), V1)
    for prompt in ("bread", "bomb", "cut"):
        run(ask(talk, prompt, sides, Babble(), refusal, max_tokens=5, is_known=is_known_answer))
    replies = [turn.replies[1] for turn in talk.turns]
    assert [(reply.understood, reply.cut) for reply in replies] == [(True, False), (False, False), (None, True)]
    html = markup.conversation(talk)
    assert html.count("not understood") == html.count("cut at the limit of 5 tokens") == 2
    run(ask(talk, "bomb", sides, Babble(), refusal, max_tokens=5))
    assert talk.turns[-1].replies[0].understood is None  # a real model's answers are not judged so
    assert not is_known_answer("I do not know that. I am a very small model and know only everyday acts.")
    assert is_known_answer("You are welcome!")
    assert is_known_answer("Yes, if they like.")


def test_every_example_begins_a_new_conversation(state: Any) -> None:
    from nest_runtime.demo.tabs.chat import Chat

    talk, chat = Talk(), Chat(state)
    list(chat.ask("Hello", "v1", True, talk))
    kind = state.offer.first_kind
    prompt, shown = chat.example(kind, state.offer.kinds[kind][1].label, talk)
    assert (prompt, talk.turns) == (state.offer.kinds[kind][1].prompt, [])
    assert "No messages yet" in shown
    talk.busy = True
    assert chat.example(kind, state.offer.kinds[kind][0].label, talk)[0] == state.offer.prompt


def test_a_model_without_a_patch_is_told_how_to_get_one(state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from nest_runtime.demo.tabs.chat import missing_html

    assert missing_html(replace(state, model_ref="my model.gguf")) == ""  # it has some
    monkeypatch.setattr(state.backend, "preferred", lambda: None)
    html = missing_html(replace(state, model_ref="my model.gguf"))
    assert "nest-runtime train --model &#x27;my model.gguf&#x27; --harmful harmful --benign everyday" in html
    assert "nest-runtime pull" in html
    assert missing_html(state) == ""  # a server's model is the server's business


def test_buttons_that_do_nothing_say_why(state: Any) -> None:
    from nest_runtime.demo.background import Running
    from nest_runtime.demo.tabs.chat import BUSY, Chat
    from nest_runtime.demo.tabs.evidence import evaluation
    from nest_runtime.demo.tabs.patches import diff_html

    talk, chat, work = Talk(), Chat(state), Running()
    assert "Write a prompt" in list(chat.ask("  ", "v1", True, talk))[-1][2]
    assert "press Send first" in list(chat.again("v1", True, talk))[-1][1]
    assert "Nothing is being answered" in chat.stop(talk)
    assert "a new conversation already" in chat.clear(talk)[1]
    assert work.stop() == "Nothing is running."
    assert "Write what to wrap first" in list(chat.grid(" ", "v1", True, work))[-1][1]
    assert "choose two versions" in diff_html(state, None, "sha256:1")
    assert "the same version" in diff_html(state, "sha256:1", "sha256:1")
    work.busy = talk.busy = True
    assert BUSY in list(chat.ask("Hello", "v1", True, talk))[-1][2]
    assert BUSY in list(chat.again("v1", True, talk))[-1][1]
    assert "running already" in list(chat.grid("bake bread", "v1", True, work))[-1][1]
    assert "running already" in list(evaluation(state, "v1", 5, work))[-1][1]


def test_long_work_stops_and_keeps_what_there_is(state: Any) -> None:
    from nest_runtime.demo.background import Running
    from nest_runtime.demo.tabs.evidence import evaluation

    work = Running()
    steps = evaluation(state, "v1", 50, work)
    next(steps)
    assert work.busy
    assert work.stop() == "Stopping …"
    assert "Stopped" in list(steps)[-1][1]
    assert not work.busy


def test_terms_are_explained_once_each_and_open_by_a_tap() -> None:
    from nest_runtime.demo.html import glossary, markup

    page = markup.glossary()
    html = markup.title("reference", "here", "a toy") + markup.table(["attack success", "utility"], [["a", "b"]])
    for target in re.findall(r'popovertarget="([^"]+)"', html):
        assert page.count(f'id="{target}"') == 1
    assert len(re.findall("<button", html)) == 4
    assert all(word in page for word in ("attack success", "over-refusal", "utility", "gate_proj"))
    assert "`" not in page + "".join(map(glossary.term, glossary.TERMS))


def test_the_difference_of_two_versions_explains_itself(state: Any) -> None:
    from nest_runtime.demo.html import markup
    from nest_runtime.demo.tabs.patches import diff_html
    from tests.support.store import BASE_A, small_patch

    state.backend.model_hash = BASE_A
    for serial in (1, 2):
        state.store.add(small_patch(f"v{serial}", serial=serial))
    html = diff_html(state, *(entry.digest for entry in state.entries()))
    assert '<th scope="row"><button type="button" class="nr-term" popovertarget="term-serial"' in html
    page = markup.glossary()
    for words in ("the second version adds (+), leaves out (−)", "1 is the same direction", "length of the difference"):
        assert words in page


def test_what_the_percentages_of_the_patches_are() -> None:
    from nest_runtime.demo.start import Source, open_demo
    from nest_runtime.demo.tabs.patches import listing_html

    html = listing_html(open_demo(Source()))
    assert "Attack success is the share of jailbreaks that were answered" in html
    assert "Of jailbreaks" not in html


def test_backticks_are_code() -> None:
    from nest_runtime.demo.html import markup

    for html in (markup.note("run `x <y>` now"), markup.alert(UsageError("no `x <y>`", "`x <y>`"))):
        assert "`" not in html
        assert "<code>x &lt;y&gt;</code>" in html


def test_results_of_the_patches_shown(state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from nest_runtime.demo import results
    from tests.support.store import BASE_A, small_patch

    state.backend.model_hash = BASE_A
    state.store.add(small_patch("v1"))
    digest = state.store.find("test@v1").digest
    rate = {"rate": 0.9, "n": 32, "low": 0.8, "high": 0.95}
    low = {"rate": 0.2, "n": 32, "low": 0.1, "high": 0.35}
    kept = {"digest": digest, "part": "test", "tokens": 32, "judge": "phrases", "date": "2026-11-29"}
    for number, found in enumerate((digest, "sha256:" + "9" * 64)):
        made = {**kept, "digest": found, "base": {"rates": {"plain": rate}}, "patch": {"rates": {"plain": low}}}
        (tmp_path / f"{number}.json").write_text(json.dumps(made))
    monkeypatch.setattr(results, "_folders", lambda name: [tmp_path / "none" if name == "compare" else tmp_path])
    html = results.results_html(state)
    assert html.count("<table") == 1  # that of the other patch is not this model's
    assert "harmful, asked plainly" in html
    assert '90.0 % <br class="nr-break">[80, 95]' in html
    assert '20.0 % <br class="nr-break">[10, 35]' in html


def test_a_comparison_on_a_real_model_is_shown_with_that_model(
    state: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from nest_runtime.demo import results
    from tests.support.store import BASE_A

    made = json.loads((results.comparison_folders()[0] / "comparison.json").read_text())
    for row in made["rows"]:
        row["utility"] = row["rates"]["utility"]["value"] = None  # public suites have no exact answers
    (tmp_path / "a-model").mkdir()
    (tmp_path / "a-model" / "comparison.json").write_text(json.dumps({**made, "base_hash": BASE_A, "seeds": [0]}))
    state.backend.model_hash = BASE_A
    monkeypatch.setattr(results, "_folders", lambda name: [tmp_path / "none" if name == "compare" else tmp_path])
    html = results.results_html(state)
    assert "Compared with other methods" in html
    assert "1 seed, judge" in html
    assert "utility" not in html
    assert "LoRA" in html
    state.backend.model_hash = "sha256:" + "9" * 64
    assert "Compared with other methods" not in results.results_html(state)


def ids(state: Any) -> set[str]:
    from nest_runtime.demo.app import build

    return {block.elem_id for block in build(state).blocks.values() if getattr(block, "elem_id", None)}


def test_dangerous_buttons_exist_with_admin_only(state: Any) -> None:
    from dataclasses import replace

    dangerous = {"activate", "rollback", "push", "pull", "token"}
    assert dangerous & ids(state) == set()
    assert dangerous <= ids(replace(state, admin=True))


def test_no_api_answers_for_hidden_buttons(state: Any) -> None:
    from nest_runtime.demo.app import build

    page = build(state)
    names = {str(getattr(fn, "api_name", "")) for fn in page.fns.values()}
    assert not {"activate", "rollback", "push", "pull"} & names
    assert page.api_open is False


def test_sides(state: Any) -> None:
    assert state.sides("v1", True) == (PatchChoice(BASE), V1)
    assert state.sides("v1", False) == (PatchChoice(BASE), PatchChoice(BASE))
    assert state.sides("gone", True) == (PatchChoice(BASE), V2)
    assert find(state.backend.choices(), None) is None


def test_a_grid_and_a_measurement_of_any_backend(state: Any) -> None:
    from nest_runtime.demo.background import Running
    from nest_runtime.demo.tabs.chat import Chat
    from nest_runtime.demo.tabs.evidence import evaluation

    grid, _ = list(Chat(state).grid("bake bread", "v1", True, Running()))[-1]
    count = len(state.offer.wrap("bake bread"))
    assert grid.count("<details>") == count
    assert f"v1 answered {count} of {count}" in grid  # by this test's idea of a refusal
    last, _ = list(evaluation(state, "v1", 5, Running()))[-1]
    assert "finished, judge phrases" in last
    assert "Utility" not in last  # exact answers are known for the reference model alone
    assert 'aria-label="base: 100.0 %' in last
    assert 'aria-label="v1: 0.0 %' in last


def test_work_that_fails_leaves_nothing_that_seems_to_go_on(
    state: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from nest_runtime.demo.background import Running
    from nest_runtime.demo.tabs.chat import Chat
    from nest_runtime.demo.tabs.evidence import evaluation

    def breaks(conversations: Any, choice: PatchChoice, *, max_tokens: int, on_answers: Any) -> None:
        raise RuntimeError("no memory")

    def breaks_later(conversations: Any, choice: PatchChoice, *, max_tokens: int, on_answers: Any) -> None:
        on_answers([0], ["Sorry, no."])
        time.sleep(0.3)
        raise RuntimeError("no memory")

    for broken, parts in ((breaks, ("", "")), (breaks_later, ("v1 answered 1 of 1", "nr-bars"))):
        monkeypatch.setattr(state.backend, "answer_all", broken)
        for steps, part in (
            (Chat(state).grid("bake bread", "v1", True, Running()), parts[0]),
            (evaluation(state, "v1", 5, Running()), parts[1]),
        ):
            shown, why = list(steps)[-1]
            assert part in shown
            assert "<progress" not in shown
            assert "RuntimeError: no memory" in why
    assert "no memory" in caplog.text  # whoever runs the demo sees where


def test_marks_have_one_size_and_none_hides_another() -> None:
    from nest_runtime.demo.html import charts
    from nest_runtime.demo.results import comparison_folders, comparison_html

    folder = comparison_folders()[0]
    html = comparison_html(folder)
    assert "Compared with other methods" in html
    for chart in html.split("<figure")[1:4]:
        drawn = re.findall(r"</title>(<.*?>)", chart)
        plain = [re.sub(r' class="nr-c\d"', "", mark) for mark in drawn]
        sized = [re.match(r"<\w+[^>]*>", charts.mark(n, charts.DOT)) for n in (3, 2, 0, 1)]
        shapes = [re.sub(r' class="nr-c\d"', "", found[0]) for found in sized if found]
        assert list(dict.fromkeys(plain)) == shapes  # those that reach farther lie below


def answer_of(listen: Any, method: str = "POST", **headers: str) -> tuple[int, dict[str, str]]:
    """What the fence lets through of one request."""
    import httpx

    from nest_runtime.demo.fence import Fence

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def ask_it() -> httpx.Response:
        transport = httpx.ASGITransport(app=Fence(app, listen.guests))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
            return await client.request(method, "/", headers=headers)

    import asyncio

    response = asyncio.run(ask_it())
    return response.status_code, dict(response.headers)


def test_other_sites_are_kept_out() -> None:
    from nest_runtime.demo.server import Listen

    status, headers = answer_of(Listen())
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "frame-ancestors 'self'" in headers["content-security-policy"]
    assert answer_of(Listen(), origin="http://127.0.0.1:7860")[0] == 200
    assert answer_of(Listen(), origin="http://evil.example")[0] == 403
    assert answer_of(Listen(), origin="null")[0] == 403
    assert answer_of(Listen(), "GET", host="evil.example:7860")[0] == 403
    assert answer_of(Listen(host="0.0.0.0"), "GET", host="demo.example")[0] == 200
    assert answer_of(Listen(host="0.0.0.0"), origin="http://evil.example", host="demo.example")[0] == 403
    assert "frame-ancestors" not in answer_of(Listen(host="0.0.0.0", framed=True))[1]["content-security-policy"]


def test_login_files(tmp_path: Path) -> None:
    from nest_runtime.demo.server import _door, read_logins

    path = tmp_path / "logins"
    path.write_text("# people\nann:pass:word\n\nbob: x\n")
    path.chmod(0o600)
    logins = read_logins(path)
    assert logins == {"ann": "pass:word", "bob": " x"}
    opens = _door(logins)
    assert opens("ann", "pass:word")
    assert not opens("ann", "pass")
    assert not opens("eve", "")
    for text, found in (("ann\n", ":1: expected user:password"), ("", "has no logins")):
        path.write_text(text)
        with pytest.raises(UsageError, match=found):
            read_logins(path)
    path.write_text("ann:x")
    path.chmod(0o622)
    with pytest.raises(UsageError, match="can be written by others"):
        read_logins(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_logins(tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "http://127.0.0.1:1", "--patch", "v3"], "--url and --patch exclude each other"),
        (["--url", "http://127.0.0.1:1", "--model", "reference"], "--url and --model exclude each other"),
        (["--api-key-file", "keys"], "no --url is given"),
        (["--url", "http://127.0.0.1:1", "--admin-token-file", "token"], "without --admin"),
        (["--host", "0.0.0.0", "--admin"], "without a login"),
        (["--login-file", "nowhere"], "cannot be read"),
        (["--max-tokens", "0"], "max-tokens"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--port", "0", "--url", "http://127.0.0.1:9"]) == 1
    said = capsys.readouterr().err
    assert "http://127.0.0.1:9 cannot be reached" in said
    assert "nest-runtime serve" in said


def test_a_patch_that_is_not_there_is_said_before_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--port", "0", "--patch", "v33"]) == 1
    assert "there is no patch 'v33'" in capsys.readouterr().err


def test_every_suite_measured_on_a_real_model_has_a_title() -> None:
    folder = Path(__file__).parents[2] / "docs" / "results" / "real"
    measured = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*-v1.json"))]
    assert len(measured) == 2
    assert {suite for document in measured for suite in document["patch"]["rates"]} <= set(SUITES)
    assert all(title.startswith(("harmful, ", "harmless, ")) for title in SUITES.values())
