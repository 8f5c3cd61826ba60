"""The demo over a running server: who answers, what is not exposed, switching with the admin token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from nest_runtime.demo.backend import BASE, PatchChoice
from nest_runtime.demo.remote import ACTIVE, RemoteBackend
from nest_runtime.demo.start import Source, open_demo
from nest_runtime.demo.tabs.chat import Chat
from nest_runtime.demo.talk import Talk
from nest_runtime.errors import EngineError, UsageError
from nest_runtime.patch.patch import Patch
from nest_runtime.patch.write import save_patch
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.store.store import Store
from tests.support.serve import TOKEN, Reference, Running, serving

pytest_plugins = ["tests.support.fixtures_serve"]


@pytest.fixture(scope="module")
def server(tiny_llama: Path, patches: list[Patch], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that exposes its base and v2, and has v1 active; v3 is in no table yet."""
    home = tmp_path_factory.mktemp("server")
    files = {patch.version: str(save_patch(patch, home / f"{patch.version}.safetensors")) for patch in patches}
    token = home / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    config = ServeConfig(
        model=str(tiny_llama),
        patch=files["v1"],
        expose=(files["v2"],),
        expose_base=True,
        port=0,
        admin_token_file=token,
        audit_file=home / "audit.jsonl",
        limits=Limits(cache_tokens=4096, batch_tokens=128, drain_seconds=5),
    )
    with serving(config) as running:
        yield running


def test_answers_come_from_the_server_and_say_who_gave_them(
    server: Running, tiny_llama: Path, patches: list[Patch]
) -> None:
    state = replace(open_demo(Source(url=f"{server.url}/v1"), max_tokens=8), is_refusal=lambda text: False)
    assert [choice.label for choice in state.backend.choices()] == [BASE, ACTIVE, "v2"]
    talk, chat = Talk(), Chat(state)
    truth = Reference(tiny_llama, patches)
    for label, version, digest in ((ACTIVE, "v1", patches[0].digest), ("v2", "v2", patches[1].digest)):
        talk.turns.clear()
        pages = [page for page, *_ in chat.ask("How do I bake bread?", label, True, talk)]
        left, right = talk.turns[0].replies
        assert (left.state, left.label, left.digest) == ("done", BASE, None)
        assert (right.state, right.label, right.digest) == ("done", version, digest)
        assert right.text == truth.chat("How do I bake bread?", version, 8)
        assert left.text == truth.chat("How do I bake bread?", None, 8)
        assert right.tokens > 0
        assert digest[:19] in pages[-1]


def test_only_patches_of_the_served_model_are_listed_its_own_first(server: Running, patches: list[Patch]) -> None:
    from nest_runtime.demo.app import _Lists, _title
    from nest_runtime.demo.tabs.patches import listing_html
    from tests.support.store import small_patch

    state = open_demo(Source(url=server.url), max_tokens=8)
    assert state.backend.model_hash == patches[0].base_hash
    assert state.entries() == []  # those that come with the package are of other models
    assert "holds no patch" in listing_html(state)
    for patch in (small_patch("v9"), *patches):
        Store().add(patch)
    assert [entry.digest for entry in state.entries()] == [patch.digest for patch in patches]
    assert state.newest() == patches[0].digest  # v1 answers, though v3 is newer
    chosen = _Lists(state, 3).first()
    assert chosen[3]["value"] == chosen[5]["value"] == patches[0].digest
    assert _title(state.backend.choices()[1]) == "the server's own (v1)"


def test_an_answer_is_called_by_its_patch_from_the_beginning(server: Running) -> None:
    state = open_demo(Source(url=server.url), max_tokens=8)
    talk = Talk()
    steps = Chat(state).ask("Hello", ACTIVE, True, talk)
    next(steps)
    assert talk.turns[0].replies[1].label == "v1"
    list(steps)
    pages = [page for page, *_ in Chat(state).ask("bread " * 600, ACTIVE, True, Talk())]
    assert "Patch v1" in pages[-1]
    assert "server&#x27;s own" not in pages[-1]
    assert "maximum context length is 512" in pages[-1]
    assert "ask something shorter" in pages[-1]
    assert "begin a new" not in pages[-1]
    assert "server&#x27;s log" not in pages[-1]
    again = [page for page, *_ in Chat(state).ask("bread " * 600, ACTIVE, True, talk)]
    assert "ask something shorter, or begin a new conversation" in again[-1]


@pytest.mark.parametrize(("status", "hint"), [(401, "--api-key-file"), (429, "in a while"), (500, "the server's log")])
def test_what_a_server_refuses_comes_with_a_hint_that_fits(status: int, hint: str) -> None:
    import httpx

    from nest_runtime.demo.remote import _refused

    refused = _refused(httpx.Response(status, json={"error": {"message": "no", "code": None}}))
    assert refused.message == f"the server answered {status}: no"
    assert hint in refused.hint


