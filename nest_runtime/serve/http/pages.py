"""The page that a browser shows at the server's address: what the server is, who answers, and where to read on."""

from __future__ import annotations

import html
import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from nest_runtime import __version__
from nest_runtime.escape import short
from nest_runtime.serve.engine import Engine
from nest_runtime.serve.http.api import Service

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{model} · nest-runtime</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto; padding: .75rem; border: 1px solid; border-radius: .5rem }}
code, pre {{ font: .9rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere }}
dt {{ font-weight: 600 }} dd {{ margin: 0 0 .5rem }}
</style>
<h1>{model}</h1>
<p>A language model behind OpenAI's API. {who}</p>
<dl>
<dt>Patch</dt><dd>{patch} <code>{digest}</code></dd>
<dt>Model names</dt><dd>{names}</dd>
<dt>Version</dt><dd>nest-runtime {version}</dd>
</dl>
<h2>Ask it</h2>
<pre>curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\
  -d '{body}'</pre>
<p>Or give any OpenAI client <code>base_url="{url}/v1"</code>; or chat in a browser:
<code>nest-runtime demo --url {url}</code>.</p>
<h2>Look further</h2>
<ul>
<li><a href="docs">docs</a>: every path and field</li>
<li><a href="v1/models">v1/models</a>: the names that clients may use</li>
<li><a href="ready">ready</a> and <a href="health">health</a>: whether it can answer</li>
<li><a href="metrics">metrics</a>: for Prometheus</li>
</ul>
</html>
"""


def pages(service: Service[Engine], *, keyed: bool) -> APIRouter:
    """The first page, and the version.

    Args:
        service: what is served.
        keyed: clients have to send a key.
    """
    router = APIRouter()

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The version of nest-runtime that answers."""
        return {"version": __version__}

    @router.get("/", include_in_schema=False)
    async def first(request: Request) -> Response:
        """A page for people; for programs, the same as JSON."""
        facts = _facts(service)
        if "text/html" not in request.headers.get("accept", ""):
            return JSONResponse(facts)
        return HTMLResponse(_page(facts, str(request.base_url).rstrip("/"), keyed))

    return router


def _facts(service: Service[Engine]) -> dict[str, Any]:
    active = service.table.active
    return {
        "server": "nest-runtime",
        "version": __version__,
        "model": service.table.model_name,
        "patch": active.label,
        "digest": active.digest,
        "models": service.table.names(),
        "docs": "/docs",
        "api": "/v1",
    }


def _page(facts: dict[str, Any], url: str, keyed: bool) -> str:
    body = {"model": facts["model"], "messages": [{"role": "user", "content": "How do I bake bread?"}]}
    bare = facts["patch"] == "base"
    text = {
        "model": facts["model"],
        "who": "No safety patch is on: the bare model answers." if bare else "A safety patch is on.",
        "patch": facts["patch"],
        "digest": "" if bare else short(facts["digest"]),
        "names": ", ".join(facts["models"]),
        "version": facts["version"],
        "url": url,
        "key": " -H 'authorization: Bearer KEY'" if keyed else "",
        "body": json.dumps(body, ensure_ascii=False).replace("'", r"'\''"),
    }
    return _PAGE.format(**{name: html.escape(value) for name, value in text.items()})
