"""Stored pictures behind signed URLs."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, FastAPI
from fastapi.responses import Response

from mezzotint.schemas import (
    ErrorBody,
)
from mezzotint.server.api.context import CurrentContext
from mezzotint.server.store import storage

router = APIRouter()


@router.get(
    storage.PATH + "{name}",
    summary="Fetch a stored picture",
    tags=["Images"],
    response_class=Response,
    responses={
        200: {"content": {"image/png": {}}, "description": "The picture."},
        403: {"model": ErrorBody, "description": "The signature is not valid."},
        404: {"model": ErrorBody, "description": "There is no such picture."},
        410: {"model": ErrorBody, "description": "The URL has expired."},
    },
)
async def picture(name: str, context: CurrentContext, expires: str = "", signature: str = "") -> Response:
    """The URL is the permission: no key is asked for, the signature and the expiry are checked."""
    data, media_type = await asyncio.to_thread(context.storage.read, name, expires, signature)
    headers = {"cache-control": "private, max-age=3600, immutable"}
    return Response(data, media_type=media_type, headers=headers)


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
