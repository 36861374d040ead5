"""The part of AUTOMATIC1111's web API that Open WebUI, SillyTavern and LibreChat use.

Fields of the body that mean nothing here are ignored, as in the original. The API key is the password of
Basic authentication, with any user name. A bearer token works as well. A LoRA in the prompt,
`<lora:ROUTE:WEIGHT>`, is the adapter of that route.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response

from mezzotint import images
from mezzotint.errors import InvalidRequestError, echo
from mezzotint.schemas import (
    DedicatedImageGenerationBody,
    ForeignImageGenerationBody,
    make_body,
    parse_json,
    shown,
    split_model,
)
from mezzotint.server.api import answers, dedicated, openai
from mezzotint.server.api.answers import AnswerResponse
from mezzotint.server.api.context import Context, CurrentContext, CurrentKey
from mezzotint.server.api.foreign import meet_half_way
from mezzotint.server.api.img2img import prepared, warnings_of
from mezzotint.server.api.submissions import (
    HEADERS,
    CurrentHead,
    RequestHead,
    body_fingerprint,
    checked_strength,
    picture_digests,
    with_pictures,
)
from mezzotint.server.store.keys import Key
from mezzotint.server.threads import PICTURES
from mezzotint.server.work.resolve import Target, resolve_short, usable_endpoints
from mezzotint.server.work.tickets import Answer, Picture, Ticket
from mezzotint.spec import MAX_ADAPTERS, AdapterUse, ImageSpec

SAMPLER = "Automatic"
"""The only sampler to choose, which is the model's own; other names in a request are ignored."""
_LORA = re.compile(r"<lora:([^:<>]+)(?::(-?\d{1,3}(?:\.\d{1,6})?))?(?::[^<>]*)?>")
READ = (
    "prompt", "negative_prompt", "steps", "seed", "cfg_scale", "width", "height", "batch_size", "n_iter",
    "denoising_strength", "inpainting_mask_invert", "resize_mode", "mask_blur", "inpainting_fill",
    "inpaint_full_res",
)  # fmt: skip
"""Fields of a body that this server reads, besides the override of the checkpoint."""
IMG2IMG_STRENGTH = 0.75
"""The original's default."""
PNG_INFO_S = 10.0
"""How long the reading of a picture's parameters may take, its turn included."""
MAX_SCRIPTS = 10
"""Most scripts that the warnings name."""
MAX_ECHOED = 64 * 2**10
"""Characters of a body that are echoed whole."""
_ANSWERS: dict[int | str, dict[str, Any]] = {
    status: answers.ERRORS[status] for status in (401, 403, 404, 422, 503)
}

