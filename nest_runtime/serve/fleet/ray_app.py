"""A fleet on Ray Serve: replicas of ``serve --engine vllm`` on any machines of a Ray cluster, switched as one.

Each replica starts a server of its own as a child process and passes requests on to it, while its member of the
fleet (switchboard.py) allows it. One named actor is the switchboard. ``POST /v1/patches/activate`` on any
replica switches all of them. Used by docs/deploy/ray-serve.yaml, as
``nest_runtime.serve.fleet.ray_app:build``. Needs ``ray[serve]``.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import httpx2
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from nest_runtime.errors import EngineError, NestError, UsageError
from nest_runtime.io import atomic_write
from nest_runtime.serve.fleet.switchboard import Member, Switchboard
from nest_runtime.serve.http.problems import ApiError, from_nest
from nest_runtime.serve.tokens import AccessTokens, read_tokens

BOARD = "nest-switchboard"
HOP = ("connection", "transfer-encoding", "keep-alive", "host", "content-length")
WAIT_SECONDS = 30.0  # that a request waits for a switch of the fleet


@dataclass(frozen=True)
class FleetConfig:
    """The ``args`` of the application.

    Attributes:
        model, patch: as of ``nest-runtime serve``.
        replicas: how many make up the fleet; equal to the deployment's ``num_replicas``.
        options: further options of ``nest-runtime serve``.
        admin_token_file: tokens that may switch; a file that every node can read.
        num_cpus, num_gpus: of one replica.
    """

    model: str = "reference"
    patch: str = "v3"
    replicas: int = 2
    options: tuple[str, ...] = ()
    admin_token_file: str = ""
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> FleetConfig:
        """From what stands in the YAML file. Raises UsageError for a name that is none."""
        known = {field.name for field in fields(cls)}
        if unknown := set(args) - known:
            raise UsageError(f"unknown argument {sorted(unknown)[0]}", f"known: {', '.join(sorted(known))}")
        return cls(**{**args, "options": tuple(args.get("options", ()))})


class Child:
    """The server beside a member: a child process, and its admin API."""

    def __init__(self, config: FleetConfig) -> None:
        self._token = secrets.token_hex(16)
        self._folder = tempfile.TemporaryDirectory(prefix="nest-replica-")
        token_file = Path(self._folder.name) / "token"
        atomic_write(token_file, self._token + "\n", secret=True)
        command = [sys.executable, "-m", "nest_runtime.cli.main", "serve", "--engine", "vllm", "--json", "--port", "0"]
        command += ["--model", config.model, "--patch", config.patch, "--admin-token-file", str(token_file)]
        command += ["--audit-file", str(Path(self._folder.name) / "audit.jsonl"), *config.options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        self.url = ""
        self.client = httpx2.AsyncClient(timeout=None)

    @property
    def alive(self) -> bool:
        """Whether the child process runs."""
        return self._process.poll() is None

    async def started(self) -> None:
        """Wait until it is ready. Raises EngineError if it ended instead."""
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        if not line:
            raise EngineError(f"the replica's server ended with status {self._process.wait()}", "see the replica's log")
        self.url = json.loads(line)["url"]

    async def prepare(self, ref: str) -> str:
        """Load a patch; returns its digest. Raises EngineError."""
        return str((await self._admin("/v1/patches", ref))["digest"])

    async def switch(self, ref: str) -> str:
        """Activate a patch; returns the digest that is active. Raises EngineError."""
        return str((await self._admin("/v1/patches/activate", ref))["digest"])

    def stop(self) -> None:
        """End the child process."""
        self._process.terminate()

    async def _admin(self, path: str, ref: str) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self._token}"}
        answer = await self.client.post(f"{self.url}{path}", json={"patch": ref}, headers=headers)
        body: dict[str, Any] = answer.json()
        if answer.status_code != 200:
            raise EngineError(body["error"]["message"], "see the replica's log")
        return body


class SwitchboardActor(Switchboard):
    """The switchboard as an actor: its errors travel as values."""

    async def switch_all(self, ref: str) -> dict[str, Any]:
        """See Switchboard.activate; ``{"error", "hint"}`` where it fails."""
        try:
            return await self.activate(ref)
        except NestError as error:
            return {"error": error.message, "hint": error.hint}

    async def expect(self, members: int) -> None:
        """How many make up the fleet from now on: the board outlives deployments."""
        self.expected = members

    async def look(self) -> dict[str, Any]:
        """See Switchboard.state."""
        return self.state()


api = FastAPI(title="nest-runtime fleet", docs_url=None, redoc_url=None)


class Replica:
    """One replica of the deployment."""

    def __init__(self, config: FleetConfig) -> None:
        import ray

        self._config = config
        self._tokens: AccessTokens | None = None
        if config.admin_token_file:
            self._tokens = read_tokens(Path(config.admin_token_file), "admin token file", secret=True)
        board = ray.remote(SwitchboardActor).options(
            name=BOARD, namespace="nest", get_if_exists=True, num_cpus=0, lifetime="detached"
        )
        self._board = board.remote(config.replicas, config.patch)
        self._child = Child(config)
        self._tasks = [asyncio.get_running_loop().create_task(self._live())]
        self._member: Member | None = None

    async def _live(self) -> None:
        await self._child.started()
        await self._board.expect.remote(self._config.replicas)
        name = f"replica-{uuid.uuid4().hex[:8]}"
        self._member = Member(name, self._child, self._board.poll.remote)
        await self._member.run()

    async def check_health(self) -> None:
        """Ray Serve starts a new replica where this raises."""
        if not self._child.alive or any(task.done() for task in self._tasks):
            raise EngineError("the replica's server has ended", "see its log")

    def __del__(self) -> None:
        self._child.stop()

    @api.post("/v1/patches/activate")
    async def activate(self, request: Request) -> Response:
        """Switch the whole fleet."""
        refusal = _refusal(self._tokens, request)
        if refusal is not None:
            return refusal.response()
        body = await request.json()
        done = await self._board.switch_all.remote(str(body.get("patch", "")))
        if "error" in done:
            return from_nest(EngineError(done["error"], done["hint"])).response()
        return JSONResponse(done)

    @api.get("/fleet")
    async def fleet(self) -> Response:
        """Who is there, and what is on."""
        return JSONResponse(await self._board.look.remote())

    @api.get("/ready")
    async def ready(self) -> Response:
        """Whether the fleet answers: all of it, or nobody."""
        state = await self._board.look.remote()
        mine = self._member is not None and self._member.ready
        return JSONResponse(state, 200 if mine and state["ready"] else 503)

    @api.api_route("/{path:path}", methods=["GET", "POST"])
    async def pass_on(self, path: str, request: Request) -> Response:
        """Everything else goes to the server, while this member may answer."""
        if path.startswith(("v1/patches", "v1/audit")):
            return ApiError(404, f"Invalid URL ({request.method} /{path})").response()
        try:
            member = await self._admitted()
        except NestError as error:
            return from_nest(error).response()
        try:
            url = f"{self._child.url}/{path}"
            headers = {key: value for key, value in request.headers.items() if key not in HOP}
            asked = self._child.client.build_request(request.method, url, headers=headers, content=await request.body())
            answer = await self._child.client.send(asked, stream=True)
        except BaseException:
            await member.__aexit__()
            raise
        kept = {key: value for key, value in answer.headers.items() if key not in HOP}
        kept["x-nest-replica"] = member.name
        return StreamingResponse(_passing(answer, member), answer.status_code, kept)

    async def _admitted(self) -> Member:
        """Enter the member, waiting for a switch that is under way."""
        until = asyncio.get_running_loop().time() + WAIT_SECONDS
        while True:
            try:
                if self._member is None:
                    raise EngineError("this replica is loading", "try again in a moment")
                return await self._member.__aenter__()
            except EngineError:
                if asyncio.get_running_loop().time() > until:
                    raise
            await asyncio.sleep(0.02)


async def _passing(answer: httpx2.Response, member: Member) -> AsyncIterator[bytes]:
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()
        await member.__aexit__()


def _refusal(tokens: AccessTokens | None, request: Request) -> ApiError | None:
    if tokens is None:
        return ApiError(404, "Invalid URL (POST /v1/patches/activate)")
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not tokens.matches(token.strip()):
        return ApiError(401, "Incorrect admin token provided.", code="invalid_api_key")
    return None


def build(args: Mapping[str, Any]) -> Any:
    """The application, for Ray Serve: ``import_path: nest_runtime.serve.fleet.ray_app:build``.

    Args:
        args: see :class:`FleetConfig`.

    Raises:
        UsageError: an argument is none of these.
    """
    from ray import serve

    config = FleetConfig.of(args)
    deployment = serve.deployment(serve.ingress(api)(Replica)).options(
        name="nest",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=512,
        health_check_timeout_s=60,
    )
    return deployment.bind(config)
