"""Pure ASGI middleware: headers for every response, and checks before a route sees the request.

(Function middleware would hide a client's disconnect from the routes, so there is none.)
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mezzotint.config import Settings, is_loopback
from mezzotint.errors import (
    BodyTimeoutError,
    BodyTooLargeError,
    InternalError,
    InvalidRequestError,
    MezzotintError,
    MisdirectedError,
    PermissionDeniedError,
    UnsupportedMediaError,
    echo,
)
from mezzotint.schemas import ErrorBody
from mezzotint.server.store.keys import Key
from mezzotint.server.work.tickets import ClientGone

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
BODY_METHODS = ("POST", "PUT", "PATCH")
FORM_PATHS = ("/v1/images/edits", "/v1/images/variations")
"""Where a body may be a form."""
IMAGE_PATHS = (
    *FORM_PATHS, "/dedicated/v1/images/edits", "/sdapi/v1/img2img", "/sdapi/v1/png-info",
)  # fmt: skip
"""Where a body holds pictures, and so may be larger."""
CONTROL_PATHS = ("/dedicated/v1/images/generations", "/v1/images/generations")
"""Where it may, if an endpoint has ControlNets."""
AMBIGUOUS_LENGTH = "ambiguous_length"
UPLOAD_PATH = re.compile(r"/dedicated/beta/endpoint/[^/]+/adapters/[^/]+")
"""Where the body of a PUT is a file, which the route reads itself once it knows who sends it."""
JSON_TYPE, FORM_TYPE, UPLOAD_TYPE = "application/json", "multipart/form-data", "application/octet-stream"

log = structlog.get_logger(__name__)


def error_response(error: MezzotintError, request_id: str | None, status: int | None = None) -> Response:
    """The one error body, with the headers that belong to it; `status` replaces the error's own."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, -int(-error.retry_after // 1)))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    body = ErrorBody.of(error, request_id).model_dump_json()
    return Response(body, status or error.status, headers, media_type="application/json")


def new_request_id() -> str:
    """`req_`, the time in milliseconds and chance: sortable, unguessable."""
    return f"req_{int(time.time() * 1000):011x}{secrets.token_hex(8)}"


class Envelope:
    """Outermost: request id and security headers on every response."""

    def __init__(self, app: ASGIApp, on_answer: Callable[[Scope, int], None]) -> None:
        self._app = app
        self._on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        state = scope.setdefault("state", {})
        state["request_id"], state["arrived"] = request_id, asyncio.get_running_loop().time()
        began, status = time.perf_counter(), 0

        async def dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("x-request-id", request_id)  # another server's answer has its own
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, dressed)
            finally:
                self._on_answer(scope, status or 499)
                milliseconds = round((time.perf_counter() - began) * 1000, 1)
                log.debug("http", method=scope["method"], path=scope["path"], status=status, ms=milliseconds)


class Refusals:
    """Turns exceptions from the middleware below, and unexpected ones, into answers without a traceback.

    It stands below CORS, so that a page may read these answers as any other. `on_error` counts them.
    """

    def __init__(self, app: ASGIApp, on_error: Callable[[MezzotintError], None]) -> None:
        self._app = app
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
            return
        except ClientGone:
            return
        except MezzotintError as refused:
            error = refused
        except Exception:
            log.exception("defect in a request", method=scope["method"], path=scope["path"])
            error = InternalError("the server made a mistake; its log has the details under this request id")
        if not begun:
            self._on_error(error)
            unclear = error.code == AMBIGUOUS_LENGTH
            response = error_response(error, scope["state"]["request_id"], 400 if unclear else None)
            if unclear:  # nobody knows where the next request begins
                response.headers["connection"] = "close"
            await response(scope, receive, send)


