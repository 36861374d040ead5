"""The admin routes of adapters: list, add, remove. Only an admin key may call them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path
from pydantic import BaseModel, ConfigDict, Field

from mezzotint.config import AdapterSettings
from mezzotint.server.api import answers
from mezzotint.server.api.context import AdminKey, CurrentContext
from mezzotint.server.api.strict import StrictRoute

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