@pytest.mark.parametrize(
    ("status", "body"), [(404, '{"detail":"Not Found"}'), (200, "<html>\nhello</html>"), (200, '["a"]'), (502, "")]
)
def test_what_is_no_server_of_ours_is_said_to_be_none(status: int, body: str) -> None:
    class Other(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

    other = ThreadingHTTPServer(("127.0.0.1", 0), Other)
    thread = Thread(target=other.serve_forever)
    thread.start()
    try:
        with pytest.raises(EngineError, match="is no nest-runtime server: /v1/models answered") as caught:
            RemoteBackend(f"http://127.0.0.1:{other.server_port}")
    finally:
        other.shutdown()
        thread.join()
        other.server_close()
    assert f"{status} {' '.join(body.split())}; expected a list of models" in caught.value.message
    assert "nest-runtime serve" in caught.value.hint


def test_many_answers_at_once_keep_their_places(server: Running, tiny_llama: Path, patches: list[Patch]) -> None:
    backend, truth = RemoteBackend(server.url), Reference(tiny_llama, patches)
    prompts = [f"Tell me {number} things." for number in range(12)]
    found: dict[int, str] = {}
    backend.answer_all(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        PatchChoice("v2"),
        max_tokens=6,
        on_answers=lambda places, texts: found.update(zip(places, texts, strict=True)),
    )
    assert [found[place] for place in range(12)] == [truth.chat(prompt, "v2", 6).strip() for prompt in prompts]


def test_what_is_not_exposed_is_an_error_in_the_conversation(server: Running) -> None:
    state = open_demo(Source(url=server.url), max_tokens=4)
    with pytest.raises(EngineError, match="404"):
        state.backend.answer(
            [{"role": "user", "content": "Hi"}], PatchChoice("v3"), max_tokens=4, on_text=print, stopped=lambda: False
        )


def test_switching_needs_the_admin_token(server: Running, patches: list[Patch], tmp_path: Path) -> None:
    from nest_runtime.demo.tabs.admin import Changes

    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    state = open_demo(Source(url=server.url, admin_token_file=token), admin=True)
    plain = Changes(open_demo(Source(url=server.url), admin=True), lambda: [])
    assert "start it with --admin-token-file" in plain.rollback()[0]
    assert "start it with --admin-token-file" in plain.ask_rollback()[2]
    assert state.backend.active() == patches[0].digest
    entry = Store().add(patches[1])  # in this home; the server holds it too
    changes = Changes(state, lambda: [])
    assert "active on the server: v2" in changes.activate(entry.digest)[0]
    assert state.backend.active() == patches[1].digest
    assert "active on the server: v1" in changes.rollback()[0]
    lost = Store().add(patches[2])
    assert 'role="alert"' in changes.activate(lost.digest)[0]  # the server's store has no such patch
    assert state.backend.active() == patches[0].digest


def test_a_wrong_admin_token_is_said_at_the_start(server: Running, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("not-the-token-of-this-server")
    token.chmod(0o600)
    with pytest.raises(UsageError, match=f"does not take the admin token of {token}") as caught:
        open_demo(Source(url=server.url, admin_token_file=token), admin=True)
    assert "--admin-token-file" in caught.value.hint


def test_an_evaluation_without_the_base_says_so_and_measures_one_side(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nest_runtime.demo.background import Running as Work
    from nest_runtime.demo.tabs.evidence import evaluation

    state = open_demo(Source(url=server.url), max_tokens=4)
    shown = [choice for choice in state.backend.choices() if choice.label != BASE]
    monkeypatch.setattr(state.backend, "choices", lambda: shown)  # as a server without --expose-base answers
    steps = evaluation(state, ACTIVE, 5, Work())
    bars, why = next(steps)
    assert "Only v1 is measured: this server does not let anybody ask its base" in why
    assert 'max="15"' in bars  # five prompts of three suites, on one side


def test_a_server_without_its_base_promises_none_and_says_what_is_missing(
    tiny_llama: Path, patches: list[Patch], tmp_path: Path
) -> None:
    from nest_runtime.demo.app import build
    from nest_runtime.demo.tabs.chat import baseless_html

    file = str(save_patch(patches[0], tmp_path / "v1.safetensors"))
    config = ServeConfig(model=str(tiny_llama), patch=file, port=0, limits=Limits(cache_tokens=4096, batch_tokens=128))
    with serving(config) as alone:
        state = replace(open_demo(Source(url=alone.url), max_tokens=8), is_refusal=lambda text: False)
        page = str(build(state).config)
        assert "does not let anybody ask its" in page
        assert "by the <" not in page
        needed = baseless_html(state)
        assert "start the server with <code>--expose-base</code> as well" in needed
        assert "nest-runtime serve --model MODEL --patch v1 --expose-base" in needed
        toggle = next(b for b in build(state).blocks.values() if getattr(b, "elem_id", None) == "toggle")
        assert (toggle.interactive, toggle.value) == (False, True)
        assert "does not let anybody ask its base" in toggle.info
        talk = Talk()
        list(Chat(state).ask("How do I bake bread?", ACTIVE, True, talk))
        assert [reply.label for reply in talk.turns[0].replies] == ["v1", "v1"]
    assert "cannot be reached" in baseless_html(state)


def test_a_server_with_its_base_says_nothing_of_it(server: Running) -> None:
    from nest_runtime.demo.tabs.chat import baseless_html

    assert baseless_html(open_demo(Source(url=server.url), max_tokens=8)) == ""
