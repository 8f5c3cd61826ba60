"""What a browser may do, and under which names the server and its model are known: origins, hosts, served names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from nest_runtime.addresses import is_loopback
from nest_runtime.cli.commands.serve import unknown_variables
from nest_runtime.cli.main import app, main
from nest_runtime.errors import UsageError
from nest_runtime.model.load import resolve_model
from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.serve.limits import FollowConfig
from tests.support.serve import PROMPTS, Running, serving

pytest_plugins = ["tests.support.fixtures_serve"]

USER: list[Any] = [{"role": "user", "content": PROMPTS[0]}]
SITE = "https://app.example"


@pytest.fixture
def server(config: ServeConfig) -> Iterator[Running]:
    with serving(config) as running:
        yield running


def preflight(url: str, origin: str = SITE, method: str = "POST", path: str = "/v1/chat/completions") -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": method}
    headers["access-control-request-headers"] = "authorization,content-type"
    return httpx.request("OPTIONS", f"{url}{path}", headers=headers, timeout=30)


def test_no_site_may_ask_unless_it_was_named(server: Running) -> None:
    assert preflight(server.url).status_code == 405
    answer = server.http("GET", "/v1/models", headers={"origin": SITE})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_pages_of_a_site_that_was_named_may_ask(config: ServeConfig, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    keys.chmod(0o600)
    with serving(replace(config, cors_origins=(SITE,), api_key_file=keys)) as server:
        asked = preflight(server.url)  # a browser asks this without the key
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == SITE
        assert "authorization" in asked.headers["access-control-allow-headers"]
        body = {"model": server.name, "messages": USER, "max_tokens": 2}
        headers = {"origin": SITE, "authorization": "Bearer one"}
        answer = server.http("POST", "/v1/chat/completions", json=body, headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, SITE)
        assert "x-nest-patch" in answer.headers["access-control-expose-headers"]
        refused = server.http("POST", "/v1/chat/completions", json=body, headers={"origin": SITE})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, SITE)
        assert preflight(server.url, "https://evil.example").status_code == 400
        other = server.http("GET", "/v1/models", headers={**headers, "origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        for method in ("GET", "POST", "DELETE"):  # the admin API is for no page
            assert preflight(server.url, method=method, path="/v1/patches").status_code == 401
        assert "access-control-allow-origin" not in server.admin("GET", "/v1/patches").headers


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "null", "ftp://x", ""])
def test_origins_that_are_none(origin: str) -> None:
    with pytest.raises(UsageError, match="the origin"):
        ServeConfig(cors_origins=(origin,))


def test_a_name_that_was_made_to_point_here_is_refused(config: ServeConfig) -> None:
    """DNS rebinding: a page's own host name resolves to 127.0.0.1, so that the browser calls it the same site."""
    with serving(replace(config, admin_port=0, allowed_hosts=("proxy.example",))) as server:
        port = server.url.rpartition(":")[2]
        for url in (server.url, server.admin_url):
            for host in ("evil.example", f"evil.example:{port}", "127.evil.example", "localhost.evil.example", "[", ""):
                refused = httpx.get(f"{url}/ready", headers={"host": host}, timeout=30)
                assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed"), host
            for host in ("localhost", f"localhost:{port}", "LOCALHOST", "127.0.0.1", "127.1.2.3:1", f"[::1]:{port}"):
                assert httpx.get(f"{url}/ready", headers={"host": host}, timeout=30).status_code == 200, host
            assert httpx.get(f"{url}/ready", headers={"host": "Proxy.Example:80"}, timeout=30).status_code == 200
        refused = server.http("POST", "/v1/chat/completions", headers={"host": "evil.example"}, content=b"{}")
        assert refused.status_code == 403
        assert httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_a_server_for_other_machines_knows_not_all_its_names(config: ServeConfig) -> None:
    with serving(replace(config, host="0.0.0.0", admin_port=0)) as server:
        port = server.url.rpartition(":")[2]
        there = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{there}/ready", headers={"host": "gpu-7.internal"}, timeout=30).status_code == 200
        assert httpx.get(f"{server.admin_url}/ready", headers={"host": "gpu-7.internal"}).status_code == 403


@pytest.mark.parametrize("host", ["app.example:80", "a b", "https://x", ""])
def test_hosts_that_are_none(host: str) -> None:
    with pytest.raises(UsageError, match="the host"):
        ServeConfig(allowed_hosts=(host,))


@pytest.mark.parametrize(
    ("host", "here"),
    [
        *((name, True) for name in ("127.0.0.1", "127.9.9.9", "::1", "localhost")),
        *((name, False) for name in ("127.evil.example", "127.0.0.1.example", "0.0.0.0", "::", "10.0.0.1", "")),
    ],
)
def test_what_is_reached_from_this_machine_only(host: str, here: bool) -> None:
    assert is_loopback(host) is here