router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A checked request, in the words of the dedicated route."""

    body: DedicatedImageGenerationBody
    target: Target
    spec: ImageSpec
    warnings: list[str]
    """What was bent or ignored."""


# ---------------------------------------------------------------- pictures


_ROUTE: dict[str, Any] = {"responses": {**answers.ERRORS}, "openapi_extra": HEADERS}


@router.post("/txt2img", summary="Generate images, as the web UI's API does", **_ROUTE)
async def txt2img(request: Request, context: CurrentContext, key: CurrentKey, head: CurrentHead) -> Response:
    values = parse_json(await request.body())
    asked = parse_request(values, request, context, key)
    return await _answer(request, context, key, head, values, asked)


@router.post("/img2img", summary="Edit images, as the web UI's API does", **_ROUTE)
async def img2img(request: Request, context: CurrentContext, key: CurrentKey, head: CurrentHead) -> Response:
    """`init_images` has one picture in base64; of `mask`, the white part is repainted."""
    values = await PICTURES.run(parse_json, await request.body())
    pictures, mask = values.pop("init_images", None), values.pop("mask", None)
    if not isinstance(pictures, list) or not all(isinstance(text, str) for text in pictures):
        text = f"init_images must be a list of base64 texts (got {shown(pictures)})"
        raise InvalidRequestError(text, code="invalid_type", param="init_images")
    if mask is not None and not isinstance(mask, str):
        text = f"mask must be base64 (got {shown(mask)})"
        raise InvalidRequestError(text, code="invalid_type", param="mask")
    asked = parse_request(values, request, context, key)
    strength = checked_strength(values.get("denoising_strength", IMG2IMG_STRENGTH), "denoising_strength")
    unused = warnings_of(values, mask=bool(mask))
    invert = bool(values.get("inpainting_mask_invert"))
    spec = await with_pictures(context, asked.spec, pictures, mask or None, invert=invert)
    spec = await PICTURES.run(prepared, spec, values)
    asked = replace(asked, spec=replace(spec, strength=strength), warnings=asked.warnings + unused)
    return await _answer(request, context, key, head, values, asked)


async def _answer(
    request: Request,
    context: Context,
    key: Key,
    head: RequestHead,
    values: dict[str, Any],
    asked: CheckedRequest,
) -> Response:
    """Submits a request and answers it; `values` is its body without pictures."""
    parameters = _echoed(values)
    ticket = await context.admission.submit(
        head.submission(
            asked.target,
            key,
            asked.spec,
            lambda ticket, pictures: _finish(parameters, asked, ticket, pictures),
            body_fingerprint("a1111", values | picture_digests(asked.spec)),
            num_images=asked.body.num_images,
            warnings=asked.warnings,
        )
    )
    return AnswerResponse(ticket, _newest(request, ticket, context.admission.attached(ticket)))


@contextlib.contextmanager
def _newest(request: Request, ticket: Ticket, attached: AbstractContextManager[None]) -> Iterator[None]:
    """While `attached` is held, `progress` and `interrupt` find this request, unless a newer one comes."""
    running = _running(request)
    running[ticket.key.id] = ticket
    try:
        with attached:
            yield
    finally:
        if running.get(ticket.key.id) is ticket:
            del running[ticket.key.id]


def parse_request(values: Mapping[str, Any], request: Request, context: Context, key: Key) -> CheckedRequest:
    """Checks the body; InvalidRequestError names the dedicated route's fields."""
    settings = values.get("override_settings") or {}
    named = settings.get("sd_model_checkpoint") if isinstance(settings, dict) else None
    target = resolve_short(context.registry, key, named or _chosen(request, context, key))
    prompt, loras = take_loras(values.get("prompt"))
    if loras:
        target = target.with_adapter(loras[0].route)
    steps, seed, guidance = values.get("steps"), values.get("seed"), values.get("cfg_scale")
    fields = {
        "model": target.model,
        "num_inference_steps": openai.default_steps(target.endpoint) if steps is None else steps,
        "prompt": prompt,
        "negative_prompt": values.get("negative_prompt") or None,
        "guidance_scale": guidance,
        "seed": None if seed == -1 else seed,
        "n": _num_images(values),
        "width": values.get("width"),
        "height": values.get("height"),
    }
    warnings = _ignored(values)
    if context.settings.foreign_values == "nearest":
        fields, bent = meet_half_way(fields, target.endpoint.profile)
        warnings += bent
    body = make_body(fields, ForeignImageGenerationBody)
    uses = loras or ((AdapterUse(target.route),) if target.route else ())
    return CheckedRequest(body, target, replace(body.spec, adapters=uses), warnings)


