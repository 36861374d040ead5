"""Stored pictures behind signed URLs."""

from __future__ import annotations

import re
import time

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, Response

from mezzotint.schemas import ErrorBody
from mezzotint.server import threads
from mezzotint.server.api.context import CurrentContext
from mezzotint.server.store import pictures

router = APIRouter()
_ONE_RANGE = re.compile(r"bytes=(?:(?P<first>[0-9]{1,12})-(?P<last>[0-9]{1,12})?|-[0-9]{1,12})")


@router.head(pictures.PATH + "{name}", include_in_schema=False)
@router.get(
    pictures.PATH + "{name}",
    summary="Fetch a stored picture",
    tags=["Images"],
    response_class=Response,
    responses={
        200: {"content": {"image/png": {}}, "description": "The picture."},
        206: {"content": {"image/png": {}}, "description": "The part that `Range` asked for."},
        304: {"description": "The picture that `If-None-Match` names is the one at this URL."},
        403: {"model": ErrorBody, "description": "The signature is not valid."},
        404: {"model": ErrorBody, "description": "There is no such picture."},
        410: {"model": ErrorBody, "description": "The URL has expired."},
        416: {"description": "The range lies beyond the picture's end."},
    },
)
async def picture(
    request: Request, name: str, context: CurrentContext, expires: str = "", signature: str = ""
) -> Response:
    """The URL is the permission: no key is asked for, the signature and the expiry are checked."""
    file = await threads.FILES.run(context.pictures.find, name, expires, signature)
    etag = f'"{file.path.stem}"'  # a name is given once, and its file never changes
    headers = {
        "cache-control": f"private, max-age={max(0, int(file.expires - time.time()))}, immutable",
        "etag": etag,
    }
    known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    if etag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    if not _is_one_range(request.headers.get("range", "")):
        ignored = [item for item in request.scope["headers"] if item[0] != b"range"]
        request.scope["headers"] = ignored
    return FileResponse(file.path, media_type=file.media_type, headers=headers, stat_result=file.stat)


def _is_one_range(header: str) -> bool:
    """Whether a Range header asks for one range; any other form counts as absent, as RFC 9110 allows."""
    match = _ONE_RANGE.fullmatch(header)
    return match is not None and (match["last"] is None or int(match["first"]) <= int(match["last"]))


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
