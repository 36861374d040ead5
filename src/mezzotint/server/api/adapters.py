"""The admin routes of adapters: list, add, remove. Only an admin key may call them."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from mezzotint import hub
from mezzotint.config import AdapterSettings
from mezzotint.errors import BodyTimeoutError, BodyTooLargeError, StorageFullError
from mezzotint.server.api import answers
from mezzotint.server.api.context import AdminKey, CurrentContext
from mezzotint.server.api.middleware import UPLOAD_TYPE
from mezzotint.server.api.strict import StrictRoute
from mezzotint.server.store.adapter_files import WEIGHTS, new_scratch
from mezzotint.server.threads import FILES
from mezzotint.server.work.tickets import ClientGone
from mezzotint.spec import ID_PATTERN, between

MAX_NAME = 100
"""Characters that are kept of an uploaded file's name."""
PATH = "/dedicated/beta/endpoint/{endpoint_id}/adapters"

router = APIRouter(tags=["Adapters"], route_class=StrictRoute)


class AddAdapterBody(AdapterSettings):
    """An adapter to add to an endpoint."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"route": "flat", "source": "owner/flat-lora:flat.safetensors@v1", "scale": 0.8}
        }
    )

    replace: bool = Field(False, description="Take the place of an adapter that has this route already.")


class AdapterView(BaseModel):
    """A registered adapter."""

    name: str = Field(description="What requests name in `model`.")
    route: str
    source: str = Field(description="Where it came from; the server keeps a copy of its own.")
    scale: float
    checksum: str = Field(description="SHA-256 of the weights.")
    family: str | None = Field(
        description="Class of the pipeline that it fits; null until a worker has looked at it."
    )
    rank: int | None
    num_bytes: int | None = Field(description="What it takes in a worker's memory.")
    file_bytes: int
    target_modules: list[str]
    origin: str = Field(description="`configuration`, `built-in` or `api`.")
    created: float
    state: str = Field(description="`ready`, `unchecked` (no worker has looked at it yet) or `failed`.")
    failure: str | None


class AdapterList(BaseModel):
    data: list[AdapterView]


EndpointId = Annotated[str, Path(description="ID of the endpoint.")]
_ERRORS: dict[int | str, dict[str, Any]] = {status: answers.ERRORS[status] for status in (401, 403, 404, 503)}


@router.get(PATH, summary="List an endpoint's adapters", response_model=AdapterList, responses=_ERRORS)
async def list_adapters(endpoint_id: EndpointId, context: CurrentContext, key: AdminKey) -> dict[str, Any]:
    endpoint = context.registry.find(endpoint_id, key)
    return {"data": [adapter.shown() for _, adapter in sorted(endpoint.adapters.items())]}


@router.post(
    PATH,
    summary="Add an adapter",
    response_model=AdapterView,
    responses={**_ERRORS, 409: answers.ERRORS[409], 422: answers.ERRORS[422]},
)
async def add_adapter(
    endpoint_id: EndpointId, body: AddAdapterBody, context: CurrentContext, key: AdminKey
) -> dict[str, Any]:
    endpoint = context.registry.find(endpoint_id, key)
    adapter = AdapterSettings(route=body.route, source=body.source, scale=body.scale)
    return (await context.adapters.add(endpoint, adapter, overwrite=body.replace)).shown()


@router.put(
    f"{PATH}/{{route}}",
    summary="Upload an adapter",
    response_model=AdapterView,
    responses={**_ERRORS, **{status: answers.ERRORS[status] for status in (408, 409, 413, 415, 422, 507)}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {UPLOAD_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload_adapter(
    endpoint_id: EndpointId,
    route: Annotated[str, Path(pattern=f"^{ID_PATTERN}$", description="The name after the colon.")],
    request: Request,
    context: CurrentContext,
    key: AdminKey,
    name: Annotated[str, Query(max_length=200, description="The file's own name.")] = WEIGHTS,
    scale: Annotated[float, between("adapter scale"), Query(description="1 is as trained.")] = 1.0,
    replace: Annotated[bool, Query(description="Take the place of a route that exists.")] = False,
    peft_config: Annotated[
        str | None, Query(max_length=20_000, description="PEFT's adapter_config.json, which has alpha.")
    ] = None,
) -> dict[str, Any]:
    """The body is the safetensors file. It is checked as any other source is."""
    endpoint = context.registry.find(endpoint_id, key)
    most = context.adapters.require_room_for(endpoint, route, overwrite=replace)
    name = _plain_name(name)
    folder = new_scratch(context.adapters.table.folder)
    file = folder / (name if peft_config is None else hub.PEFT_WEIGHTS)
    try:
        await receive_file(request, file, most, context.settings.body_timeout_s)
        if peft_config is not None:
            file.with_name(hub.PEFT_CONFIG).write_text(peft_config, encoding="utf-8")
        adapter = AdapterSettings(route=route, source=f"upload of {name}", scale=scale)
        added = await context.adapters.add(endpoint, adapter, overwrite=replace, upload=file)
    finally:
        await FILES.run(shutil.rmtree, folder, True)
    return added.shown()


def _plain_name(name: str) -> str:
    """The last part of a client's file name, of characters that are harmless in every file system."""
    last = re.sub(r"[^A-Za-z0-9._ -]", "_", re.split(r"[/\\]", name)[-1])[-MAX_NAME:]
    return last if last.strip("._ -") else WEIGHTS


async def receive_file(request: Request, file: FilePath, most: int, timeout_s: float) -> None:
    """Writes a body to a file as it comes, for it may be large; `timeout_s` is from piece to piece."""
    too_large = BodyTooLargeError(
        f"the file is larger than {most} bytes, which an adapter of this endpoint may have; let the server's "
        "owner raise adapter_bytes"
    )
    announced, size = request.headers.get("content-length", ""), 0
    if announced.isdigit() and int(announced) > most:
        raise too_large
    try:
        with file.open("wb") as written:
            async with asyncio.timeout(timeout_s) as limit:
                async for piece in request.stream():
                    size += len(piece)
                    if size > most:
                        raise too_large
                    await FILES.run(written.write, piece)
                    limit.reschedule(asyncio.get_running_loop().time() + timeout_s)
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        raise BodyTimeoutError(f"no part of the file came for {timeout_s:g} s; send it again") from None
    except OSError as error:
        raise StorageFullError(
            f"the file could not be kept ({error.strerror}); tell the server's owner"
        ) from None


@router.delete(
    f"{PATH}/{{route}}",
    summary="Remove an adapter",
    response_model=AdapterView,
    responses={**_ERRORS, 409: answers.ERRORS[409]},
)
async def remove_adapter(
    endpoint_id: EndpointId, route: str, context: CurrentContext, key: AdminKey
) -> dict[str, Any]:
    """Those of the built-in model stay; what took the place of one gives it back."""
    endpoint = context.registry.find(endpoint_id, key)
    return (await context.adapters.remove(endpoint, route)).shown()


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
