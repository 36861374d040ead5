"""Keys over HTTP: who is asking; and for admins to list, make and revoke keys."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path
from pydantic import BaseModel, ConfigDict, Field

from mezzotint.errors import ConflictError, InvalidRequestError
from mezzotint.server.api import answers
from mezzotint.server.api.context import AdminKey, CurrentContext, CurrentKey
from mezzotint.server.api.strict import StrictRoute
from mezzotint.server.store import keys
from mezzotint.server.store.keys import Key
from mezzotint.server.threads import DATABASE

PATH = "/dedicated/beta/keys"
_ERRORS: dict[int | str, dict[str, Any]] = {status: answers.ERRORS[status] for status in (401, 403, 503)}

router = APIRouter(tags=["Keys"], route_class=StrictRoute)


class KeyView(BaseModel):
    """A key without its secret."""

    id: str
    name: str
    admin: bool
    endpoints: list[str] = Field(description="Those that it may use; empty: every one.")
    limits: dict[str, float | None]
    created: float
    revoked: float | None = Field(description="When it was revoked; null while it lives.")

    @classmethod
    def values_of(cls, key: Key) -> dict[str, Any]:
        return dataclasses.asdict(key) | {"endpoints": list(key.endpoints)}


class KeyList(BaseModel):
    data: list[KeyView]


class NewKeyBody(BaseModel):
    """A key to be made."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"name": "website"}})

    name: str
    admin: bool = False
    endpoints: list[str] = Field([], max_length=1000, description="Those that it may use; empty: every one.")


class NewKey(KeyView):
    """A key that has just been made."""

    secret: str = Field(description="What clients send. It is not stored and cannot be shown again.")


@router.get(
    "/dedicated/v1/key", summary="Who is asking", response_model=KeyView, responses={401: _ERRORS[401]}
)
async def own_key(key: CurrentKey) -> dict[str, Any]:
    """The key of this request, without its secret."""
    return KeyView.values_of(key)


@router.get(PATH, summary="List keys", response_model=KeyList, responses=_ERRORS)
async def list_keys(context: CurrentContext, admin: AdminKey) -> dict[str, Any]:
    found = await DATABASE.run(keys.list_keys, context.engine)
    return {"data": [KeyView.values_of(key) for key in found]}


@router.post(
    PATH,
    summary="Make a key",
    response_model=NewKey,
    responses={**_ERRORS, 409: answers.ERRORS[409], 422: answers.ERRORS[422]},
)
async def create_key(body: NewKeyBody, context: CurrentContext, admin: AdminKey) -> dict[str, Any]:
    """The answer has the key's secret, once."""
    try:
        await DATABASE.run(keys.require_endpoints, context.engine, body.endpoints)
        make = partial(keys.create_key, admin=body.admin, endpoints=body.endpoints)
        key, secret = await DATABASE.run(make, context.engine, body.name)
    except InvalidRequestError as error:  # it speaks of the command's flags
        text = error.message.removeprefix("--")
        raise InvalidRequestError(text, code=error.code, param=error.param) from None
    return KeyView.values_of(key) | {"secret": secret}


@router.delete(
    PATH + "/{key_id}",
    summary="Revoke a key",
    response_model=KeyView,
    responses={**_ERRORS, 404: answers.ERRORS[404], 409: answers.ERRORS[409]},
)
async def revoke_key(
    key_id: Annotated[str, Path(description="ID of the key.")], context: CurrentContext, admin: AdminKey
) -> dict[str, Any]:
    """Ends the key at once. The key that asks cannot revoke itself, so that an admin is left."""
    if key_id in (admin.id, admin.name):
        raise ConflictError("this is the key that asks; revoke it with another admin key")
    return KeyView.values_of(await DATABASE.run(keys.revoke_key, context.engine, key_id))


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
