"""OpenAI's images: `/v1/images/generations` and `/v1/models`.

The same path takes the container form of Friendli's API (`response_format` is `raw` or `jpeg`, `model` an
adapter route alone) and Together's words (`steps`, `base64`). Fields that are left out have the endpoint's
defaults.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from mezzotint import images
from mezzotint.errors import InvalidRequestError, MezzotintError, NotFoundError, echo
from mezzotint.messages import Preview
from mezzotint.schemas import (
    DedicatedImageGenerationBody,
    ErrorBody,
    ForeignImageGenerationBody,
    make_body,
    parse_json,
    shown,
    unknown_field,
)
from mezzotint.server.api import answers, sse, together
from mezzotint.server.api.answers import AnswerResponse
from mezzotint.server.api.context import Context, CurrentContext, CurrentKey
from mezzotint.server.api.foreign import UNUSED, check_unused, meet_half_way, unused_schema
from mezzotint.server.api.submissions import (
    HEADERS,
    CurrentHead,
    RequestHead,
    body_fingerprint,
    picture_digests,
    spec_of,
    with_pictures,
)
from mezzotint.server.store.keys import Key
from mezzotint.server.threads import PICTURES
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.resolve import Target, resolve, resolve_short, usable_endpoints
from mezzotint.server.work.tickets import Answer, Picture, Ticket
from mezzotint.spec import ImageSpec

PREFIX = "/v1/"
REFUSAL_STATUS = 400
"""Of a body that breaks a rule: `openai.BadRequestError` is what users of this dialect catch."""
FALLBACK_STEPS = 20
"""Steps when the request and the endpoint name none and the model has never been loaded."""
_SHARED = tuple(
    name for name in ForeignImageGenerationBody.model_fields if name not in ("model", "response_format")
)
"""Fields that have the meaning of the dedicated route."""
_OWN = (
    "model", "size", "steps", "response_format", "output_format", "output_compression", "stream",
    "partial_images",
)  # fmt: skip
KNOWN = _SHARED + _OWN + tuple(UNUSED)
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_FORMS: Mapping[str | None, tuple[str, str | None]] = {
    None: ("both", None),
    "url": ("url", None),
    "b64_json": ("b64_json", None),
    "base64": ("b64_json", None),
    "jpeg": ("image", "jpeg"),
    "raw": ("image", "raw"),
}
"""By `response_format`: the field that holds the picture, and the file's format if that says it too."""

_FILES = ("png", "jpeg", "webp")
NO_URL = "gpt-image"
"""OpenAI's models whose names begin so never answer a URL, and programs rely on it: Open WebUI prefers a URL,
and then refuses to fetch it from its own network."""
ERRORS = {REFUSAL_STATUS if status == 422 else status: text for status, text in answers.ERRORS.items()}

router = APIRouter(tags=["OpenAI"])


@dataclass(frozen=True, slots=True)
class OpenAIRequest:
    """A checked request: the picture as on the dedicated route, and the form of the answer."""

    body: DedicatedImageGenerationBody
    item_field: str
    """`url`, `b64_json`, `both`, or `image` for the container form."""
    file_format: str
    """Format of the file: `png`, `jpeg`, `webp` or `raw`."""
    container: bool
    """Whether the answer also has `image`, a JPEG in base64, as Friendli's container client reads it."""
    quality: int
    stream: bool
    partial_images: int
    warnings: list[str]
    event: str = "image_generation"
    """What the types of streamed events begin with."""


