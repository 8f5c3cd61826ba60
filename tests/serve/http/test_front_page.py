"""What stands before the API: keys, TLS, the version, pages for people, and how the command line names it all."""

from __future__ import annotations

import re
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import typer

from nest_runtime import __version__
from nest_runtime.cli.main import app, main
from nest_runtime.errors import UsageError
from nest_runtime.serve import ServeConfig
from nest_runtime.serve.ports import tls_context
from nest_runtime.serve.server import warn
from tests.support.certificates import certificate
from tests.support.cli import Run, fails
from tests.support.serve import PROMPTS, Reference, serving

pytest_plugins = ["tests.support.fixtures_serve", "tests.support.cli"]

CHAT: list[Any] = [{"role": "user", "content": PROMPTS[0]}]
PAGE = {"accept": "text/html,*/*"}


def test_tls_on_both_listeners(config: ServeConfig, tmp_path: Path, tiny_llama: Path, patches: list[Any]) -> None:
    cert, key = certificate(tmp_path)
    secure = replace(config, ssl_certfile=cert, ssl_keyfile=key, admin_port=0)
    with serving(secure) as server:
        assert server.url.startswith("https://")
        assert server.admin_url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(verify=trusting, timeout=60) as plain:
            client = openai.OpenAI(
                base_url=f"{server.url.replace('127.0.0.1', 'localhost')}/v1", api_key="any", http_client=plain
            )
            said = client.chat.completions.create(model=server.name, messages=CHAT, max_tokens=24)
            stream = client.chat.completions.create(model=server.name, messages=CHAT, max_tokens=24, stream=True)
            joined = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            large = plain.get(
                f"{server.url.replace('127.0.0.1', 'localhost')}/static-offline-docs/swagger-ui-bundle.js"
            )
        assert said.choices[0].message.content == Reference(tiny_llama, patches).chat(PROMPTS[0], "v1", 24) == joined
        assert len(large.content) > 1_000_000  # more than fits on the way at once
        assert server.admin("GET", "/v1/patches").json()["active"] == "v1"
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http"), timeout=10)


def test_certificates_that_are_none_are_refused_before_anything_is_loaded(config: ServeConfig, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    _, other = certificate(tmp_path, "other")
    with pytest.raises(UsageError, match="without --ssl-certfile"):
        replace(config, ssl_keyfile=key)
    for bad, why in (
        (replace(config, ssl_certfile=cert), "--ssl-keyfile names the key's file"),
        (replace(config, ssl_certfile=cert, ssl_keyfile=other), "the key does not belong to the certificate"),
        (replace(config, ssl_certfile=tmp_path / "none", ssl_keyfile=key), "none: No such file or directory"),
        (replace(config, ssl_certfile=key, ssl_keyfile=key), ""),
    ):
        with pytest.raises(UsageError, match=f"cannot be used for TLS: .*{why}"):
            tls_context(bad)
    both = tmp_path / "both.pem"
    both.write_bytes(cert.read_bytes() + key.read_bytes())
    tls_context(replace(config, ssl_certfile=both))


def test_keys_and_tokens_that_can_be_guessed_are_warned_of(config: ServeConfig, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("short", "long")}
    for name, token in (("short", "x"), ("long", "long-enough")):
        files[name].write_text(f"{token}\n")
        files[name].chmod(0o600)

    def said(**changes: Any) -> list[str]:
        found: list[str] = []
        warn(replace(config, **changes), lambda event: found.append(event["message"]))
        return [message for message in found if "guessed" in message]

    (key,) = said(api_key_file=files["short"], admin_token_file=files["long"])
    assert key.startswith("an API key of length 1 can be guessed: ")
    (token,) = said(api_key_file=files["long"], admin_token_file=files["short"])
    assert token.startswith("an admin token of length 1 ")
    assert "token_urlsafe" in token
    assert said(api_key_file=files["long"], admin_token_file=files["long"]) == []


def test_keys_on_the_command_line_count_beside_the_file_and_are_warned_of(config: ServeConfig, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("from-file\n")
    file.chmod(0o600)
    keyed = replace(config, api_keys=("typed",), api_key_file=file)
    said: list[str] = []
    warn(replace(keyed, host="0.0.0.0"), lambda event: said.append(event["message"]))
    assert any("can be seen by others" in message for message in said)
    assert not any("ANYONE" in message for message in said)
    assert "typed" not in repr(keyed)
    with pytest.raises(UsageError, match="empty"):
        replace(config, api_keys=(" ",))
    with serving(keyed) as server:
        for key, status in (("typed", 200), ("from-file", 200), ("guessed", 401)):
            assert server.http("GET", "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == status
        assert "Bearer KEY" in server.http("GET", "/", headers=PAGE).text


def test_pages_for_people(config: ServeConfig, tmp_path: Path) -> None:
    with serving(replace(config, served_name="<b>it's</b>", expose_base=True)) as server:
        assert server.http("GET", "/version").json() == {"version": __version__}
        page = server.http("GET", "/", headers=PAGE)
        assert page.headers["content-type"].startswith("text/html")
        assert "<b>" not in page.text
        assert "&lt;b&gt;it&#x27;s&lt;/b&gt;@base" in page.text
        for target in re.findall(r'href="([^"]+)"', page.text):
            assert server.http("GET", f"/{target}").status_code == 200, target
        facts = server.http("GET", "/").json()
        assert (facts["model"], facts["patch"], facts["version"]) == ("<b>it's</b>", "v1", __version__)
        docs = server.http("GET", "/docs").text
        loaded = re.findall(r'(?:src|href)="([^"]+)"', docs)
        assert loaded
        assert all(path.startswith("/") and server.http("GET", path).status_code == 200 for path in loaded), loaded
        assert "http" not in docs.replace("http-equiv", "").replace("httpOnly", "")


def test_a_model_by_itself_is_the_model(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    made: list[ServeConfig] = []
    monkeypatch.setattr("nest_runtime.serve.server.serve", lambda config, on_event=None: made.append(config))
    monkeypatch.setenv("NEST_SERVE_MODEL", "from-the-environment")
    assert main(["serve", "org/name", "--port", "8999"]) == 0
    assert main(["serve", "org/name", "--model", "org/name"]) == 0
    assert main(["serve"]) == 0
    assert [config.model for config in made] == ["org/name", "org/name", "from-the-environment"]
    fails(run("serve", "org/name", "--model", "org/other"), 2, "two models")


def test_every_option_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only named: a value in the environment arrives, and from there."""
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    options = [option for option in serve.params if option.opts[0].startswith("--") and option.name != "help"]
    assert len(options) > 40
    samples: dict[type, str] = {bool: "1", int: "7", float: "0.5"}
    for option in options:
        variable = option.envvar or f"NEST_SERVE_{option.name.upper()}"
        monkeypatch.setenv(variable, samples.get(option.type_descriptor.annotation, "value"))
    context = serve.make_context("serve", [], auto_envvar_prefix="NEST_SERVE")
    for option in options:
        source = context.get_parameter_source(option.name)
        assert source is not None
        assert source.name == "ENVIRONMENT", option.name
        found = context.params[option.name]
        found = found[0] if isinstance(found, list | tuple) else found
        assert found in (True, 7, 0.5) or str(found) == "value", option.name
