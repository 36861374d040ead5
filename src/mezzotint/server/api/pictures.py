"""Stored pictures behind signed URLs."""

from __future__ import annotations

import contextlib
import re
import time
from email.utils import formatdate
from pathlib import PurePath

import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mezzotint.errors import MezzotintError
from mezzotint.schemas import ErrorBody
from mezzotint.server.api.context import CurrentContext
from mezzotint.server.store import pictures

router = APIRouter()
_ONE_RANGE = re.compile(r"bytes=(?:(?P<first>[0-9]{1,12})-(?P<last>[0-9]{1,12})?|-(?P<suffix>[0-9]{1,12}))")
log = structlog.get_logger(__name__)


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
        503: {"model": ErrorBody, "description": "The storage of pictures does not answer."},
    },
)
async def picture(
    request: Request, name: str, context: CurrentContext, expires: str = "", signature: str = ""
) -> Response:
    """The URL is the permission: no key is asked for, the signature and the expiry are checked."""
    file = await context.pictures.find(name, expires, signature)
    etag = f'"{PurePath(name).stem}"'  # a name is given once, and its file never changes
    headers = {
        "accept-ranges": "bytes",
        "cache-control": f"private, max-age={max(0, int(file.expires - time.time()))}, immutable",
        "etag": etag,
        "last-modified": formatdate(file.stored.modified, usegmt=True),
    }
    asked = request.headers
    known = [each.strip().removeprefix("W/") for each in asked.get("if-none-match", "").split(",")]
    if etag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    whole = range(file.stored.size)
    part = _part(asked.get("range", ""), whole)
    if part is None or asked.get("if-range", etag) not in (etag, headers["last-modified"]):
        return PictureResponse(file, whole, 200, headers)
    if not part:
        return Response(status_code=416, headers=headers | {"content-range": f"bytes */{len(whole)}"})
    headers["content-range"] = f"bytes {part.start}-{part.stop - 1}/{len(whole)}"
    return PictureResponse(file, part, 206, headers)


def _part(header: str, whole: range) -> range | None:
    """The bytes that a Range header asks for; empty when they lie beyond the end.

    None for any form but one range, which counts as absent, as RFC 9110 allows.
    """
    match = _ONE_RANGE.fullmatch(header)
    if match is None:
        return None
    if match["suffix"] is not None:
        return whole[max(0, len(whole) - int(match["suffix"])) :]
    first = int(match["first"])
    if match["last"] is None:
        return whole[first:]
    return whole[first : int(match["last"]) + 1] if first <= int(match["last"]) else None


class PictureResponse(Response):
    """Sends a part of a picture as it is read. The first piece is read before the answer begins.

    So a storage that does not answer is an error body. When it fails later, the connection is closed before
    all that was announced is sent, which every client notices.
    """

    def __init__(self, file: pictures.PictureFile, part: range, status: int, headers: dict[str, str]) -> None:
        super().__init__(status_code=status, headers=headers, media_type=file.media_type)
        self.headers["content-length"] = str(len(part))
        self._pieces = file.stored.pieces(part.start, part.stop)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        async with contextlib.aclosing(self._pieces) as pieces:
            if scope["method"] == "HEAD":
                await send(head)
            else:
                try:
                    first = await anext(pieces)
                except FileNotFoundError:  # removed since it was found
                    raise pictures.gone() from None
                await send(head)
                await send(_body(first))
                try:
                    async for piece in pieces:
                        await send(_body(piece))
                except (MezzotintError, OSError) as error:
                    log.warning("picture broken off in the middle", reason=str(error))
                    return
            await send({"type": "http.response.body", "body": b""})


def _body(piece: bytes) -> Message:
    return {"type": "http.response.body", "body": piece, "more_body": True}


def install(app: FastAPI) -> None:
    """Adds these routes to the app."""
    app.include_router(router)
