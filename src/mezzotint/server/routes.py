"""The server's own dialect: the dedicated route, requests in progress, pictures, health.

Each route: parse, one call, answer. Other dialects are files of their own and use the same `Service`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import sqlalchemy as sa
import structlog
from fastapi import APIRouter, Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic import MISSING, BaseModel

from mezzotint import images
from mezzotint.config import Settings
from mezzotint.errors import AuthenticationError, InvalidRequestError, echo
from mezzotint.schemas import (
    DedicatedImageGenerationBody,
    ErrorBody,
    ImageGenerationAnswer,
    ImageItem,
    ImageTimings,
    PreviewEvent,
    RequestState,
    Usage,
    parse_body,
    split_model,
)
from mezzotint.server import keys, sse, storage
from mezzotint.server.adapters import AdapterStore
from mezzotint.server.admission import Admission, parse_timeout
from mezzotint.server.endpoints import Desired, Endpoint, State
from mezzotint.server.gallery import Gallery
from mezzotint.server.keys import Key
from mezzotint.server.metrics import CONTENT_TYPE, Metrics
from mezzotint.server.quotas import Quotas
from mezzotint.server.registry import Registry
from mezzotint.server.storage import Storage
from mezzotint.server.tickets import Answer, Finish, ImageRequest, Picture, Ticket

MAX_IDEMPOTENCY_KEY = 255
MAX_PREVIEWS = 10
QUEUED_EVERY_S = 1.0
"""How often a watcher of a waiting request is told its place."""


@dataclass(slots=True)
class Service:
    """What the routes of every dialect work with; `app.state.service`."""

    settings: Settings
    engine: sa.Engine
    registry: Registry
    adapters: AdapterStore
    admission: Admission
    storage: Storage
    gallery: Gallery
    metrics: Metrics
    quotas: Quotas
    pool: ThreadPoolExecutor
    first_key: str | None = None
    """The secret of the key that this start made, for the command line to print once."""

    async def authenticate(self, authorization: str | None) -> Key:
        """The key behind an Authorization header; everybody on a server without authentication."""
        if not self.settings.auth:
            return keys.ANONYMOUS
        scheme, _, secret = (authorization or "").partition(" ")
        if not secret.strip() or scheme.lower() != "bearer":
            raise AuthenticationError(
                "no API key was sent; send the header Authorization: Bearer YOUR_KEY", code="missing_api_key"
            )
        return await asyncio.to_thread(self._find_key, secret.strip())

    def _find_key(self, secret: str) -> Key:
        key = keys.authenticate(self.engine, secret)
        self.quotas.load(key)
        return key

    def base_url(self, request: Request) -> str:
        return self.settings.public_url or str(request.base_url)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def key_of(request: Request, authorization: Annotated[str | None, Header()] = None) -> Key:
    """Dependency: who is calling."""
    return await service_of(request).authenticate(authorization)


async def admin_of(key: Annotated[Key, Depends(key_of)]) -> Key:
    """Dependency: who is calling, and it must be an admin."""
    key.require_admin()
    return key


TheService = Annotated[Service, Depends(service_of)]
TheKey = Annotated[Key, Depends(key_of)]
TheAdmin = Annotated[Key, Depends(admin_of)]

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        401: "The API key is missing or unknown.",
        403: "The key may not do this.",
        404: "No such endpoint, adapter or request.",
        408: "The body did not arrive in time.",
        409: "The request conflicts with an earlier one.",
        413: "The body is too large.",
        415: "The body is not JSON.",
        422: "A field is missing, unknown or out of range.",
        429: "The queue is full; Retry-After says when there is room.",
        499: "The request was cancelled.",
        500: "The request failed in the worker, or the server made a mistake.",
        503: "The endpoint is starting, has failed or was stopped; Retry-After says when to try again.",
        504: "The request could not be done within its deadline.",
        507: "The server's disk is full.",
    }.items()
}
router = APIRouter()


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that the route parses itself."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


# ---------------------------------------------------------------- the dedicated route


@router.post(
    "/dedicated/v1/images/generations",
    summary="Generate images",
    tags=["Images"],
    response_model=ImageGenerationAnswer,
    responses={
        202: {"model": RequestState, "description": "Accepted; asked for with `Prefer: respond-async`."},
        **ERRORS,
    },
    openapi_extra=json_body(DedicatedImageGenerationBody),
)
async def generate(
    request: Request,
    service: TheService,
    key: TheKey,
    idempotency_key: Annotated[
        str | None, Header(description="The same key finds the same request again.")
    ] = None,
    x_request_timeout_s: Annotated[str | None, Header(description="Seconds after which to give up.")] = None,
    prefer: Annotated[str | None, Header(description="`respond-async` answers 202 at once.")] = None,
    x_friendli_team: Annotated[str | None, Header(description="Accepted, logged and not used.")] = None,
) -> Response:
    """Makes images from words: one request, one endpoint, `n` images."""
    if x_friendli_team:
        structlog.contextvars.bind_contextvars(team=x_friendli_team[:64])  # on this request's log lines
    body = parse_body(await request.body())
    wish = parse_prefer(prefer)
    endpoint_id, route = split_model(body.model)
    endpoint = service.registry.find(endpoint_id, key)
    endpoint.require_route(route)
    ticket = await service.admission.submit(
        endpoint,
        image_request(body, route, wish.num_previews),
        key=key,
        finish=_finish(service, body, service.base_url(request)),
        request_id=request.state.request_id,
        fingerprint=fingerprint("dedicated", body.model_dump(mode="json")),
        gone=request.is_disconnected,
        idempotency_key=idempotency(idempotency_key),
        timeout_s=parse_timeout(x_request_timeout_s),
        hold=wish.respond_async,
    )
    if wish.respond_async:
        return Response(_state_json(ticket), 202, media_type="application/json")
    answer = await service.admission.wait(ticket, request.receive)
    return Response(answer.body, media_type="application/json", headers=timing_headers(answer))


def image_request(body: DedicatedImageGenerationBody, route: str | None, num_previews: int) -> ImageRequest:
    """What admission is asked for."""
    values = body.model_dump(
        include={"guidance_scale", "seed", "width", "height", "negative_prompt"}, exclude_none=True
    )
    return ImageRequest(
        prompt=body.prompt,
        num_inference_steps=body.num_inference_steps,
        route=route,
        n=body.num_images,
        num_previews=num_previews,
        **values,
    )


def _finish(service: Service, body: DedicatedImageGenerationBody, base_url: str) -> Finish:
    """Turns pictures into this dialect's answer; runs in a thread."""
    form = body.response_format if isinstance(body.response_format, str) else "url"

    def finish(ticket: Ticket, pictures: list[Picture]) -> Answer:
        began = time.perf_counter()
        items = [_item(service, ticket, body.model, form, base_url, picture) for picture in pictures]
        answer = ImageGenerationAnswer(
            created=int(ticket.created),
            id=ticket.id,
            data=items,
            usage=Usage(
                images=len(items), steps=sum(picture.request.num_inference_steps for picture in pictures)
            ),
            warnings=ticket.warnings,
        )
        text = answer.model_dump_json()
        return made_answer(text.encode(), pictures, time.perf_counter() - began)

    return finish


