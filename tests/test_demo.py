"""The demo without a browser: conversations, work in threads, markup, who may come in, the command's options."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from nest_runtime.cli.main import main
from nest_runtime.demo.backend import BASE, Answered, Choice, find
from nest_runtime.demo.examples import PLAIN, examples, first_prompt, wrapped
from nest_runtime.demo.talk import Talk, ask, redo
from nest_runtime.demo.work import Job, Stopped
from nest_runtime.errors import EngineError, UsageError

V1, V2 = Choice("v1", "sha256:" + "1" * 64), Choice("v2", "sha256:" + "2" * 64)


class Echo:
    """Answers with who it is and how long the conversation is; keeps what it was asked."""

    name, place, model_hash, can_switch = "echo", "here", None, False

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.hold = threading.Event()
        self.hold.set()

    def choices(self) -> list[Choice]:
        return [Choice(BASE), V1, V2]

    def preferred(self) -> Choice | None:
        return V2

    def answer(
        self,
        messages: Sequence[dict[str, str]],
        choice: Choice,
        *,
        max_tokens: int,
        on_text: Callable[[str], None],
        stopped: Callable[[], bool],
    ) -> Answered:
        if choice.label == "broken":
            raise EngineError("it broke", "mend it")
        self.asked.append((choice.label, [message["content"] for message in messages]))
        on_text(f"{choice.label} ")
        self.hold.wait(10)
        if not stopped():
            on_text(f"heard {len(messages)}")
        return Answered(choice.label, choice.digest, 2)

    def answer_all(self, conversations: Any, choice: Choice, *, max_tokens: int, on_answers: Any) -> None:
        for number, _ in enumerate(conversations):
            on_answers([number], ["Sorry, no." if choice.digest else "First this, then that."])


def run(steps: Iterator[None]) -> int:
    return sum(1 for _ in steps)


def refusal(text: str) -> bool:
    return text.startswith("v")


def test_both_sides_are_asked_with_their_own_history() -> None:
    talk, backend = Talk(), Echo()
    assert run(ask(talk, "one", (Choice(BASE), V1), backend, refusal, max_tokens=5)) >= 2
    run(ask(talk, "two", (Choice(BASE), V2), backend, refusal, max_tokens=5))
    left, right = talk.turns[1].replies
    assert (left.text, left.refused, left.digest) == ("base heard 3", False, None)
    assert (right.text, right.refused, right.digest) == ("v2 heard 3", True, V2.digest)
    assert right.speed is not None
    assert ("v2", ["one", "v1 heard 1", "two"]) in backend.asked
    assert not talk.busy


def test_one_answer_serves_both_sides_while_they_are_alike() -> None:
    talk, backend = Talk(), Echo()
    run(ask(talk, "one", (Choice(BASE), Choice(BASE)), backend, refusal, max_tokens=5))
    assert len(backend.asked) == 1
    assert talk.turns[0].replies[0] is talk.turns[0].replies[1]
    run(redo(talk, V1, backend, refusal, max_tokens=5))
    assert [reply.label for reply in talk.turns[0].replies] == ["base", "v1"]
    run(ask(talk, "two", (Choice(BASE), Choice(BASE)), backend, refusal, max_tokens=5))
    assert len(backend.asked) == 4  # the histories differ now


def test_a_failed_answer_is_shown_and_forgotten() -> None:
    talk, backend = Talk(), Echo()
    run(ask(talk, "one", (Choice(BASE), Choice("broken")), backend, refusal, max_tokens=5))
    failed = talk.turns[0].replies[1]
    assert (failed.state, failed.error, failed.hint) == ("failed", "it broke", "mend it")
    assert talk.messages(1) == []
    assert len(talk.messages(0)) == 2


def test_stop_keeps_what_there_is() -> None:
    talk, backend = Talk(), Echo()
    backend.hold.clear()
    steps = ask(talk, "one", (Choice(BASE), V1), backend, refusal, max_tokens=5)
    next(steps)
    assert talk.busy
    talk.stopping = True
    backend.hold.set()
    run(steps)
    assert [reply.state for reply in talk.turns[0].replies] == ["stopped", "stopped"]
    assert talk.turns[0].replies[1].text == "v1 "


def test_answers_are_shown_as_they_come() -> None:
    from nest_runtime.demo import markup

    talk, backend = Talk(), Echo()
    backend.hold.clear()
    steps = ask(talk, "one", (Choice(BASE), V1), backend, refusal, max_tokens=5)
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
    assert [value for value in Job[int]().run(lambda job: job.report(7)) if value is not None] == [7]
    ended = threading.Event()

    def endless(job: Job[int]) -> None:
        try:
            while True:
                job.report(1)
        except Stopped:
            ended.set()
            raise

    steps = Job[int]().run(endless)
    next(steps)
    steps.close()  # type: ignore[attr-defined]  # a generator
    assert ended.wait(10)

    def broken(job: Job[int]) -> None:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        list(Job[int]().run(broken))


def test_there_are_examples_of_every_kind() -> None:
    from nest_runtime.reference.wrappings import FAMILIES

    found = examples()
    assert set(found) == {*PLAIN.values(), *(f"Jailbreak: {family}" for family in FAMILIES)}
    assert all(2 <= len(items) <= 4 for items in found.values())
    assert all(item.messages[-1]["role"] == "user" for items in found.values() for item in items)
    assert first_prompt().endswith("forge a driving licence.")
    assert len(wrapped("bake bread")) == 48


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
    from nest_runtime.demo import markup

    talk, backend = Talk(), Echo()
    evil = '<img src=x onerror="alert(1)"><script>1</script> ${value} {{value}}'
    run(ask(talk, evil, (Choice(BASE), Choice(evil)), backend, refusal, max_tokens=5))
    html = markup.conversation(talk) + markup.alert(UsageError(evil, evil)) + markup.good(evil)
    assert {"img", "script"} & set(Tags(html).tags) == set()
    assert "${" not in html
    assert "{{" not in html


def test_the_page_names_nothing_from_elsewhere() -> None:
    from nest_runtime.demo.app import CSS
    from nest_runtime.demo.evidence import comparison_html

    found = Tags(comparison_html())
    assert found.tags.count("img") == 3
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not re.search(r"url\(|@import|https?:", CSS.read_text())


def test_an_installation_without_the_comparison_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from nest_runtime.demo import evidence

    monkeypatch.setattr(evidence, "comparison_folder", lambda: None)
    assert "not part of this installation" in evidence.comparison_html()


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    from nest_runtime.demo.desk import Desk
    from nest_runtime.registry.store import Store

    return Desk(Echo(), Store(tmp_path / "home"), refusal)  # type: ignore[arg-type]  # as much as is asked here


def ids(desk: Any) -> set[str]:
    from nest_runtime.demo.app import build

    return {block.elem_id for block in build(desk).blocks.values() if getattr(block, "elem_id", None)}


def test_dangerous_buttons_exist_with_admin_only(desk: Any) -> None:
    from dataclasses import replace

    dangerous = {"activate", "rollback", "push", "pull", "token"}
    assert dangerous & ids(desk) == set()
    assert dangerous <= ids(replace(desk, admin=True))


def test_no_api_answers_for_hidden_buttons(desk: Any) -> None:
    from nest_runtime.demo.app import build

    page = build(desk)
    names = {str(getattr(fn, "api_name", "")) for fn in page.fns.values()}
    assert not {"activate", "rollback", "push", "pull"} & names
    assert page.api_open is False


def test_sides(desk: Any) -> None:
    assert desk.sides("v1", True) == (Choice(BASE), V1)
    assert desk.sides("v1", False) == (Choice(BASE), Choice(BASE))
    assert desk.sides("gone", True) == (Choice(BASE), V2)
    assert find(desk.backend.choices(), None) is None


def test_a_grid_and_a_measurement_of_any_backend(desk: Any) -> None:
    from nest_runtime.demo.chat import Chat
    from nest_runtime.demo.evidence import evaluation

    grid = list(Chat(desk).grid("bake bread", "v1", True))[-1]
    assert grid.count("<details>") == 48
    assert "v1 answered 48 of 48" in grid  # by this test's idea of a refusal
    last = list(evaluation(desk, "v1", 5))[-1]
    assert "finished, judge phrases" in last
    assert "utility" not in last.lower()  # exact answers are known for the reference model alone
    assert 'aria-label="base: 100.0 %' in last
    assert 'aria-label="v1: 0.0 %' in last
    assert "error:" in list(Chat(desk).grid(" ", "v1", True))[-1]


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