class HostAndOriginGuard:
    """For a server without keys: refuses requests that a browser sends for a foreign page.

    The page's owner may have pointed its name at this machine (DNS rebinding); Host then has that name. Or
    the page asks across origins; Origin then has the page's own.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._public_name: str | None = None
        self._origins = set(settings.cors_origins)
        if settings.public_url:
            public = urlsplit(settings.public_url)
            self._public_name = public.hostname
            self._origins.add(f"{public.scheme}://{public.netloc}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host = headers.get("host", "")
            self._require_own_name(host)
            if scope["method"] not in SAFE_METHODS:
                self._require_own_origin(headers.get("origin"), host)
        await self._app(scope, receive, send)

    def _require_own_name(self, host: str) -> None:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:  # no address at all
            name = None
        if name is None or not (is_loopback(name) or name == self._public_name):
            raise MisdirectedError(
                f"a server without keys answers only as localhost or 127.0.0.1, not as {echo(host)}; "
                "ask it there, or set public_url or leave auth on"
            )

    def _require_own_origin(self, origin: str | None, host: str) -> None:
        if origin is None or {"*", origin} & self._origins or origin.partition("://")[2] == host:
            return
        raise PermissionDeniedError(
            f"a server without keys takes no requests from the pages of {echo(origin)}; "
            "name it in cors_origins, or leave auth on",
            code="forbidden_origin",
        )


class BodyReader:
    """Finds the caller, then reads the whole body, before the routes see the request.

    It checks the body's size, time and type.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        max_image_bytes: int,
        timeout_s: float,
        has_controls: Callable[[], bool],
        identify: Callable[[Scope], Awaitable[Key]],
    ) -> None:
        """`max_image_bytes` holds where a body may have pictures in it.

        `identify` finds the caller by the headers, or raises; nothing of a stranger's body is kept.
        """
        self._app = app
        self._identify = identify
        self._max_bytes = max_bytes
        self._max_image_bytes = max_image_bytes
        self._has_controls = has_controls
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        _require_one_length(headers)
        if scope["method"] not in BODY_METHODS or not _has_route(scope):  # 404 or 405, whatever the body is
            await self._app(scope, receive, send)
            return
        scope["state"]["key"] = await self._identify(scope)
        if scope["method"] == "PUT" and UPLOAD_PATH.fullmatch(path):
            _require_type(headers.get("content-type"), (UPLOAD_TYPE,))
            await self._app(scope, receive, send)
            return
        if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
            _require_type(headers.get("content-type"), (JSON_TYPE, FORM_TYPE)[: 1 + (path in FORM_PATHS)])
        pictures = path in IMAGE_PATHS or (path in CONTROL_PATHS and self._has_controls())
        limit = self._max_image_bytes if pictures else self._max_bytes
        too_large = _too_large(limit, "max_image_body_bytes" if pictures else "max_body_bytes")
        body = await self._read(headers, receive, limit, too_large)
        await self._app(scope, _replay(body, receive), send)

    async def _read(
        self, headers: Headers, receive: Receive, most: int, too_large: BodyTooLargeError
    ) -> bytes:
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > most:
            raise too_large
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self._timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    size, more = size + len(part), message.get("more_body", False)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            raise BodyTimeoutError(
                f"the body had not arrived after {self._timeout_s:g} s; send it at once"
            ) from None
        return b"".join(parts)


def _require_one_length(headers: Headers) -> None:
    """InvalidRequestError for a body that two servers may take for different ones (request smuggling)."""
    if "transfer-encoding" in headers and "content-length" in headers:
        raise InvalidRequestError(
            "the request has Content-Length and Transfer-Encoding; send one of them", code="ambiguous_length"
        )


def _has_route(scope: Scope) -> bool:
    """Whether a route takes this path and method."""
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


def _too_large(most: int, setting: str) -> BodyTooLargeError:
    return BodyTooLargeError(
        f"the body is larger than {most} bytes; send a smaller one, or let the server's owner raise {setting}"
    )


def _require_type(content_type: str | None, known: tuple[str, ...]) -> None:
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind not in known:
        got = echo(content_type) if content_type else "none"
        raise UnsupportedMediaError(
            f"the body must be sent with Content-Type {' or '.join(known)} (got {got})"
        )


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A receive that gives the body once and then the server's own messages, which is the disconnect."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