def _ignored(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each field that has no effect here."""
    scripts = values.get("alwayson_scripts")
    unused = {
        "enable_hr": "enable_hr (hires fix)",
        "styles": "styles",
        "script_name": "script_name",
        "refiner_checkpoint": "refiner_checkpoint",
        "tiling": "tiling",
        "restore_faces": "restore_faces",
    }
    found = [text for name, text in unused.items() if values.get(name)]
    if isinstance(scripts, dict):
        found += [f"alwayson_scripts: {echo(name)}" for name in islice(scripts, MAX_SCRIPTS)]
    return [f"{text} had no effect: this server has no such thing" for text in found]


def take_loras(prompt: Any) -> tuple[Any, tuple[AdapterUse, ...]]:
    """The prompt without its LoRAs, and them; InvalidRequestError for too many and for a wild weight."""
    found = _LORA.findall(prompt) if isinstance(prompt, str) else []
    if not found:
        return prompt, ()
    routes = [route for route, _ in found]
    if len(routes) > MAX_ADAPTERS or len(set(routes)) < len(routes):
        raise InvalidRequestError(
            f"prompt must name at most {MAX_ADAPTERS} LoRAs, each once (got {echo(', '.join(routes))})",
            code="not_supported",
            param="prompt",
        )
    uses = tuple(AdapterUse(route, float(weight) if weight else None) for route, weight in found)
    for use in uses:
        if use.scale is not None and abs(use.scale) > 10:
            raise InvalidRequestError(
                f"the weight of LoRA {echo(use.route)} must be between -10 and 10 (got {use.scale})",
                code="out_of_range",
                param="prompt",
            )
    return " ".join(_LORA.sub(" ", prompt).split()), uses


def _num_images(values: Mapping[str, Any]) -> Any:
    """The original makes `n_iter` batches of `batch_size`."""
    size, batches = values.get("batch_size"), values.get("n_iter")
    for name, value in (("batch_size", size), ("n_iter", batches)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            text = f"{name} must be an integer (got {shown(value)})"
            raise InvalidRequestError(text, code="invalid_type", param=name)
    return (1 if size is None else size) * (1 if batches is None else batches)


def _finish(parameters: str, asked: CheckedRequest, ticket: Ticket, pictures: list[Picture]) -> Answer:
    """Turns pictures into this dialect's answer; runs in a thread."""
    began = time.perf_counter()
    model = asked.body.model
    files = [answers.encode(ticket.endpoint, model, "png", picture) for picture in pictures]
    shown_images = ",".join(f'"{base64.b64encode(data).decode()}"' for data in files)
    info = json.dumps(json.dumps(_info(model, ticket, pictures)))
    text = f'{{"images":[{shown_images}],"parameters":{parameters},"info":{info}}}'
    return answers.made_answer(text.encode(), pictures, time.perf_counter() - began)


def _echoed(values: Mapping[str, Any]) -> str:
    """The body as JSON, for the answer; a long one without the fields that this server does not read.

    It is text because a parsed body takes many times the memory, and the request may wait for long. It is
    ASCII because the body may hold half a surrogate pair. Infinity (from 1e999, in an ignored field) is null.
    """
    text = json.dumps(values, separators=(",", ":"))
    if len(text) > MAX_ECHOED:
        text = json.dumps({name: values[name] for name in READ if name in values}, separators=(",", ":"))
    return json.dumps(json.loads(text, parse_constant=lambda _: None), separators=(",", ":"))


def _info(model: str, ticket: Ticket, pictures: list[Picture]) -> dict[str, Any]:
    first = pictures[0].spec
    return {
        "prompt": first.prompt,
        "all_prompts": [picture.spec.prompt for picture in pictures],
        "negative_prompt": first.negative_prompt or "",
        "all_negative_prompts": [picture.spec.negative_prompt or "" for picture in pictures],
        "seed": first.seed,
        "all_seeds": [picture.seed for picture in pictures],
        "width": pictures[0].width,
        "height": pictures[0].height,
        "sampler_name": SAMPLER,
        "cfg_scale": first.guidance_scale,
        "steps": first.num_inference_steps,
        "batch_size": len(pictures),
        "sd_model_name": model,
        "infotexts": [
            answers.parameters_of(ticket.endpoint, model, picture).to_infotext() for picture in pictures
        ],
        "warnings": ticket.warnings,
    }


# ---------------------------------------------------------------- progress


@router.get("/progress", summary="How far this key's request is", responses=_ANSWERS)
async def progress(request: Request, key: CurrentKey) -> dict[str, Any]:
    """The newest running request of this key; all zeros when there is none."""
    ticket = _running(request).get(key.id)
    step, steps = (ticket.step, ticket.num_steps) if ticket else (0, 0)
    return {
        "progress": step / steps if steps else 0.0,
        "eta_relative": dedicated.seconds_left(ticket) if ticket else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "job": ticket.id if ticket else "",
            "job_count": 1 if ticket else 0,
            "job_no": 0,
            "sampling_step": step,
            "sampling_steps": steps,
        },
        "current_image": None,
        "textinfo": ticket.status if ticket else None,
    }


@router.post("/interrupt", summary="Cancel this key's request", responses=_ANSWERS)
async def interrupt(request: Request, context: CurrentContext, key: CurrentKey) -> dict[str, Any]:
    ticket = _running(request).get(key.id)
    if ticket is not None:
        context.admission.cancel(ticket)
    return {}


def _running(request: Request) -> dict[str, Ticket]:
    """By key id: the newest request that runs."""
    running: dict[str, Ticket] = request.app.state.a1111_running
    return running


# ---------------------------------------------------------------- what there is to choose


@router.get("/options", summary="The endpoint in use", responses=_ANSWERS)
async def options(request: Request, context: CurrentContext, key: CurrentKey) -> dict[str, Any]:
    return {"sd_model_checkpoint": _chosen(request, context, key), "samples_format": "png"}


@router.post("/options", summary="Choose the endpoint", responses=_ANSWERS)
async def set_options(request: Request, context: CurrentContext, key: CurrentKey) -> dict[str, Any]:
    """`sd_model_checkpoint` counts for this key until the server stops; other options are ignored."""
    name = parse_json(await request.body()).get("sd_model_checkpoint")
    if name is not None:
        request.app.state.a1111_chosen[key.id] = resolve_short(context.registry, key, name).model
    return {}


