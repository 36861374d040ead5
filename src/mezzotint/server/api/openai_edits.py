"""OpenAI's edits: `/v1/images/edits` as a form or as JSON, and `/v1/images/variations`, which is refused.

JSON is OpenAI's newer form (`images` with `image_url`) and the container form of Friendli's API (`image`).
The transparent part of a mask is repainted; of a mask without transparency, the white part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from mezzotint.errors import MAX_ECHO, InvalidRequestError, echo
from mezzotint.schemas import parse_json, shown
from mezzotint.server.api import openai
from mezzotint.server.api.context import CurrentContext, CurrentKey
from mezzotint.server.api.middleware import FORM_TYPE
from mezzotint.server.api.submissions import (
    HEADERS,
    CurrentHead,
    body_fingerprint,
    checked_strength,
    picture_digests,
    spec_of,
    with_pictures,
)
from mezzotint.server.threads import PICTURES
from mezzotint.server.work.resolve import resolve_short

MAX_FIELDS = 400
"""Most parts of a form that are no files, and most that are."""
_PICTURES = ("image", "image[]", "images")
_ITEM_KEYS = ("image", "image_url", "b64_json", "url")
"""Where an object of JSON may have a picture's text."""
_NUMBERS = (
    "n", "num_inference_steps", "steps", "guidance_scale", "seed", "width", "height", "output_compression",
    "partial_images", "stream", "strength", "adapters",
)  # fmt: skip
"""Fields that are no text, which in a form everything is."""

router = APIRouter(tags=["OpenAI"])


def _body_schemas() -> dict[str, Any]:
    """By content type: a generation's fields, and the pictures."""
    strength = {"type": "number", "minimum": 0, "maximum": 1, "description": "How much is made anew."}
    schema = openai.body_schema({"strength": strength})
    picture = {"type": "string", "description": "A data URL or bare base64."}
    fields = schema["properties"]
    file = {"type": "string", "format": "binary"}
    files = {"image": {"anyOf": [file, {"type": "array", "items": file}]}, "mask": file}
    texts = {
        name: {"description": "As in the form, or a list of {image_url}."} for name in ("image", "images")
    }
    return {
        FORM_TYPE: {"schema": schema | {"properties": fields | files, "required": ["prompt", "image"]}},
        "application/json": {
            "schema": schema | {"properties": fields | texts | {"mask": picture}},
            "example": {"prompt": "an owl", "image": "data:image/png;base64,iVBORw0KGgo=", "strength": 0.6},
        },
    }


@router.post(
    "/v1/images/edits",
    summary="Edit images, as OpenAI's API does",
    response_class=Response,
    responses={200: {"content": {"application/json": {}, "text/event-stream": {}}}, **openai.ERRORS},
    openapi_extra=HEADERS | {"requestBody": {"required": True, "content": _body_schemas()}},
)
async def edit(request: Request, context: CurrentContext, key: CurrentKey, head: CurrentHead) -> Response:
    """Makes images from pictures and words. With `stream` the answer is server-sent events."""
    if request.headers.get("content-type", "").strip().lower().startswith(FORM_TYPE):
        values = await _read_form(request)
    else:
        values = await PICTURES.run(parse_json, await request.body())
    values = {name: value for name, value in values.items() if value not in (None, "")}
    target = resolve_short(context.registry, key, values.get("model"))
    images, mask, strength = _take_pictures(values)
    asked = openai.parse_request(values, target, context.settings.foreign_values)
    words = await spec_of(context, asked.body, target, edits=True)
    spec = await with_pictures(context, words, images, mask, alpha=True)
    spec = replace(spec, strength=strength)
    fingerprint = body_fingerprint("openai edit", values | {"strength": strength} | picture_digests(spec))
    return await openai.answer(
        request, context, key, head, target, replace(asked, event="image_edit"), spec, fingerprint
    )


@router.post("/v1/images/variations", summary="Not supported", responses={**openai.ERRORS})
async def variations(key: CurrentKey) -> Response:
    """No model here makes variations without words; an edit with a `prompt` does."""
    raise InvalidRequestError(
        "variations are not supported: send the picture to /v1/images/edits with a prompt that says what it "
        "is to show",
        code="not_supported",
    )


# ---------------------------------------------------------------- bodies


async def _read_form(request: Request) -> dict[str, Any]:
    """The fields of a multipart form, as JSON would have them; files are bytes, and never touch a disk."""
    parser = MultiPartParser(
        request.headers, request.stream(), max_files=MAX_FIELDS, max_fields=MAX_FIELDS, max_part_size=2**26
    )
    parser.spool_max_size = 2**30  # the body is in memory already and its size was checked
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, LookupError) as error:
        raise InvalidRequestError(
            f"the body is not a multipart form ({echo(str(error))}); send it as your client's library does",
            code="invalid_form",
        ) from None
    try:
        return await _fields(form)
    finally:
        await form.close()


async def _fields(form: FormData) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, part in form.multi_items():
        value = await part.read() if isinstance(part, UploadFile) else _value(name, part)
        if name in _PICTURES:
            values.setdefault("image", []).append(value)
        elif name in values:
            text = f"the field {echo(name)} stands twice in the form; send it once"
            raise InvalidRequestError(text, code="duplicate_key", param=name[:MAX_ECHO])
        elif isinstance(value, bytes) and name != "mask":
            text = f"{echo(name)} must be a text (got a file); only image and mask are files"
            raise InvalidRequestError(text, code="invalid_type", param=name[:MAX_ECHO])
        else:
            values[name] = value
    return values


def _value(name: str, text: str) -> Any:
    """A form's text as the number or truth that it stands for."""
    if name not in _NUMBERS:
        return text
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except (ValueError, RecursionError):
        return text  # refused later, for what it is


def _take_pictures(values: dict[str, Any]) -> tuple[list[str | bytes], str | bytes | None, float | None]:
    """Takes pictures, mask and strength out of the fields of a body."""
    given = [values.pop(name) for name in _PICTURES if name in values]
    if len(given) > 1:
        text = "image and images say the same thing; send one of them"
        raise InvalidRequestError(text, code="invalid_value", param="images")
    entries = given[0] if given and isinstance(given[0], list) else given
    mask = values.pop("mask", None)
    strength = checked_strength(values.pop("strength", None))
    images = [_picture(entry, "image") for entry in entries]
    return images, None if mask is None else _picture(mask, "mask"), strength


def _picture(entry: Any, param: str) -> str | bytes:
    """The bytes of a file, or the text in one of the forms that JSON has for a picture."""
    if isinstance(entry, str | bytes):
        return entry
    if isinstance(entry, Mapping):
        if "file_id" in entry:
            text = f"{param}: this server keeps no files; send the picture itself instead of file_id"
            raise InvalidRequestError(text, code="not_supported", param=param)
        found = next((entry[key] for key in _ITEM_KEYS if entry.get(key) is not None), None)
        if isinstance(found, Mapping):  # chat's way of writing it
            found = found.get("url")
        if isinstance(found, str):
            return found
    text = f"{param} must be a data URL or base64, or an object with image_url (got {shown(entry)})"
    raise InvalidRequestError(text, code="invalid_type", param=param)


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
