"""The server's own dialect: the dedicated route, and the state of a key's own requests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response
from pydantic import MISSING

from mezzotint import images
from mezzotint.edit_body import DedicatedImageEditBody, parse_edit_body
from mezzotint.messages import Preview
from mezzotint.schemas import (
    DedicatedImageGenerationBody,
    ErrorBody,
    ImageGenerationAnswer,
    ImageItem,
    ImageTimings,
    LoadingState,
    PreviewEvent,
    RequestState,
    Usage,
    parse_body,
)
from mezzotint.server.api import answers, sse
from mezzotint.server.api.context import Context, CurrentContext, CurrentKey
from mezzotint.server.api.submissions import (
    HEADERS,
    CurrentHead,
    Preference,
    RequestHead,
    body_fingerprint,
    described,
    parse_prefer,
    picture_digests,
    spec_of,
    with_pictures,
)
from mezzotint.server.store.keys import Key
from mezzotint.server.threads import PICTURES
from mezzotint.server.work.resolve import Target, resolve
from mezzotint.server.work.tickets import Answer, Finish, Picture, Ticket
from mezzotint.spec import ImageSpec

QUEUED_EVERY_S = 1.0
"""How often a watcher of a waiting request is told its position."""

_MANY_BYTES = 2**18
"""A longer body is read in a thread."""

router = APIRouter()


@dataclass(frozen=True, slots=True)
class _Asked:
    """What both routes for pictures read of a request besides its body."""

    request: Request
    context: Context
    key: Key
    head: RequestHead
    preference: Preference


async def _asked(
    request: Request,
    context: CurrentContext,
    key: CurrentKey,
    head: CurrentHead,
) -> _Asked:
    if team := request.headers.get("x-friendli-team"):
        structlog.contextvars.bind_contextvars(team=team[:64])  # on this request's log lines
    return _Asked(request, context, key, head, parse_prefer(request.headers.get("prefer")))


_CurrentAsked = Annotated[_Asked, Depends(_asked)]
_HEADERS = described(
    prefer="`respond-async` answers 202 at once.", x_friendli_team="Accepted, logged and not used."
)
_PARAMETERS = {"parameters": HEADERS["parameters"] + _HEADERS["parameters"]}
_ROUTE: dict[str, Any] = {
    "tags": ["Images"],
    "response_model": ImageGenerationAnswer,
    "responses": {
        202: {"model": RequestState, "description": "Accepted; asked for with `Prefer: respond-async`."},
        **answers.ERRORS,
    },
}


@router.post(
    "/dedicated/v1/images/generations",
    summary="Generate images",
    openapi_extra=answers.json_body(DedicatedImageGenerationBody) | _PARAMETERS,
    **_ROUTE,
)
async def generate(asked: _CurrentAsked) -> Response:
    """Makes images from words: one request, one endpoint, `n` images."""
    raw = await asked.request.body()
    body = parse_body(raw) if len(raw) < _MANY_BYTES else await PICTURES.run(parse_body, raw)
    target = resolve(asked.context.registry, asked.key, body.model)
    return await _answer(asked, target, body, await spec_of(asked.context, body, target))


@router.post(
    "/dedicated/v1/images/edits",
    summary="Edit images",
    openapi_extra=answers.json_body(DedicatedImageEditBody) | _PARAMETERS,
    **_ROUTE,
)
async def edit(asked: _CurrentAsked) -> Response:
    """Makes images from pictures and words; a mask says which part is repainted."""
    body = await PICTURES.run(parse_edit_body, await asked.request.body())
    target = resolve(asked.context.registry, asked.key, body.model)
    spec = await spec_of(asked.context, body, target, edits=True)
    mask = body.mask if isinstance(body.mask, str) else None
    spec = await with_pictures(asked.context, spec, body.image, mask)
    return await _answer(asked, target, body, spec)


async def _answer(
    asked: _Asked, target: Target, body: DedicatedImageGenerationBody, spec: ImageSpec
) -> Response:
    admission, preference = asked.context.admission, asked.preference
    kind = "dedicated edit" if spec.images else "dedicated"
    texts = body.model_dump(mode="json", exclude={"image", "mask", "control_images"})
    form = body.response_format if isinstance(body.response_format, str) else "url"
    ticket = await admission.submit(
        asked.head.submission(
            target,
            asked.key,
            spec,
            _finish(asked.context, body, form, asked.context.base_url(asked.request)),
            body_fingerprint(kind, texts | picture_digests(spec)),
            num_images=body.num_images,
            num_previews=preference.num_previews,
            hold=preference.respond_async,
            require=answers.room_for(asked.context, form == "url"),
        )
    )
    if preference.respond_async:
        return Response(_state_json(ticket), 202, media_type="application/json")
    return answers.AnswerResponse(ticket, admission.attached(ticket))


def _finish(context: Context, body: DedicatedImageGenerationBody, form: str, base_url: str) -> Finish:
    """The function that turns pictures into this dialect's answer; it runs in a thread."""

    def finish(ticket: Ticket, pictures: list[Picture]) -> Answer:
        began = time.perf_counter()
        items = [_item(context, ticket, body.model, form, base_url, picture) for picture in pictures]
        answer = ImageGenerationAnswer(
            created=int(ticket.created),
            id=ticket.id,
            data=items,
            usage=Usage(images=len(items), steps=ticket.num_steps),
            warnings=ticket.warnings,
        )
        text = answer.model_dump_json()
        return answers.made_answer(text.encode(), pictures, time.perf_counter() - began)

    return finish