def _item(
    service: Service, ticket: Ticket, model: str, form: Any, base_url: str, picture: Picture
) -> ImageItem:
    began = time.perf_counter()
    kind = images.FORMATS[form]
    data = encode(ticket.endpoint, model, form, picture)
    where: dict[str, Any]
    if form == "url":
        where = {"url": store(service, ticket, model, picture, data, kind.suffix, base_url)}
    else:
        where = {"b64_json": base64.b64encode(data).decode()}
    timings = ImageTimings(
        queue_ms=_ms(picture.queue_s),
        generate_ms=_ms(picture.generate_s),
        encode_ms=_ms(time.perf_counter() - began),
        adapter_load_ms=_ms(picture.adapter_load_s) if picture.adapter_load_s else MISSING,
    )
    return ImageItem(
        seed=picture.request.seed,
        response_format=form,
        width=picture.width,
        height=picture.height,
        mime_type=kind.mime_type,
        timings=timings,
        **where,
        **kind.item_fields,
    )


# ---------------------------------------------------------------- parts that all dialects share


def encode(
    endpoint: Endpoint, model: str, form: str, picture: Picture, quality: int = images.JPEG_QUALITY
) -> bytes:
    """A picture's file, its parameters inside unless the endpoint switches that off; runs in a thread."""
    return images.encode(
        form,
        picture.pixels,
        picture.width,
        picture.height,
        parameters=parameters_of(model, picture) if endpoint.spec.embed_parameters else None,
        quality=quality,
    )


def parameters_of(model: str, picture: Picture) -> images.Parameters:
    """What made this picture."""
    asked = picture.request
    return images.Parameters(
        model=model,
        prompt=asked.prompt,
        num_inference_steps=asked.num_inference_steps,
        seed=asked.seed,
        guidance_scale=asked.guidance_scale,
        negative_prompt=asked.negative_prompt,
        width=picture.width,
        height=picture.height,
        adapter_scale=asked.adapter_scale,
    )