def body_schema(more: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The JSON Schema of a body: shared fields as on the dedicated route, and null is as good as absent.

    `more` are the schemas of one route's own fields.
    """
    fields = ForeignImageGenerationBody.model_json_schema()["properties"]
    own: dict[str, dict[str, Any]] = {
        "model": {
            "type": "string",
            "description": "ENDPOINT_ID, ENDPOINT_ID:ADAPTER_ROUTE or ADAPTER_ROUTE.",
        },
        "size": {"type": "string", "pattern": f"^(auto|{_SIZE.pattern})$"},
        "steps": {"type": "integer", "description": "As num_inference_steps, in Together's word."},
        "response_format": {"enum": [name for name in _FORMS if name]},
        "output_format": {"enum": list(_FILES)},
        "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
        "stream": {"type": "boolean"},
        "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
    }
    own |= unused_schema() | dict(more)
    own |= {name: fields[name] for name in _SHARED if name != "prompt"}
    own["num_inference_steps"] = {"type": "integer", "description": "The nearest of 1 to 50 is used."}
    return {
        "type": "object",
        "required": ["prompt"],
        "properties": {"prompt": fields["prompt"]}
        | {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in own.items()},
        "additionalProperties": False,
    }


# ---------------------------------------------------------------- pictures


@router.post(
    "/v1/images/generations",
    summary="Generate images, as OpenAI's API does",
    response_class=Response,
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}, **ERRORS},
    openapi_extra=HEADERS
    | {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": body_schema(together.schema()),
                    "example": {"model": "emoji", "prompt": "an owl", "size": "auto", "seed": 7},
                }
            },
        }
    },
)
async def generate(request: Request, context: CurrentContext, key: CurrentKey, head: CurrentHead) -> Response:
    """Makes images from words. With `"stream": true` the answer is server-sent events."""
    given = parse_json(await request.body())
    values = {name: value for name, value in given.items() if value is not None}
    pictures = together.pictures_of(values)
    target = resolve_short(context.registry, key, values.get("model"))
    target, adapter = together.adapter_of(values, target)
    fields = {name: value for name, value in values.items() if name not in together.FIELDS}
    asked = parse_request(fields, target, context.settings.foreign_values)
    spec = await spec_of(context, asked.body, target, edits=bool(pictures))
    spec = replace(spec, adapters=(adapter,)) if adapter else spec
    if pictures:
        spec = await with_pictures(context, spec, pictures, None)
        values = {name: value for name, value in values.items() if name not in together.PICTURES}
    fingerprint = body_fingerprint("openai", values | picture_digests(spec))
    return await answer(request, context, key, head, target, asked, spec, fingerprint)


async def answer(
    request: Request,
    context: Context,
    key: Key,
    head: RequestHead,
    target: Target,
    asked: OpenAIRequest,
    spec: ImageSpec,
    fingerprint: str,
) -> Response:
    """Submits the request and answers it in this dialect."""
    base_url = context.base_url(request)
    ticket = await context.admission.submit(
        head.submission(
            target,
            key,
            spec,
            lambda ticket, pictures: _finish(context, asked, base_url, ticket, pictures),
            fingerprint,
            num_images=asked.body.num_images,
            num_previews=asked.partial_images if asked.stream else 0,
            warnings=asked.warnings,
            require=answers.room_for(context, asked.item_field in ("url", "both")),
        )
    )
    attached = context.admission.attached(ticket)
    return (
        sse.stream(_events(asked, ticket, ticket.previews), attached)
        if asked.stream
        else AnswerResponse(ticket, attached)
    )


def parse_request(values: Mapping[str, Any], target: Target, foreign_values: str) -> OpenAIRequest:
    """Checks the body, bent to what the endpoint can do; InvalidRequestError as on the dedicated route."""
    for name in values:
        if name not in KNOWN:
            raise unknown_field(name, KNOWN)
    fields = {name: values[name] for name in _SHARED if name in values} | _size(values)
    if "steps" in values and values.get("num_inference_steps", values["steps"]) != values["steps"]:
        raise _invalid("steps", "and num_inference_steps say the same thing and differ; send one of them")
    fields.setdefault("num_inference_steps", values.get("steps", default_steps(target.endpoint)))
    item_field, file_format = _FORMS[_choice(values, "response_format", tuple(_FORMS), None)]
    output_format = _choice(values, "output_format", _FILES, "png")
    if item_field == "both" and str(values.get("model")).startswith(NO_URL):
        item_field = "b64_json"
    warnings = check_unused(values)
    if foreign_values == "nearest":
        fields, bent = meet_half_way(fields, target.endpoint.profile)
        warnings += bent
    return OpenAIRequest(
        body=make_body({"model": target.model} | fields, ForeignImageGenerationBody),
        item_field=item_field,
        file_format=file_format or output_format,
        container="num_inference_steps" in values and item_field == "both" and "output_format" not in values,
        quality=_integer(values, "output_compression", 0, 100, images.JPEG_QUALITY),
        stream=_choice(values, "stream", (False, True), False),
        partial_images=_integer(values, "partial_images", 0, 3, 0),
        warnings=warnings,
    )


def default_steps(endpoint: Endpoint) -> int:
    """Steps of a request that names none."""
    info = endpoint.info
    return endpoint.spec.default_steps or (info.default_steps if info else FALLBACK_STEPS)


def _size(values: Mapping[str, Any]) -> dict[str, int]:
    size = values.get("size", "auto")
    if size == "auto":
        return {}
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise _invalid(
            "size", f"must be WIDTHxHEIGHT in pixels, such as 512x512, or auto (got {shown(size)})"
        )
    if "width" in values or "height" in values:
        raise _invalid("size", "and width or height stand together; send size, or width and height")
    return {"width": int(found[1]), "height": int(found[2])}


def _choice(values: Mapping[str, Any], name: str, choices: tuple[Any, ...], default: Any) -> Any:
    value = values.get(name, default)
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        names = ", ".join(json.dumps(choice).strip('"') for choice in choices)
        raise _invalid(name, f"must be one of {names} (got {shown(value)})")
    return value


def _integer(values: Mapping[str, Any], name: str, low: int, high: int, default: int) -> int:
    value = values.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _invalid(name, f"must be an integer (got {shown(value)})", "invalid_type")
    if not low <= value <= high:
        raise _invalid(name, f"must be between {low} and {high} (got {shown(value)})", "out_of_range")
    return value


def _invalid(name: str, text: str, code: str = "invalid_value") -> InvalidRequestError:
    return InvalidRequestError(f"{name} {text}", code=code, param=name)


# ---------------------------------------------------------------- answers


def _finish(
    context: Context, asked: OpenAIRequest, base_url: str, ticket: Ticket, pictures: list[Picture]
) -> Answer:
    """Turns pictures into this dialect's answer; runs in a thread."""
    began = time.perf_counter()
    files = [
        answers.encode(ticket.endpoint, asked.body.model, asked.file_format, p, asked.quality)
        for p in pictures
    ]
    if asked.stream:
        usage = _usage(ticket.jobs[0].spec.num_steps)
        parts = [
            sse.event(
                f"{asked.event}.completed", _event(asked, "completed", picture, data) | {"usage": usage}
            )
            for picture, data in zip(pictures, files, strict=True)
        ]
        encode_s = time.perf_counter() - began
        return answers.made_answer(b"".join(parts), pictures, encode_s, is_json=False)
    items = [
        _item(context, asked, base_url, ticket, number, picture, data)
        for number, (picture, data) in enumerate(zip(pictures, files, strict=True))
    ]
    answer: dict[str, Any] = {
        "created": int(ticket.created),
        "id": ticket.id,
        "object": "list",
        "model": asked.body.model,
        "data": items,
        "usage": _usage(ticket.num_steps),
        "output_format": asked.file_format,
        "size": f"{pictures[0].width}x{pictures[0].height}",
        "warnings": ticket.warnings,
    }
    if asked.item_field == "image":
        answer["image"] = items[0]["b64_json"]
    elif asked.container:
        jpeg = answers.encode(ticket.endpoint, asked.body.model, "jpeg", pictures[0])
        answer["image"] = base64.b64encode(jpeg).decode()
    text = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return answers.made_answer(text.encode(), pictures, time.perf_counter() - began)


def _item(
    context: Context,
    asked: OpenAIRequest,
    base_url: str,
    ticket: Ticket,
    number: int,
    picture: Picture,
    data: bytes,
) -> dict[str, Any]:
    kind = images.FORMATS[asked.file_format]
    item = {"index": number, "seed": picture.seed, "width": picture.width, "height": picture.height}
    kept: dict[str, Any] = {}
    if asked.item_field in ("url", "both"):
        kept["url"] = answers.store(context, ticket, asked.body.model, picture, data, kind.suffix, base_url)
    if asked.item_field != "url":
        kept |= {"b64_json": base64.b64encode(data).decode(), **kind.item_fields(picture.channels)}
    return {"type": "url" if asked.item_field == "url" else "b64_json", **kept, **item}


def _usage(steps: int) -> dict[str, Any]:
    """OpenAI's shape, which counts tokens; each denoising step is one output token."""
    return {
        "input_tokens": 0,
        "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
        "output_tokens": steps,
        "total_tokens": steps,
    }


def _event(asked: OpenAIRequest, kind: str, picture: Picture | Preview, data: bytes) -> dict[str, Any]:
    return {
        "type": f"{asked.event}.{kind}",
        "b64_json": base64.b64encode(data).decode(),
        "created_at": int(time.time()),
        "size": f"{picture.width}x{picture.height}",
        "output_format": asked.file_format,
        "background": "opaque",
        "quality": "auto",
    }


async def _events(
    asked: OpenAIRequest, ticket: Ticket, previews: list[tuple[int, Preview]]
) -> AsyncIterator[bytes]:
    """Partial images as events, progress as comments: clients take any other event for a partial image.

    A ticket drops its `previews` when it ends, which may be before this begins.
    """
    shown_previews, seen = 0, -1
    while True:
        seen = ticket.changes
        while shown_previews < len(previews):  # more may come while one is sent
            number, preview = previews[shown_previews]
            shown_previews += 1
            yield await PICTURES.run(_partial, asked, number, preview)
        if ticket.ended:
            break
        yield sse.comment(f"step {ticket.step}/{ticket.num_steps}" if ticket.step else ticket.status)
        await ticket.changed(seen)
    try:
        answer = await ticket.outcome()
        async for piece in answer.pieces():
            yield piece
    except MezzotintError as error:
        yield sse.event(None, ErrorBody.of(error, ticket.id).model_dump_json())


def _partial(asked: OpenAIRequest, number: int, preview: Preview) -> bytes:
    data = images.encode(
        asked.file_format, preview.payload, preview.width, preview.height, quality=asked.quality
    )
    values = _event(asked, "partial_image", preview, data)
    values |= {"partial_image_index": preview.index, "index": number}
    return sse.event(f"{asked.event}.partial_image", values)


@router.options("/v1/images/generations", include_in_schema=False)
async def methods() -> Response:
    """Some programs ask this, without a key, to see whether the server speaks this language."""
    return Response(status_code=204, headers={"allow": "POST, OPTIONS"})


# ---------------------------------------------------------------- models


@router.get(
    "/v1/models",
    summary="Endpoints and adapters that this key may use",
    responses={401: ERRORS[401]},
)
async def list_models(context: CurrentContext, key: CurrentKey) -> dict[str, Any]:
    """Each endpoint and each `endpoint:adapter`; `mezzotint` says what requests to it may ask for."""
    data = [
        model
        for endpoint in usable_endpoints(context.registry, key)
        for model in await _models(context, endpoint)
    ]
    return {"object": "list", "data": data}


@router.get("/v1/models/{model}", summary="One of them", responses={s: ERRORS[s] for s in (401, 403, 404)})
async def read_model(model: str, context: CurrentContext, key: CurrentKey) -> dict[str, Any]:
    for found in await _models(context, resolve(context.registry, key, model).endpoint):
        if found["id"] == model:
            return found
    raise NotFoundError(f"there is no model {echo(model)}; list them at /v1/models", param="model")


async def _models(context: Context, endpoint: Endpoint) -> list[dict[str, Any]]:
    """The endpoint without an adapter, then with each of its adapters."""
    history = await context.registry.history(endpoint.id)
    created = int(history[0].created) if history else 0
    return [
        {
            "id": Target(endpoint, route).model,
            "object": "model",
            "created": created,
            "owned_by": "mezzotint",
            "mezzotint": {
                "endpoint": endpoint.id,
                "adapter": route,
                "adapter_scale": endpoint.adapters[route].scale if route else None,
                **_abilities(endpoint),
            },
        }
        for route in (None, *sorted(endpoint.adapters))
    ]


def _abilities(endpoint: Endpoint) -> dict[str, Any]:
    """What a form for requests needs to know; null where the model has never been loaded."""
    spec, info = endpoint.spec, endpoint.info
    size = endpoint.profile.size(None, None)
    return {
        "status": str(endpoint.state),
        "not_ready_because": endpoint.not_ready_because or None,
        "default_steps": default_steps(endpoint),
        "default_guidance": info.default_guidance
        if spec.default_guidance is None and info
        else spec.default_guidance,
        "guidance_effective": info.guidance_effective if info else None,
        "supports_negative_prompt": info.supports_negative_prompt if info else None,
        "max_pictures": info.max_pictures if info else None,
        "masks": info.masks if info else None,
        "strength": info.strength if info else None,
        "width": size[0] if size else None,
        "height": size[1] if size else None,
        "size_multiple": info.size_multiple if info else None,
        "max_pixels": spec.max_pixels or (4 * info.width * info.height if info else None),
        "sizes": info.sizes if info else None,
        "controlnets": endpoint.profile.controlnets,
        "examples": info.examples if info else None,
        "card": _card(endpoint) if info else None,
    }


def _card(endpoint: Endpoint) -> dict[str, Any]:
    """What people want to know of an endpoint's model; of a folder on the server only its name."""
    source, info = endpoint.spec.model, endpoint.info
    assert info is not None
    return {
        "model": Path(source).name if Path(source).is_absolute() or source.startswith(".") else source,
        "about": info.about or None,
        "license": info.license or None,
        "pipeline": info.pipeline_class,
        "num_parameters": info.num_parameters,
        "dtype": info.dtype,
        "device": info.device,
        "step_s": round(endpoint.profile.step_s(None, None), 4),
    }


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