def _item(
    context: Context, ticket: Ticket, model: str, form: Any, base_url: str, picture: Picture
) -> ImageItem:
    began = time.perf_counter()
    kind = images.FORMATS[form]
    data = answers.encode(ticket.endpoint, model, form, picture)
    where: dict[str, Any]
    if form == "url":
        where = {"url": answers.store(context, ticket, model, picture, data, kind.suffix, base_url)}
    else:
        where = {"b64_json": base64.b64encode(data).decode()}
    timings = ImageTimings(
        queue_ms=answers.milliseconds(picture.queue_s),
        generate_ms=answers.milliseconds(picture.generate_s),
        encode_ms=answers.milliseconds(time.perf_counter() - began),
        adapter_load_ms=answers.milliseconds(picture.adapter_load_s) if picture.adapter_load_s else MISSING,
    )
    return ImageItem(
        seed=picture.seed,
        response_format=form,
        width=picture.width,
        height=picture.height,
        mime_type=kind.mime_type,
        timings=timings,
        **where,
        **kind.item_fields(picture.channels),
    )


# ---------------------------------------------------------------- one's own requests


@router.get(
    "/dedicated/v1/requests/{request_id}",
    summary="Where a request stands",
    tags=["Images"],
    response_model=RequestState,
    responses={status: answers.ERRORS[status] for status in (401, 404, 503)},
)
async def request_state(request_id: str, context: CurrentContext, key: CurrentKey) -> Response:
    return _full_state(context, context.admission.find(request_id, key))


@router.delete(
    "/dedicated/v1/requests/{request_id}",
    summary="Cancel a request",
    tags=["Images"],
    response_model=RequestState,
    responses={status: answers.ERRORS[status] for status in (401, 404, 503)},
)
async def cancel_request(request_id: str, context: CurrentContext, key: CurrentKey) -> Response:
    """Cancels within one step; a request that has ended stays as it ended."""
    ticket = context.admission.find(request_id, key)
    context.admission.cancel(ticket)
    return _full_state(context, ticket)


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
        **{status: answers.ERRORS[status] for status in (401, 404, 429, 503)},
    },
)
async def request_events(request_id: str, context: CurrentContext, key: CurrentKey) -> Response:
    ticket = context.admission.find(request_id, key)
    return sse.stream(_events(ticket, ticket.previews), context.admission.watching(ticket))


