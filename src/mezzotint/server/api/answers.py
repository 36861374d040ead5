"""What all dialects share: headers of a request, pictures to files, and the parts of an answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from mezzotint import images
from mezzotint.errors import InvalidRequestError, echo
from mezzotint.schemas import (
    ErrorBody,
)
from mezzotint.server.api.context import Context
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.tickets import Answer, Picture, Ticket

MAX_IDEMPOTENCY_KEY = 255
MAX_PREVIEWS = 10
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
    return images.Parameters(model, replace(picture.spec, width=picture.width, height=picture.height))


def store(
    context: Context, ticket: Ticket, model: str, picture: Picture, data: bytes, suffix: str, base_url: str
) -> str:
    """Keeps a picture's file for its key and answers the URL; runs in a thread."""
    name = context.gallery.save(data, suffix, ticket.key.id, parameters_of(model, picture))
    context.metrics.stored.inc(len(data))
    return context.storage.url(base_url, name)


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
    return {
        "server-timing": ", ".join(f"{name};dur={milliseconds(seconds)}" for name, seconds in parts.items())
    }


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


def milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
