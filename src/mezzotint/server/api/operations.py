"""Health, readiness and metrics."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header
from fastapi.responses import JSONResponse, Response

from mezzotint.errors import AuthenticationError
from mezzotint.server.api import answers
from mezzotint.server.api.context import AdminKey, Context, CurrentContext
from mezzotint.server.metrics import CONTENT_TYPE
from mezzotint.server.store.keys import Key
from mezzotint.server.work.lifecycle import Desired, State

router = APIRouter()


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Is the server alive?", tags=["Operations"])
async def healthz(context: CurrentContext, challenge: str | None = None) -> dict[str, str]:
    """With a `challenge` the answer proves that this server runs on a data folder that the asker can read."""
    if challenge is None:
        return {"status": "ok"}
    return {"status": "ok", "proof": context.signer.proof(challenge)}


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Is every endpoint ready that should be?",
    tags=["Operations"],
    responses={503: {"description": "Some endpoint is not ready."}},
)
async def readyz(
    context: CurrentContext, authorization: Annotated[str | None, Header()] = None
) -> JSONResponse:
    """With a key it also names the endpoints that are not ready, of those that the key may use, and why."""
    missing = [e for e in context.registry if e.desired is Desired.RUNNING and e.state is not State.READY]
    told: dict[str, Any] = {"status": "starting" if missing else "ready", "not_ready": len(missing)}
    if missing and (key := await _known_key(context, authorization)) is not None:
        told["endpoints"] = [
            {"id": endpoint.id, "state": str(endpoint.state), "reason": endpoint.not_ready_because}
            for endpoint in missing
            if key.may_use(endpoint.id)
        ]
    return JSONResponse(told, 503 if missing else 200)


async def _known_key(context: Context, authorization: str | None) -> Key | None:
    """Who asks; None for a stranger, who is answered too."""
    try:
        return await context.authenticate(authorization)
    except AuthenticationError:
        return None


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    tags=["Operations"],
    response_class=Response,
    responses={status: answers.ERRORS[status] for status in (401, 403, 503)},
)
async def metrics(context: CurrentContext, admin: AdminKey) -> Response:
    gauges = context.metrics
    gauges.node_replicas.clear()  # of nodes that are gone
    for endpoint in context.registry:
        gauges.queue_depth.labels(endpoint.id).set(len(endpoint.dispatcher.queue))
        gauges.running.labels(endpoint.id).set(endpoint.dispatcher.num_running())
        gauges.backlog.labels(endpoint.id).set(endpoint.dispatcher.queue.backlog_s())
        gauges.speed.labels(endpoint.id).set(endpoint.dispatcher.speed)
        gauges.ready_replicas.labels(endpoint.id).set(len(endpoint.current.ready))
        gauges.wanted_replicas.labels(endpoint.id).set(endpoint.num_wanted)
        for replica in endpoint.current.replicas:
            if replica.node is not None:
                gauges.node_replicas.labels(endpoint.id, replica.node).inc()
    return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE})


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