def test_a_served_name_of_the_operators_choice(config: ServeConfig, files: dict[str, str]) -> None:
    with serving(replace(config, served_name="team/helper", expose=(files["v2"],))) as server:
        assert server.name == "team/helper"
        client = server.client()
        assert [model.id for model in client.models.list().data] == ["team/helper", "team/helper@v2"]
        answer = client.chat.completions.create(model="team/helper@v2", messages=USER, max_tokens=2)
        assert answer.model == "team/helper@v2"
        assert server.http("GET", "/v1/models/team/helper").json()["id"] == "team/helper"
        assert server.http("GET", "/ready").json()["model"] == "team/helper"
        body = {"model": "tiny-llama", "messages": USER}
        assert server.http("POST", "/v1/chat/completions", json=body).status_code == 404


@pytest.mark.parametrize("name", ["", "a b", "a@v2", "x" * 201])
def test_served_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="the served name"):
        ServeConfig(served_name=name)


def test_models_are_named_as_people_know_them(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "production"
    link.symlink_to(tiny_llama)
    assert resolve_model(link) == ("production", tiny_llama.resolve())
    snapshots = tmp_path / "hub" / "models--my-org--my--model" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / ("a" * 40)).symlink_to(tiny_llama)
    assert resolve_model(snapshots / ("a" * 40))[0] == "my-org/my--model"
    monkeypatch.chdir(link)
    assert resolve_model(".")[0] == tiny_llama.name
    assert resolve_model(f"{tiny_llama}/")[0] == tiny_llama.name


def test_every_option_of_serve_has_an_environment_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[ServeConfig] = []
    monkeypatch.setattr("nest_runtime.serve.server.serve", lambda config, on_event=None: made.append(config))
    variables = {
        "MODEL": "some-model",
        "PATCH": "v7",
        "EXPOSE": "v1 v2",
        "EXPOSE_BASE": "1",
        "PORT": "8123",
        "ADMIN_PORT": "8124",
        "ADMIN_TOKEN_FILE": str(tmp_path / "token"),
        "SERVED_NAME": "helper",
        "CORS_ORIGIN": f"{SITE} http://localhost:3000",
        "ALLOWED_HOST": "one.example two.example",
        "SWAP_POLICY": "enforce",
        "MAX_QUEUE": "5",
        "MAX_VALUES": "6",
        "MAX_CONNECTIONS": "7",
        "HEADER_TIMEOUT": "8",
        "IDLE_TIMEOUT": "9",
        "TRUST": f"{tmp_path}/a.pub:{tmp_path}/b.pub",
        "REQUIRE_SIGNATURE": "true",
        "FOLLOW": "hf://org/repo@stable",
        "EVERY": "30s",
        "ADMISSION_PROBES": str(tmp_path / "probes"),
        "ADMISSION_MIN_REFUSED": "0.5",
        "ADMISSION_MAX_REFUSED": "0.4",
        "JSON": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"NEST_SERVE_{name}", value)
    assert main(["serve", "--port", "8999"]) == 0  # the command line comes first
    assert made == [
        ServeConfig(
            model="some-model",
            patch="v7",
            expose=("v1", "v2"),
            expose_base=True,
            port=8999,
            admin_port=8124,
            admin_token_file=tmp_path / "token",
            served_name="helper",
            cors_origins=(SITE, "http://localhost:3000"),
            allowed_hosts=("one.example", "two.example"),
            swap_policy="enforce",
            max_queue=5,
            limits=Limits(max_values=6, connections=7, header_seconds=8, idle_seconds=9),
            trust=(tmp_path / "a.pub", tmp_path / "b.pub"),
            require_signature=True,
            follow=FollowConfig(
                "hf://org/repo@stable",
                every=30,
                admission_probes=tmp_path / "probes",
                admission_min_refused=0.5,
                admission_max_refused=0.4,
            ),
            json=True,
        )
    ]
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    for option in serve.params:
        expected = option.opts[0].removeprefix("--").replace("-", "_").upper()
        assert option.envvar == f"NEST_SERVE_{expected}" or option.name.upper() == expected, option.opts


def test_a_variable_that_is_no_option_is_said() -> None:
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {f"NEST_SERVE_{option.name.upper()}": "x" for option in serve.params}
    assert unknown_variables(serve, known | {"NEST_HOME": "x", "PATH": "x"}) == []
    said = unknown_variables(serve, {"NEST_SERVE_PATCHES": "v3", "NEST_SERVE_Q": "1"})
    assert said == ["NEST_SERVE_PATCHES is no option; did you mean NEST_SERVE_PATCH?", "NEST_SERVE_Q is no option"]


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NEST_SERVE_PORT", "many")
    assert main(["serve"]) == 2
    assert "NEST_SERVE_PORT" in capsys.readouterr().err
