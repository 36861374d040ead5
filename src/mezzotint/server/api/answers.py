"""What the answers of all dialects share: files from pictures, headers, and the response itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mezzotint import images
from mezzotint.schemas import ErrorBody
from mezzotint.server.api.context import Context
from mezzotint.server.api.disconnect import or_gone
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.tickets import PIECE_BYTES, Answer, Picture, Ticket

JSON = "application/json"
MAX_WARNINGS_HEADER = 1000
"""Characters of the x-warnings header; the body has all of them."""
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


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that the route parses itself."""
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def encode(
    endpoint: Endpoint, model: str, form: str, picture: Picture, quality: int = images.JPEG_QUALITY
) -> bytes:
    """A picture's file, with its parameters unless the endpoint switches that off; runs in a thread."""
    return images.encode(
        form,
        picture.pixels,
        picture.width,
        picture.height,
        parameters=parameters_of(endpoint, model, picture) if endpoint.spec.embed_parameters else None,
        quality=quality,
    )


def parameters_of(endpoint: Endpoint, model: str, picture: Picture) -> images.Parameters:
    """What made this picture."""
    spec = replace(picture.spec, width=picture.width, height=picture.height)
    return images.Parameters(model, spec, endpoint.profile.pipeline)


def room_for(context: Context, stored: bool) -> Callable[[], None]:
    """What a submission requires whose pictures are to be `stored`, or only to be sent."""
    return context.pictures.storage.require_room if stored else lambda: None


def store(
    context: Context, ticket: Ticket, model: str, picture: Picture, data: bytes, suffix: str, base_url: str
) -> str:
    """Stores a picture's file for its key and returns the URL; runs in a thread."""
    parameters = parameters_of(ticket.endpoint, model, picture)
    ticket.stored = True
    save = context.pictures.save if ticket.trace is None else ticket.trace.storing(context.pictures.save)
    name = save(data, suffix, ticket.key.id, parameters)
    context.metrics.stored.inc(len(data))
    return context.pictures.url(base_url, name)


def made_answer(body: bytes, pictures: list[Picture], encode_s: float, *, is_json: bool = True) -> Answer:
    """An answer with the times that its header shows: the longest of its pictures'."""
    return Answer(
        body,
        is_json,
        queue_s=max(picture.queue_s for picture in pictures),
        generate_s=max(picture.generate_s for picture in pictures),
        encode_s=encode_s,
    )


class AnswerResponse(Response):
    """Waits for a request's answer and sends it. ClientGone, with the request left, when the client hangs up.

    The client counts as waiting until the last byte is out, so `attached` is held all that time.
    """

    def __init__(self, ticket: Ticket, attached: AbstractContextManager[None]) -> None:
        super().__init__()
        self._ticket = ticket
        self._attached = attached

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._attached:
            answer = await or_gone(receive, self._ticket.outcome())
            headers = {"content-length": str(len(answer.content))} | self._answer_headers(answer)
            response: Response = StreamingResponse(answer.pieces(), headers=headers, media_type=JSON)
            if isinstance(answer.content, bytes) and len(answer.content) <= PIECE_BYTES:
                response = Response(answer.content, headers=headers, media_type=JSON)  # in one piece
            await response(scope, receive, send)

    def _answer_headers(self, answer: Answer) -> dict[str, str]:
        headers = timing_headers(answer)
        if self._ticket.warnings:
            headers["x-warnings"] = _ascii(self._ticket.warnings)[:MAX_WARNINGS_HEADER]
        return headers


def _ascii(texts: list[str]) -> str:
    return "; ".join(texts).encode("ascii", "replace").decode().replace("\n", " ")


class HeldStream(StreamingResponse):
    """Streams pieces; holds `around` from the first moment to the last, even if no piece is ever taken."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        around: AbstractContextManager[None],
        media_type: str,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(pieces, media_type=media_type, headers=headers)
        self._around = around

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._around:
            await super().__call__(scope, receive, send)


def timing_headers(answer: Answer) -> dict[str, str]:
    parts = {"queue": answer.queue_s, "generate": answer.generate_s, "encode": answer.encode_s}
    return {
        "server-timing": ", ".join(f"{name};dur={milliseconds(seconds)}" for name, seconds in parts.items())
    }


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