async def _events(ticket: Ticket, previews: list[tuple[int, Preview]]) -> AsyncIterator[bytes]:
    """A ticket drops its `previews` when it ends, which may be before this begins."""
    seen, shown, told = -1, 0, b""
    while True:
        seen = ticket.changes
        while shown < len(previews):  # more may come while one is sent
            number, preview = previews[shown]
            shown += 1
            yield sse.event("preview", await PICTURES.run(_preview_json, ticket, number, preview))
        if ticket.ended:
            break
        if (state := _state_json(ticket)) != told:
            yield sse.event("progress", state.decode())
            told = state
        with contextlib.suppress(TimeoutError):  # the position changes by what other requests do
            async with asyncio.timeout(QUEUED_EVERY_S if ticket.status == "queued" else None):
                await ticket.changed(seen)
    if ticket.error is not None and ticket.status == "failed":
        yield sse.event("failed", ErrorBody.of(ticket.error, ticket.id).model_dump_json())
    elif ticket.answer is not None and ticket.answer.is_json:
        async for piece in sse.event_pieces("done", ticket.answer.pieces()):
            yield piece
    else:
        yield sse.event(ticket.status, _state_json(ticket).decode())


def _preview_json(ticket: Ticket, number: int, preview: Preview) -> str:
    data = images.encode("png", preview.payload, preview.width, preview.height)
    return PreviewEvent(
        index=number,
        step=preview.step,
        num_steps=ticket.jobs[number].spec.num_steps,
        b64_json=base64.b64encode(data).decode(),
    ).model_dump_json()


def seconds_left(ticket: Ticket) -> float:
    """Estimated seconds until the request's last picture is there."""
    now = asyncio.get_running_loop().time()
    left = [ticket.endpoint.left_s(job, now) for job in ticket.jobs if not job.ended]
    return round(max(left, default=0.0), 3)


def _full_state(context: Context, ticket: Ticket) -> Response:
    """The RequestState; its result is the bytes that the request was answered with."""
    text, answer = _state_json(ticket), ticket.answer
    if answer is None or not answer.is_json:
        return Response(text, media_type="application/json")
    head, tail = text[:-1] + b',"result":', b"}"

    async def pieces() -> AsyncIterator[bytes]:
        yield head
        async for piece in answer.pieces():
            yield piece
        yield tail

    size = len(head) + len(answer.content) + len(tail)
    around = context.admission.watching(ticket)
    return answers.HeldStream(pieces(), around, "application/json", {"content-length": str(size)})


def _state_json(ticket: Ticket) -> bytes:
    """The RequestState without its result; made once for all watchers of the same moment."""
    moment = (ticket.changes, ticket.endpoint.dispatcher.queue.changes, int(4 * time.monotonic()))
    if ticket.shown[0] != moment:
        ticket.shown = (moment, _made_state_json(ticket))
    return ticket.shown[1]


def _made_state_json(ticket: Ticket) -> bytes:
    values: dict[str, Any] = {"id": ticket.id, "status": ticket.status}
    values |= {"step": ticket.step, "num_steps": ticket.num_steps}
    values |= {"picture": ticket.picture, "num_pictures": len(ticket.jobs)}
    values |= {"picture_step": ticket.picture_step, "num_picture_steps": ticket.jobs[-1].spec.num_steps}
    if not ticket.ended:
        waiting = [job for job in ticket.jobs if job.queued]
        loading = ticket.endpoint.current.loading(asyncio.get_running_loop().time()) if waiting else None
        if loading is not None:
            fraction = MISSING if loading.fraction is None else round(loading.fraction, 2)
            values["loading"] = LoadingState(stage=loading.stage, fraction=fraction)
        if ticket.status == "queued" and waiting:
            values["position"] = min(ticket.endpoint.dispatcher.queue.ahead(job).num for job in waiting)
        values["seconds_left"] = seconds_left(ticket)
    if ticket.error is not None:
        values["error"] = ErrorBody.of(ticket.error).error
    return RequestState(**values).model_dump_json().encode()


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