def store(
    service: Service, ticket: Ticket, model: str, picture: Picture, data: bytes, suffix: str, base_url: str
) -> str:
    """Keeps a picture's file for its key and answers the URL; runs in a thread."""
    name = service.gallery.save(data, suffix, ticket.key.id, parameters_of(model, picture))
    service.metrics.stored.inc(len(data))
    return service.storage.url(base_url, name)


def made_answer(body: bytes, pictures: list[Picture], encode_s: float) -> Answer:
    """An answer with the times that its header shows: the longest of its pictures'."""
    return Answer(
        body,
        queue_s=max(picture.queue_s for picture in pictures),
        generate_s=max(picture.generate_s for picture in pictures),
        encode_s=encode_s,
    )


def timing_headers(answer: Answer) -> dict[str, str]:
    parts = {"queue": answer.queue_s, "generate": answer.generate_s, "encode": answer.encode_s}
    return {"server-timing": ", ".join(f"{name};dur={_ms(seconds)}" for name, seconds in parts.items())}


def fingerprint(dialect: str, values: Mapping[str, Any]) -> str:
    """Tells whether two bodies are the same request."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(f"{dialect}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Preference:
    respond_async: bool = False
    num_previews: int = 0


def parse_prefer(header: str | None) -> Preference:
    """What the Prefer header (RFC 7240) asks for; unknown preferences are ignored, as that RFC wants."""
    respond_async, num_previews = False, 0
    for part in (header or "").split(","):
        name, _, value = (text.strip().lower() for text in part.partition("="))
        respond_async |= name == "respond-async"
        if name == "previews":
            if not re.fullmatch(r"\d{1,9}", value) or int(value) > MAX_PREVIEWS:
                raise InvalidRequestError(
                    f"Prefer: previews must be an integer between 0 and {MAX_PREVIEWS} (got {echo(value)})",
                    code="out_of_range",
                    param="Prefer",
                )
            num_previews = int(value)
    return Preference(respond_async, num_previews)


def idempotency(header: str | None) -> str | None:
    """The Idempotency-Key header; InvalidRequestError for one that is empty or too long."""
    if header is not None and not 1 <= len(header) <= MAX_IDEMPOTENCY_KEY:
        raise InvalidRequestError(
            f"Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_KEY} characters (got {len(header)})",
            code="out_of_range",
            param="Idempotency-Key",
        )
    return header


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


# ---------------------------------------------------------------- one's own requests


@router.get(
    "/dedicated/v1/requests/{request_id}",
    summary="Where a request stands",
    tags=["Images"],
    response_model=RequestState,
    responses={status: ERRORS[status] for status in (401, 404, 503)},
)
async def request_state(request_id: str, service: TheService, key: TheKey) -> Response:
    return Response(
        _state_json(service.admission.find(request_id, key), full=True), media_type="application/json"
    )


@router.delete(
    "/dedicated/v1/requests/{request_id}",
    summary="Cancel a request",
    tags=["Images"],
    response_model=RequestState,
    responses={status: ERRORS[status] for status in (401, 404, 503)},
)
async def cancel_request(request_id: str, service: TheService, key: TheKey) -> Response:
    """Cancels within one step; a request that has ended stays as it ended."""
    ticket = service.admission.find(request_id, key)
    service.admission.cancel(ticket)
    return Response(_state_json(ticket, full=True), media_type="application/json")


@router.get(
    "/dedicated/v1/requests/{request_id}/events",
    summary="Follow a request (server-sent events)",
    tags=["Images"],
    response_class=Response,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "progress, preview; then done, failed or cancelled",
        },
        **{status: ERRORS[status] for status in (401, 404, 503)},
    },
)
async def request_events(request_id: str, service: TheService, key: TheKey) -> Response:
    ticket = service.admission.find(request_id, key)
    return sse.stream(_events(ticket), service.admission.watching(ticket))


async def _events(ticket: Ticket) -> AsyncIterator[bytes]:
    previews, seen, shown = ticket.previews, -1, 0  # a ticket lets go of its previews when it ends
    told = b""
    while True:
        seen = ticket.changes
        for number, preview in previews[shown:]:
            shown += 1
            yield sse.event("preview", await asyncio.to_thread(_preview_json, ticket, number, preview))
        if ticket.ended:
            break
        if (state := _state_json(ticket)) != told:
            yield sse.event("progress", state.decode())
            told = state
        with contextlib.suppress(TimeoutError):  # while it waits, its place changes by what others do
            async with asyncio.timeout(QUEUED_EVERY_S if ticket.status == "queued" else None):
                await ticket.changed(seen)
    if ticket.error is not None and ticket.status == "failed":
        yield sse.event("failed", ErrorBody.of(ticket.error, ticket.id).model_dump_json())
    elif ticket.answer is not None:
        yield sse.event("done", ticket.answer.body.decode())
    else:
        yield sse.event(ticket.status, _state_json(ticket).decode())


def _preview_json(ticket: Ticket, number: int, preview: Any) -> str:
    data = images.encode("png", preview.payload, preview.width, preview.height)
    return PreviewEvent(
        index=number,
        step=preview.step,
        num_steps=ticket.jobs[number].request.num_inference_steps,
        b64_json=base64.b64encode(data).decode(),
    ).model_dump_json()


def seconds_left(ticket: Ticket) -> float:
    """Estimated seconds until the request's last picture is there."""
    now = asyncio.get_running_loop().time()
    left = [ticket.endpoint.left_s(job, now) for job in ticket.jobs if not job.ended]
    return round(max(left, default=0.0), 3)