@router.get("/sd-models", summary="The endpoints of this key", responses=_ANSWERS)
async def sd_models(context: CurrentContext, key: CurrentKey) -> list[dict[str, Any]]:
    return [
        {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
        for endpoint in usable_endpoints(context.registry, key)
        for name in (endpoint.id, *(f"{endpoint.id}:{route}" for route in sorted(endpoint.adapters)))
    ]


@router.get("/samplers", summary="Samplers: the model's own", responses=_ANSWERS)
async def samplers(key: CurrentKey) -> list[dict[str, Any]]:
    return [{"name": SAMPLER, "aliases": [], "options": {}}]


@router.get("/schedulers", summary="Schedulers: the model's own", responses=_ANSWERS)
async def schedulers(key: CurrentKey) -> list[dict[str, Any]]:
    return [{"name": SAMPLER.lower(), "label": SAMPLER}]


@router.get("/embeddings", summary="None", responses=_ANSWERS)
async def embeddings(key: CurrentKey) -> dict[str, Any]:
    return {"loaded": {}, "skipped": {}}


@router.get("/scripts", summary="None", responses=_ANSWERS)
async def scripts(key: CurrentKey) -> dict[str, Any]:
    return {"txt2img": [], "img2img": []}


@router.get("/cmd-flags", summary="Flags of the original that clients look at", responses=_ANSWERS)
async def cmd_flags(key: CurrentKey) -> dict[str, Any]:
    return {"api": True, "api_auth": None, "listen": False, "share": False, "ckpt": None}


@router.get("/memory", summary="Nothing is known here", responses=_ANSWERS)
async def memory(key: CurrentKey) -> dict[str, Any]:
    return {"ram": {}, "cuda": {}}


@router.post("/refresh-checkpoints", summary="Nothing to do: endpoints are known", responses=_ANSWERS)
@router.post("/refresh-loras", summary="Nothing to do: adapters are known", responses=_ANSWERS)
@router.post("/refresh-vae", summary="Nothing to do", responses=_ANSWERS)
@router.post("/unload-checkpoint", summary="Nothing to do: endpoints have their own life", responses=_ANSWERS)
@router.post("/reload-checkpoint", summary="Nothing to do: endpoints have their own life", responses=_ANSWERS)
async def nothing_to_do(key: CurrentKey) -> dict[str, Any]:
    return {}


@router.get("/hypernetworks", summary="None", responses=_ANSWERS)
@router.get("/face-restorers", summary="None", responses=_ANSWERS)
@router.get("/prompt-styles", summary="None", responses=_ANSWERS)
@router.get("/realesrgan-models", summary="None", responses=_ANSWERS)
@router.get("/upscalers", summary="None", responses=_ANSWERS)
@router.get("/latent-upscale-modes", summary="None", responses=_ANSWERS)
@router.get("/sd-vae", summary="None", responses=_ANSWERS)
async def empty_list(key: CurrentKey) -> list[dict[str, Any]]:
    """Clients ask for these lists when they start. This server has nothing to choose from."""
    return []


@router.get("/loras", summary="The adapters of the endpoint in use", responses=_ANSWERS)
async def loras(request: Request, context: CurrentContext, key: CurrentKey) -> list[dict[str, Any]]:
    endpoint = resolve_short(context.registry, key, _chosen(request, context, key)).endpoint
    return [{"name": r, "alias": r, "path": r, "metadata": {}} for r in sorted(endpoint.adapters)]


def _chosen(request: Request, context: Context, key: Key) -> str | None:
    """The model that this key uses: as set through the options, else its first endpoint."""
    chosen: str | None = request.app.state.a1111_chosen.get(key.id)
    mine = [endpoint.id for endpoint in usable_endpoints(context.registry, key)]
    if chosen is not None and split_model(chosen)[0] in mine:
        return chosen
    return mine[0] if mine else None


@router.post("/png-info", summary="Read what made a picture", responses=_ANSWERS)
async def png_info(request: Request, key: CurrentKey) -> dict[str, Any]:
    """`image`: base64 of a PNG or JPEG, or a data URL of it."""
    return await PICTURES.run(_read_info, await request.body(), limit_s=PNG_INFO_S)


def _read_info(body: bytes) -> dict[str, Any]:
    text = parse_json(body).get("image")
    if not isinstance(text, str):
        raise InvalidRequestError("image must be a string of base64", code="invalid_type", param="image")
    try:
        data = base64.b64decode(text.partition("base64,")[2] or text, validate=True)
    except ValueError:
        raise InvalidRequestError("image is not base64", code="invalid_image", param="image") from None
    info = images.read_infotext(data) or ""
    found = images.parse_infotext(info)
    return {
        "info": info,
        "items": {"parameters": info} if info else {},
        "parameters": json.loads(found.to_json()) if found else {},
    }


def install(app: FastAPI) -> None:
    """Adds these routes to the app, and what they remember while it runs."""
    app.state.a1111_running = {}
    app.state.a1111_chosen = {}
    app.include_router(router)
