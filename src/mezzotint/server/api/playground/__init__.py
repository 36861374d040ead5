"""The playground: the page at `/`, its files, and the pictures that a key has made."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.staticfiles import StaticFiles

from mezzotint.server.api import answers
from mezzotint.server.api.context import CurrentContext, CurrentKey
from mezzotint.server.threads import DATABASE

FILES = Path(__file__).parent / "page"
MAX_PAGE = 100
_PAGE_HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
}

router = APIRouter()


class PageFiles(StaticFiles):
    """The page's files; browsers ask each time whether they still have the right ones."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["cache-control"] = "no-cache"
        return response


class StoredPicture(BaseModel):
    """A picture that the server keeps; `parameters` are the fields of the request that gives it again."""

    name: str
    url: str
    created: float
    parameters: dict[str, Any]
    starred: bool = Field(description="Whether it is kept for good.")


class PictureChange(BaseModel):
    """What can be changed of a stored picture."""

    model_config = ConfigDict(extra="forbid")

    starred: bool = Field(description="Starred pictures are kept, however many newer ones there are.")


class StoredPictures(BaseModel):
    """Newest first; `has_more` tells that older ones can be asked for with `before`."""

    data: list[StoredPicture]
    has_more: bool


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    return FileResponse(FILES / "index.html", headers=_PAGE_HEADERS)


@router.get(
    "/dedicated/v1/images",
    summary="The pictures that this key has made and the server keeps",
    tags=["Images"],
    responses={status: answers.ERRORS[status] for status in (401, 404, 422, 503)},
)
async def pictures(
    request: Request,
    context: CurrentContext,
    key: CurrentKey,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most pictures in the answer.")] = 24,
    before: Annotated[str | None, Query(description="Name of a picture; older ones follow.")] = None,
    search: Annotated[
        str, Query(max_length=200, description="Words that prompt, model, seed or size must have.")
    ] = "",
    starred: Annotated[bool, Query(description="Only starred pictures.")] = False,
) -> StoredPictures:
    """Those asked for as `url`; the newest stay when their URLs have expired. The URLs here are fresh."""
    await context.pictures.listed(key.id)
    found = await DATABASE.run(
        partial(context.pictures.list, key.id, limit + 1, before, search=search, starred=starred)
    )
    base = context.base_url(request)
    data = [
        StoredPicture(
            name=item.name,
            url=context.pictures.url(base, item.name),
            created=item.created,
            parameters=item.parameters,
            starred=item.starred,
        )
        for item in found[:limit]
    ]
    return StoredPictures(data=data, has_more=len(found) > limit)


@router.patch(
    "/dedicated/v1/images/{name}",
    summary="Star one of this key's pictures",
    tags=["Images"],
    status_code=204,
    responses={status: answers.ERRORS[status] for status in (401, 404, 409, 422, 503)},
)
async def star_picture(name: str, body: PictureChange, context: CurrentContext, key: CurrentKey) -> Response:
    """Starred pictures stay when newer ones come; each key may star `max_starred` of them."""
    await context.pictures.listed(key.id)
    await DATABASE.run(context.pictures.star, name, key.id, body.starred)
    return Response(status_code=204)


@router.delete(
    "/dedicated/v1/images/{name}",
    summary="Delete one of this key's pictures",
    tags=["Images"],
    status_code=204,
    responses={status: answers.ERRORS[status] for status in (401, 404, 503)},
)
async def delete_picture(name: str, context: CurrentContext, key: CurrentKey) -> Response:
    """Its URLs end at once."""
    await context.pictures.listed(key.id)
    await DATABASE.run(context.pictures.remove, name, key.id)
    return Response(status_code=204)


def install(app: FastAPI) -> None:
    """Adds the page, its files and these routes to the app."""
    app.include_router(router)
    app.mount("/playground", PageFiles(directory=FILES), name="playground")
