"""Every route of both servers: open are those that are meant to be, all others want an admin token."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import APIRouter
from starlette.routing import BaseRoute
from starlette.testclient import TestClient

from nest_runtime.serve import Limits, ServeConfig
from nest_runtime.serve.app import Server, admin_app, asgi_app, build, fastapi_app, framed
from nest_runtime.serve.http.admin import admin_routes
from nest_runtime.serve.http.api import model_routes, probes, routes
from nest_runtime.serve.http.pages import pages
from nest_runtime.serve.vllm import build as vllm

TOKEN = "admin-secret"
HERE = "http://127.0.0.1"
OPEN = {
    "/health",
    "/ready",
    "/metrics",
    "/v1/models",
    "/v1/models/{model:path}",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
}
# FastAPI's own description of the routes, which says nothing that the documentation does not.
OPEN |= {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/static-offline-docs"}
OPEN |= {"/", "/version"}


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    folder = tmp_path_factory.mktemp("admin")
    token = folder / "token"
    token.write_text(f"{TOKEN}\n")
    token.chmod(0o600)
    return build(
        ServeConfig(
            model=str(tiny_llama),
            port=0,
            admin_token_file=token,
            audit_file=folder / "audit.jsonl",
            limits=Limits(cache_tokens=512, batch_tokens=64),
        )
    )


def walk(found: list[BaseRoute]) -> list[tuple[str, str]]:
    """Method and path of every route, those of included routers and mounted apps as well."""
    rows = []
    for route in found:
        inner = getattr(getattr(route, "original_router", route), "routes", None)
        if inner:
            rows += walk(list(inner))
        path, methods = getattr(route, "path", ""), getattr(route, "methods", None) or {"GET"}
        rows += [(method, path) for method in methods if path]
    return rows


def routers(server: Server, kind: str) -> list[APIRouter]:
    service, admin = server.service, admin_routes(server.service, server.audit)
    if kind == "vllm":
        own = fastapi_app([])
        return [model_routes(service), probes(service, metrics=False), vllm._metrics_route(service, own), admin]
    return [routes(service), probes(service), pages(service, keyed=False), admin]


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_every_route_is_open_by_intention_or_closed(server: Server, kind: str) -> None:
    app = fastapi_app(routers(server, kind))
    client = TestClient(framed(server, app, "127.0.0.1", admin_here=True), base_url=HERE)
    closed = [(method, path) for method, path in walk(list(app.routes)) if path not in OPEN]
    assert len(closed) >= 6
    for method, path in closed:
        place = path.replace("{version}", "v1")
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
            answer = client.request(method, place, headers=headers, content=b"{}")
            assert answer.status_code == 401, (method, path)
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/patches", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_a_route_that_is_added_is_closed(server: Server) -> None:
    """Under a path that nobody has thought of; on both listeners, and where no layer stands in front."""
    router = admin_routes(server.service, server.audit)
    router.add_api_route("/v1/fresh", lambda: {"done": True}, methods=["GET", "POST"])
    app = fastapi_app([router])
    token = {"authorization": f"Bearer {TOKEN}"}
    client = TestClient(framed(server, app, "127.0.0.1", admin_here=True), base_url=HERE)
    assert client.get("/v1/fresh").status_code == 401
    assert client.post("/v1/fresh", json={}).status_code == 401
    assert client.get("/v1/fresh", headers=token).json() == {"done": True}
    assert server.audit.tail(1)[0]["path"] == "GET /v1/fresh"
    elsewhere = TestClient(framed(server, app, "127.0.0.1", admin_here=False), base_url=HERE)
    assert elsewhere.get("/v1/fresh", headers=token).status_code == 401
    assert TestClient(app, base_url=HERE).get("/v1/fresh", headers=token).status_code == 401


def test_both_listeners_as_they_are_put_together(server: Server) -> None:
    for app in (asgi_app(server), admin_app(server)):
        client = TestClient(app, base_url=HERE)
        for method, path in walk([*admin_routes(server.service, server.audit).routes]):
            assert client.request(method, path.replace("{version}", "v1")).status_code == 401