def _state_json(ticket: Ticket, *, full: bool = False) -> bytes:
    """The RequestState; with `full` the result stands in it as the bytes that it was answered with."""
    values: dict[str, Any] = {"id": ticket.id, "status": ticket.status}
    values |= {"step": ticket.step, "num_steps": ticket.num_steps}
    if not ticket.ended:
        waiting = [job for job in ticket.jobs if job.queued]
        if ticket.status == "queued" and waiting:
            values["position"] = min(len(ticket.endpoint.dispatcher.queue.ahead(job)) for job in waiting)
        values["seconds_left"] = seconds_left(ticket)
    if ticket.error is not None:
        values["error"] = ErrorBody.of(ticket.error).error
    text = RequestState(**values).model_dump_json().encode()
    if full and ticket.answer is not None:
        return text[:-1] + b',"result":' + ticket.answer.body + b"}"
    return text


# ---------------------------------------------------------------- pictures and health


@router.get(
    storage.PATH + "{name}",
    summary="Fetch a stored picture",
    tags=["Images"],
    response_class=Response,
    responses={
        200: {"content": {"image/png": {}}, "description": "The picture."},
        403: {"model": ErrorBody, "description": "The signature is not valid."},
        404: {"model": ErrorBody, "description": "There is no such picture."},
        410: {"model": ErrorBody, "description": "The URL has expired."},
    },
)
async def picture(name: str, service: TheService, expires: str = "", signature: str = "") -> Response:
    """The URL is the permission: no key is asked for, the signature and the expiry are checked."""
    data, media_type = await asyncio.to_thread(service.storage.read, name, expires, signature)
    headers = {"cache-control": "private, max-age=3600, immutable"}
    return Response(data, media_type=media_type, headers=headers)


@router.get("/healthz", summary="Is the server alive?", tags=["Operations"])
async def healthz(service: TheService, challenge: str | None = None) -> dict[str, str]:
    """With a `challenge` the answer proves that this server runs on a data folder that the asker can read."""
    if challenge is None:
        return {"status": "ok"}
    return {"status": "ok", "proof": storage.proof(service.storage.secret, challenge)}


@router.get(
    "/readyz",
    summary="Is every endpoint ready that should be?",
    tags=["Operations"],
    responses={503: {"description": "Some endpoint is not ready."}},
)
async def readyz(service: TheService) -> JSONResponse:
    missing = [e for e in service.registry if e.desired is Desired.RUNNING and e.state is not State.READY]
    return JSONResponse(
        {"status": "starting" if missing else "ready", "not_ready": len(missing)}, 503 if missing else 200
    )


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    tags=["Operations"],
    response_class=Response,
    responses={status: ERRORS[status] for status in (401, 403, 503)},
)
async def metrics(service: TheService, admin: TheAdmin) -> Response:
    for endpoint in service.registry:
        gauges = service.metrics
        gauges.queue_depth.labels(endpoint.id).set(len(endpoint.dispatcher.queue))
        gauges.running.labels(endpoint.id).set(endpoint.dispatcher.num_running())
        gauges.backlog.labels(endpoint.id).set(endpoint.dispatcher.queue.backlog_s())
        gauges.speed.labels(endpoint.id).set(endpoint.dispatcher.speed)
        gauges.ready_replicas.labels(endpoint.id).set(len(endpoint.current.ready))
    return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
