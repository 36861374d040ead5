"""From an HTTP request to a submission: the headers that all dialects share, and a body's fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import Depends, Request

from mezzotint.errors import InvalidRequestError, echo
from mezzotint.input_pictures import decode_text, read_mask, read_pictures
from mezzotint.schemas import DedicatedImageGenerationBody, shown
from mezzotint.server.api.context import MAX_TIMEOUT_S, Context, timeout_of
from mezzotint.server.store.keys import Key
from mezzotint.server.threads import PICTURES
from mezzotint.server.work.resolve import Target, require_adapters
from mezzotint.server.work.tickets import Finish, Submission
from mezzotint.spec import LIMITS, ImageSpec

MAX_IDEMPOTENCY_KEY = 255
"""Characters."""
MAX_PREVIEWS = 10


@dataclass(frozen=True, slots=True)
class RequestHead:
    """What every dialect reads of a request besides its body."""

    request: Request
    idempotency_key: str | None
    timeout_s: float | None

    def submission(
        self,
        target: Target,
        key: Key,
        spec: ImageSpec,
        finish: Finish,
        fingerprint: str,
        *,
        num_images: int = 1,
        num_previews: int = 0,
        warnings: Sequence[str] = (),
        hold: bool = False,
        require: Callable[[], None] = lambda: None,
    ) -> Submission:
        """The submission; NotFoundError for an adapter that the endpoint does not have."""
        require_adapters(target.endpoint, spec)
        return Submission(
            endpoint=target.endpoint,
            spec=spec,
            num_images=num_images,
            num_previews=num_previews,
            key=key,
            request_id=self.request.state.request_id,
            finish=finish,
            fingerprint=fingerprint,
            gone=self.request.is_disconnected,
            idempotency_key=self.idempotency_key,
            timeout_s=self.timeout_s,
            warnings=tuple(warnings),
            hold=hold,
            arrived=self.request.state.arrived,
            require=require,
            finished=getattr(self.request.state, "finished", None),  # set where a request is taken over
        )


def described(**headers: str) -> dict[str, Any]:
    """The OpenAPI description of headers that a route reads itself, because FastAPI is slow at it."""
    schema = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    return {
        "parameters": [
            {"name": name.replace("_", "-"), "in": "header", "required": False, "schema": schema}
            | {"description": text}
            for name, text in headers.items()
        ]
    }


HEADERS = described(
    idempotency_key="The same key finds the same request again.",
    x_request_timeout_s="Seconds after which to give up.",
)
"""What `head_of` reads."""


async def head_of(request: Request) -> RequestHead:
    """Dependency: the headers of a request for pictures; InvalidRequestError for a bad one."""
    idempotency_key = request.headers.get("idempotency-key")
    if idempotency_key is not None and not 1 <= len(idempotency_key) <= MAX_IDEMPOTENCY_KEY:
        raise InvalidRequestError(
            f"Idempotency-Key must have 1 to {MAX_IDEMPOTENCY_KEY} characters (got {len(idempotency_key)})",
            code="out_of_range",
            param="Idempotency-Key",
        )
    timeout_s, text = timeout_of(request.headers), request.headers.get("x-request-timeout-s")
    if timeout_s is None and text is not None:
        raise InvalidRequestError(
            f"X-Request-Timeout-S must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:g} "
            f"(got {echo(text)})",
            code="out_of_range",
            param="X-Request-Timeout-S",
        )
    return RequestHead(request, idempotency_key, timeout_s)


CurrentHead = Annotated[RequestHead, Depends(head_of)]


def body_fingerprint(dialect: str, values: Mapping[str, Any]) -> str:
    """Tells whether two bodies are the same request."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(f"{dialect}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()


async def with_pictures(
    context: Context,
    spec: ImageSpec,
    images: Sequence[str | bytes],
    mask: str | bytes | None,
    *,
    alpha: bool = False,
    invert: bool = False,
) -> ImageSpec:
    """The spec with its pictures fetched and decoded. `alpha`, `invert` are those of `read_mask`.

    A text is a data URL, base64 or a URL. InvalidRequestError says what is wrong with a picture.
    """
    files = await _fetched(context, images, "image")
    masks = [] if mask is None else await _fetched(context, [mask], "mask")

    def decoded() -> ImageSpec:
        pictures = read_pictures([_file_of(picture, "image") for picture in files])
        shown = [read_mask(_file_of(each, "mask"), pictures[0], alpha=alpha, invert=invert) for each in masks]
        return replace(spec, images=pictures, mask=shown[0] if shown else None)

    return await PICTURES.run(decoded)


async def spec_of(
    context: Context, body: DedicatedImageGenerationBody, target: Target, *, edits: bool = False
) -> ImageSpec:
    """What a body asks of a target, with its pictures for ControlNets; those to edit come later.

    InvalidRequestError before anything is decoded if the endpoint has no ControlNets for them.
    """
    spec, param = body.spec, "control_images"
    texts = body.control_images if isinstance(body.control_images, tuple) else ()
    target.endpoint.profile.check_controls(len(texts), spec.controlnet_weights, edits=edits)
    if not texts:
        return spec
    files = await _fetched(context, texts, param)

    def decoded() -> ImageSpec:
        pictures = read_pictures([_file_of(each, param) for each in files], param)
        return replace(spec, control_images=pictures)

    return await PICTURES.run(decoded)


async def _fetched(context: Context, pictures: Sequence[str | bytes], param: str) -> list[str | bytes]:
    fetcher = context.fetcher
    return list(pictures) if fetcher is None else await fetcher.fetched(pictures, param)


def _file_of(picture: str | bytes, param: str) -> bytes:
    return picture if isinstance(picture, bytes) else decode_text(picture, param)


def checked_strength(value: Any, param: str = "strength") -> float | None:
    """The strength in a body of a foreign dialect; InvalidRequestError if it is none."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        text = f"{param} must be a number (got {shown(value)})"
        raise InvalidRequestError(text, code="invalid_type", param=param)
    low, high = LIMITS["strength"]
    if not low <= value <= high:
        text = f"{param} must be between {low} and {high} (got {shown(value)})"
        raise InvalidRequestError(text, code="out_of_range", param=param)
    return float(value)


def picture_digests(spec: ImageSpec) -> dict[str, Any]:
    """The pictures' part of a fingerprint; empty without pictures."""
    return {"pictures": [picture.digest for picture in spec.pictures]} if spec.pictures else {}


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
