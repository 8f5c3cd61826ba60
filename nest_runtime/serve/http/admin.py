"""The admin routes: load, activate, roll back and remove patches, and read the audit log.

Every route of the router asks the listener's access layer (access.py) whether it was called by an operator, and
answers nobody else: a route that is added is closed. Calls that change nothing are written into the audit log by that
layer; every change goes through serve/switching/table.py, which writes its own line.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Security
from fastapi.security import HTTPBearer

from nest_runtime.serve.engine import Engine
from nest_runtime.serve.http.access import Access
from nest_runtime.serve.http.api import ERRORS, Service
from nest_runtime.serve.http.json_route import JsonRoute
from nest_runtime.serve.http.problems import ApiError
from nest_runtime.serve.http.schemas import Activation, PatchRef, SwitchRef
from nest_runtime.serve.pools import Pool
from nest_runtime.serve.served_patch import ServedPatch, Switch
from nest_runtime.serve.switching.audit import AuditLog

MAX_ENTRIES = 10_000


def admin_routes(service: Service[Engine], audit: AuditLog) -> APIRouter:
    """The routes of the admin API."""
    shown = Security(HTTPBearer(auto_error=False, description="An admin token."))
    router = APIRouter(responses=ERRORS, dependencies=[shown, Depends(_operators_only)], route_class=JsonRoute)
    table, engine = service.table, service.engine
    reading = Pool("audit", 1)

    @router.get("/v1/patches")
    async def patches() -> dict[str, Any]:
        """Every loaded patch, which one is active, and whether the store names the same."""
        in_flight = engine.in_flight()
        rows = [_row(service, served_patch, in_flight[served_patch.label]) for served_patch in table.loaded()]
        found = {"object": "list", "active": table.active.label, "digest": table.active.digest, "patches": rows}
        return {**found, "store": await table.stored()}

    @router.post("/v1/patches")
    async def load(body: PatchRef, request: Request) -> dict[str, Any]:
        """Load and verify a patch without activating it."""
        served_patch = await table.load(body.patch, _asker(request))
        return _row(service, served_patch, engine.in_flight()[served_patch.label])

    @router.post("/v1/patches/activate")
    async def activate(body: Activation, request: Request) -> dict[str, Any]:
        """Make a patch the active one. Requests in flight keep theirs (drain), or are begun again (enforce)."""
        return _switched(await table.activate(body.patch, _asker(request), body.policy))

    @router.post("/v1/patches/rollback")
    async def rollback(request: Request, body: SwitchRef | None = None) -> dict[str, Any]:
        """Return to the patch that was active before."""
        return _switched(await table.rollback(_asker(request), body.policy if body else None))

    @router.delete("/v1/patches/{version}")
    async def remove(version: str, request: Request) -> dict[str, Any]:
        """Unload a patch that is neither active nor exposed nor answering."""
        served_patch = await table.remove(version, engine.keys_in_use, _asker(request))
        return {"removed": served_patch.label, "digest": served_patch.digest}

    @router.get("/v1/audit")
    async def entries(limit: Annotated[int, Query(ge=0, le=MAX_ENTRIES)] = 1000) -> dict[str, Any]:
        """The last entries of the audit log, oldest first, and whether its chain holds."""
        found = await reading.run(lambda: {"verified": audit.intact(), "entries": audit.tail(limit)})
        return {"object": "list", **found}

    return router


async def _operators_only(request: Request) -> None:
    """Raises ApiError for everybody else, and where no access layer stands in front to say who asks."""
    access: Access | None = getattr(request.state, "access", None)
    refusal = ApiError(401, "No admin token provided.") if access is None else await access.admit(request.scope)
    if refusal is not None:
        raise refusal


def _asker(request: Request) -> str:
    """Who asks for a change; what they ask for writes its own line in the audit log, whatever comes of it."""
    request.state.audited = True
    return str(request.state.who)


def _row(service: Service[Engine], served_patch: ServedPatch, in_flight: int) -> dict[str, Any]:
    patch = served_patch.patch
    assert patch is not None  # only patches are loaded; the base is no row
    return {
        "name": patch.name,
        "version": patch.version,
        "label": served_patch.label,
        "digest": served_patch.digest,
        "base_hash": patch.base_hash,
        "parent": patch.parent,
        "neurons": patch.neurons,
        "parameters": patch.parameters,
        "active": served_patch == service.table.active,
        "exposed": service.table.is_exposed(served_patch),
        "in_flight": in_flight,
        "loaded": served_patch.since,
    }


def _switched(switch: Switch) -> dict[str, Any]:
    return {
        "active": switch.active.label,
        "digest": switch.active.digest,
        "previous": switch.previous.label,
        "policy": switch.policy,
        "replaced": switch.replaced,
        "seconds": round(switch.seconds, 6),
    }
