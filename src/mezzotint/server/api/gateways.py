"""Several servers ("gateways") behind one balancer find each other's requests, and take over a dead one's.

A request runs where it was accepted. The gateway writes it down in Postgres first. A gateway that is asked
about another's request, by its id or its Idempotency-Key, sends the question on and the answer back. When the
owner has died, the request becomes that of the gateway that notices first, and runs there again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import structlog
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.responses import FileResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mezzotint import hub
from mezzotint.errors import MezzotintError, UnavailableError
from mezzotint.server.api import sse
from mezzotint.server.api.context import Context, caller_of
from mezzotint.server.api.disconnect import or_gone
from mezzotint.server.api.submissions import MAX_IDEMPOTENCY_KEY, parse_prefer
from mezzotint.server.store import database, keys
from mezzotint.server.store.adapter_files import copy_source, new_scratch
from mezzotint.server.store.adapters import Adapter
from mezzotint.server.store.gateways import DEAD_AFTER_S, Accepted, Kept, Ledger, Place
from mezzotint.server.store.keys import Key
from mezzotint.server.store.signing import Signer
from mezzotint.server.threads import DATABASE, FILES, SOURCES, Threads
from mezzotint.server.work.tickets import Answer, Finished, Ticket

HEADER = "x-mezzotint-gateway"
"""On what one gateway sends to another; its value is the internal token."""
BEAT_EVERY_S = 1.0
LOOK_AGAIN_S = 0.1
UNREACHABLE_S = 2 * DEAD_AFTER_S
"""After this long an owner that lives and does not answer is given up."""
CONNECT_S = 2.0
QUIET_S = 3 * sse.HEARTBEAT_S
"""After this long without a byte an answer on its way is given up."""
KEPT_BYTES = 2**18
"""Largest answer that is kept in the database for when its server dies."""
AGAIN_S = 300.0
"""How long a request that was taken over tries to be let in."""
PICTURE_PATHS = (
    "/dedicated/v1/images/generations", "/dedicated/v1/images/edits", "/v1/images/generations",
    "/v1/images/edits", "/v1/images/variations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img",
)  # fmt: skip
REQUEST_PATH = re.compile(r"/dedicated/v1/requests/(req_[0-9a-f]+)(/events)?")
FILES_PATH = "/gateways/adapters"
"""Where one gateway gets adapter files of another; for everybody else there is nothing."""
_FILE_PATH = re.compile(FILES_PATH + r"/([0-9a-f]{64})/([a-z_]+\.(?:safetensors|json))")
_KEPT_HEADERS = ("content-type", "host", "idempotency-key", "prefer", "x-request-timeout-s")
_SECONDS = ("queue_s", "generate_s", "encode_s")
_NOTICE_DEAD_MACHINES = [
    (level, getattr(socket, name), value)
    for level, name, value in (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 3),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 3),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
    )
    if hasattr(socket, name)
]
"""A connection to a machine that has gone ends after UNREACHABLE_S, where the system can do that."""
_HOP_BY_HOP = ("connection", "date", "keep-alive", "server", "transfer-encoding")

Result = TypeVar("Result")
log = structlog.get_logger(__name__)


class Gateways:
    """This server as one of several. All methods run in the event loop."""

    def __init__(self, app: FastAPI, context: Context, signer: Signer) -> None:
        """`signer` is the one that all servers on the database share."""
        self._app = app
        self._context = context
        self._tickets = context.admission.tickets
        self._ledger = Ledger(context.engine)
        self._token = signer.gateway_token()
        self._heart = Threads("heartbeat", 1, DEAD_AFTER_S)
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=CONNECT_S),  # `_forwarded` has limits of its own
            trust_env=False,
            transport=httpx2.AsyncHTTPTransport(socket_options=_NOTICE_DEAD_MACHINES),
        )
        self._arriving: set[str] = set()
        """Requests that are written down and not yet let in or refused; see `_settled`."""
        self._told: set[str] = set()
        """Those whose end is written down."""
        self._forwards: set[tuple[str, asyncio.Timeout]] = set()
        """Owners whose answers are on their way, and what ends the wait when the owner has died."""
        self._again: set[asyncio.Task[None]] = set()
        self.inner: ASGIApp | None = None
        """The app below this middleware, for requests that run again; `Forwarding` sets it."""

    # ------------------------------------------------------------ life

    @contextlib.asynccontextmanager
    async def living(self, url: str) -> AsyncIterator[None]:
        """While the block runs the others may reach this gateway, and it takes over what dead ones left."""
        await self._heart.run(self._ledger.beat, url)
        lives = (self._beat(url), self._upkeep(), self._follow())
        tasks = [asyncio.create_task(each) for each in lives]
        try:
            yield
        finally:
            for task in (*tasks, *self._again):
                task.cancel()
            await asyncio.gather(*tasks, *self._again, return_exceptions=True)
            with contextlib.suppress(SQLAlchemyError, UnavailableError):
                await self._tell_ends()
                await DATABASE.run(self._ledger.leave)
            await self._http.aclose()

    async def _beat(self, url: str) -> None:
        while True:
            await asyncio.sleep(BEAT_EVERY_S)
            try:
                await self._heart.run(self._ledger.beat, url)
            except (SQLAlchemyError, UnavailableError) as error:
                log.error("other servers cannot be told that this one lives", error=str(error))

    async def _upkeep(self) -> None:
        while True:
            try:
                await self._tell_ends()
                await self._give_up_on_the_dead()
                known = {*self._tickets.by_id, *self._arriving}
                await DATABASE.run(self._ledger.tidy, known, self._tickets.ttl_s)
                for place in await DATABASE.run(self._ledger.orphans):
                    await self._take_over(place)
            except (SQLAlchemyError, UnavailableError) as error:
                log.error("other servers' requests cannot be looked at", error=str(error))
            await asyncio.sleep(BEAT_EVERY_S)

    async def _follow(self) -> None:
        """Takes over what other servers have changed of endpoints and adapters."""
        context = self._context
        while True:
            try:
                await context.registry.follow(context.settings.drain_s)
                await context.adapters.follow(context.registry, self.fetch)
            except (SQLAlchemyError, MezzotintError) as error:
                log.error("other servers' changes cannot be followed", error=str(error))
            await asyncio.sleep(BEAT_EVERY_S)

    async def _tell_ends(self) -> None:
        """Writes down what has ended; what ended because this server stops stays open for another one."""
        self._told &= self._tickets.by_id.keys()
        for ticket in list(self._tickets.by_id.values()):
            if ticket.ended and ticket.id not in self._told and not _is_stopped(ticket):
                await DATABASE.run(self._ledger.end, ticket.id, ticket.status, await self._kept(ticket))
                self._told.add(ticket.id)

    async def _kept(self, ticket: Ticket) -> Kept | None:
        """The answer, if it is small and another server could give it just as well."""
        answer = ticket.answer
        if answer is None or not (ticket.promised and answer.is_json and len(answer.content) <= KEPT_BYTES):
            return None
        if ticket.stored and not self._context.pictures.storage.is_shared():
            return None  # it names pictures that are here
        content = b"".join([piece async for piece in answer.pieces()])
        seconds = {name: getattr(answer, name) for name in _SECONDS}
        return Kept(content, seconds | {"warnings": ticket.warnings})

    async def _give_up_on_the_dead(self) -> None:
        """Ends the wait for answers of servers that have died without closing their connections."""
        if not self._forwards:
            return
        living = await DATABASE.run(self._ledger.living)
        for each in list(self._forwards):
            if each[0] not in living:
                self._forwards.discard(each)
                each[1].reschedule(asyncio.get_running_loop().time())

    # ------------------------------------------------------------ requests for pictures

    async def accept(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs a new request here, or sends it to the gateway that has the request it repeats."""
        headers, key, request_id = Headers(scope=scope), scope["state"]["key"], scope["state"]["request_id"]
        body = (await receive()).get("body", b"")  # all of it: BodyReader has read it
        name = headers.get("idempotency-key")
        if name is not None and not 1 <= len(name) <= MAX_IDEMPOTENCY_KEY:
            await self._run(scope, body, receive, send)  # it is refused
            return
        promised = name is not None or parse_prefer(headers.get("prefer")).respond_async
        kept = {each: headers[each] for each in _KEPT_HEADERS if each in headers} | self._trace_headers()
        request = Accepted(request_id, key.id, name, scope["path"], kept, body if promised else None)
        self._arriving.add(request_id)
        try:
            own = await self._claimed(request, scope, receive, send, body)
            if own is not None:
                await self._run(scope, body, receive, send)
                if own and request_id not in self._tickets.by_id:  # refused, or it has joined another one
                    await _database(self._ledger.drop, request_id)
        finally:
            self._arriving.discard(request_id)

    async def _claimed(
        self, request: Accepted, scope: Scope, receive: Receive, send: Send, body: bytes
    ) -> bool | None:
        """True: it is new, and this gateway's. False: it joins one here. None: it was answered elsewhere."""
        async for _ in _for_a_while():
            twin = self._tickets.by_idempotency.get((request.key_id, request.idempotency_key or ""))
            if twin is not None and twin.joinable:
                return False
            if twin is not None:
                await _database(self._ledger.end, twin.id, twin.status)
            place = await _database(self._ledger.claim, request)
            if place is None:
                return True
            if place.owner == self._ledger.id:
                await self._settled(place.id)
                if place.id not in self._tickets.by_id:
                    await _database(self._ledger.drop, place.id)
            elif place.url is None:
                await self._take_over(place)
            elif self._is_forwarded(scope):
                return False
            elif await self._forwarded(place.owner, place.url, scope, receive, send, body):
                return None
        raise _unreachable()

    # ------------------------------------------------------------ questions about requests

    async def find(self, request_id: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a question about a request here, or at the gateway that has it."""
        if request_id not in self._tickets.by_id and not self._is_forwarded(scope):
            key = scope["state"]["key"] = await caller_of(scope)
            if await self._found_elsewhere(request_id, key, scope, receive, send):
                return
        await self._below(scope, receive, send)

    async def _found_elsewhere(
        self, request_id: str, key: Key, scope: Scope, receive: Receive, send: Send
    ) -> bool:
        async for _ in _for_a_while():
            place = await _database(self._ledger.find, request_id, key.id)
            if place is None:
                return False
            if place.owner == self._ledger.id:
                await self._settled(request_id)
                return False
            if place.url is None:
                if not place.may_run_again:
                    return False
                await self._take_over(place)
            elif await self._forwarded(place.owner, place.url, scope, receive, send, b""):
                return True
        raise _unreachable()

    # ------------------------------------------------------------ forwarding

    def _is_forwarded(self, scope: Scope) -> bool:
        """Whether another gateway has sent this, which must not travel further."""
        return hmac.compare_digest(Headers(scope=scope).get(HEADER, "").encode(), self._token.encode())

    async def _forwarded(
        self, owner: str, url: str, scope: Scope, receive: Receive, send: Send, body: bytes
    ) -> bool:
        """Sends a request to another gateway and its answer back; False if that gateway does not answer.

        A new request may take as long as its owner lives. The answer to a question is there at once.
        """
        query = scope["query_string"].decode()
        target = url + scope["path"] + (f"?{query}" if query else "")
        dropped = (*_HOP_BY_HOP, "content-length", "accept-encoding")
        own = self._trace_headers() | {HEADER: self._token}
        headers = [
            (name, value) for name, value in Headers(scope=scope).items() if name not in {*dropped, *own}
        ]
        request = self._http.build_request(
            scope["method"], target, headers=[*headers, *own.items()], content=body
        )
        begin_s = None if scope["method"] == "POST" else UNREACHABLE_S
        try:
            async with self._while_it_lives(owner), asyncio.timeout(begin_s):
                answer = await or_gone(receive, self._http.send(request, stream=True))
        except (httpx2.TransportError, TimeoutError) as error:
            log.warning("another server cannot be reached", url=url, error=type(error).__name__)
            return False
        try:
            response = StreamingResponse(_pieces(answer), answer.status_code)
            response.raw_headers = [
                (name.lower(), value)
                for name, value in answer.headers.raw
                if name.lower().decode("latin-1") not in _HOP_BY_HOP
            ]
            async with self._while_it_lives(owner):
                await response(scope, receive, send)
        except (httpx2.TransportError, TimeoutError):
            raise _unreachable() from None  # the head is out, so the connection ends too early
        finally:
            await answer.aclose()
        return True

    def _trace_headers(self) -> dict[str, str]:
        """What hands the current trace on; nothing without tracing."""
        tracing = self._context.tracing
        return {} if tracing is None else tracing.headers()

    @contextlib.asynccontextmanager
    async def _while_it_lives(self, owner: str) -> AsyncIterator[None]:
        """TimeoutError when the gateway is found dead before the block has ended."""
        async with asyncio.timeout(None) as limit:
            self._forwards.add((owner, limit))
            try:
                yield
            finally:
                self._forwards.discard((owner, limit))

    # ------------------------------------------------------------ adapter files

    async def fetch(self, adapter: Adapter, max_bytes: int) -> bool:
        """Gets an adapter's file, of at most so many bytes, from a gateway that has it; whether one had."""
        folder = self._context.adapters.table.folder
        weights = adapter.path.name
        names = (weights, hub.PEFT_CONFIG) if weights == hub.PEFT_WEIGHTS else (weights,)
        for url in await DATABASE.run(self._ledger.others):
            place = f"{url}{FILES_PATH}/{adapter.path.parent.name}"
            scratch = await FILES.run(new_scratch, folder)
            try:
                for name in names:
                    await self._download(f"{place}/{name}", scratch / name)
                copy = await SOURCES.run(copy_source, str(scratch / weights), folder, max_bytes)
                if copy.path == adapter.path:  # the folder is named by what is in it
                    return True
                log.error("another server's file is not the adapter", url=url, route=adapter.route)
            except (httpx2.HTTPError, TimeoutError, OSError, MezzotintError) as error:
                log.warning("another server does not give an adapter's file", url=url, error=str(error))
            finally:
                await FILES.run(shutil.rmtree, scratch, True)
        return False

    async def _download(self, url: str, file: Path) -> None:
        async with self._http.stream("GET", url, headers={HEADER: self._token}) as answer:
            answer.raise_for_status()
            with file.open("wb") as written:
                async for piece in _pieces(answer):
                    await FILES.run(written.write, piece)

    async def give_file(self, folder: str, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends another gateway an adapter's file."""
        path = self._context.adapters.table.folder / folder / name
        if self._is_forwarded(scope) and path.is_file():
            await FileResponse(path)(scope, receive, send)
        else:
            await self._below(scope, receive, send)  # where there is no such address

    # ------------------------------------------------------------ taking over

    async def _take_over(self, place: Place) -> None:
        """Runs a dead gateway's request here, unless another gateway was first."""
        if place.id in self._arriving:
            return
        self._arriving.add(place.id)
        request = None
        try:
            request = await _database(self._ledger.take_over, place)
        finally:
            if request is None:
                self._arriving.discard(place.id)
        if request is not None:
            log.warning("request taken over from a dead server", request=place.id, owner=place.owner)
            task = asyncio.create_task(self._run_again(request))
            self._again.add(task)
            task.add_done_callback(self._again.discard)

    async def _run_again(self, request: Accepted) -> None:
        """Runs it as if it came now, under its own id, until it is let in or refused for good."""
        try:
            async with asyncio.timeout(AGAIN_S) as patience:
                while (status := await self._replay(request, patience)) in (429, 503):
                    if request.id in self._tickets.by_id:  # it was let in, and that is how it ended
                        break
                    await asyncio.sleep(BEAT_EVERY_S)
            if request.id not in self._tickets.by_id:
                log.error("request cannot run again", request=request.id, status=status)
                await DATABASE.run(self._ledger.drop, request.id)
        except TimeoutError:
            log.error("request was not let in again", request=request.id)
        except (MezzotintError, SQLAlchemyError) as error:
            log.error("request cannot run again", request=request.id, error=str(error))
        finally:
            self._arriving.discard(request.id)

    async def _replay(self, request: Accepted, patience: asyncio.Timeout) -> int:
        key = await DATABASE.run(keys.live_key, self._context.engine, request.key_id)
        status, given = 0, False

        async def receive() -> Message:
            nonlocal given
            if given:
                await self._settled(request.id)
                patience.reschedule(None)  # it was let in, and now has its own deadline
                await asyncio.Event().wait()  # nobody hangs up
            given = True
            return {"type": "http.request", "body": request.body or b"", "more_body": False}

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        headers = [(name.encode(), value.encode("latin-1")) for name, value in request.headers.items()]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": request.path,
            "raw_path": request.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": None,
            "server": None,
            "app": self._app,
            "state": {
                "request_id": request.id,
                "arrived": asyncio.get_running_loop().time(),
                "key": key,
                "finished": None if request.kept is None else _finished(request.kept),
            },
        }
        tracing = self._context.tracing
        with (
            structlog.contextvars.bound_contextvars(request_id=request.id),
            contextlib.nullcontext() if tracing is None else tracing.continued(request.headers),
        ):
            await self._below(scope, receive, send)
        return status

    # ------------------------------------------------------------ the app below

    async def _settled(self, request_id: str) -> None:
        """Waits until a request that this gateway has written down is let in or refused."""
        while request_id in self._arriving and request_id not in self._tickets.by_id:
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        given = False

        async def replayed() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._below(scope, replayed, send)

    async def _below(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self.inner is not None, "Forwarding sets it before there is a request"
        await self.inner(scope, receive, send)


class Forwarding:
    """Middleware below BodyReader: requests, and questions about them, go to the gateway that has them."""

    def __init__(self, app: ASGIApp, gateways: Gateways) -> None:
        self._app = app
        self._gateways = gateways
        gateways.inner = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["method"] == "POST" and scope["path"] in PICTURE_PATHS:
                await self._gateways.accept(scope, receive, send)
                return
            found = REQUEST_PATH.fullmatch(scope["path"])
            if found is not None:
                await self._gateways.find(found[1], scope, receive, send)
                return
            file = _FILE_PATH.fullmatch(scope["path"])
            if file is not None:
                await self._gateways.give_file(file[1], file[2], scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _database(work: Callable[..., Result], *arguments: Any) -> Result:
    try:
        return await DATABASE.run(work, *arguments)
    except SQLAlchemyError as error:
        raise database.unavailable(error) from None


async def _for_a_while() -> AsyncIterator[None]:
    until = asyncio.get_running_loop().time() + UNREACHABLE_S
    while asyncio.get_running_loop().time() < until:
        yield
        await asyncio.sleep(LOOK_AGAIN_S)


async def _pieces(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """The pieces of a body. TimeoutError when none comes for so long that an event stream is dead, too."""
    pieces = answer.aiter_raw()
    while True:
        async with asyncio.timeout(QUIET_S):
            piece = await anext(pieces, None)
        if piece is None:
            return
        yield piece


def _finished(kept: Kept) -> Finished:
    seconds = {name: kept.facts[name] for name in _SECONDS}
    return Finished(Answer(kept.content, **seconds), tuple(kept.facts["warnings"]))


def _is_stopped(ticket: Ticket) -> bool:
    return ticket.promised and ticket.error is not None and ticket.error.code == "server_stopping"


def _unreachable() -> UnavailableError:
    return UnavailableError(
        f"the server that has this request did not answer within {UNREACHABLE_S:g} s; "
        "ask again in a moment, or have its owner check gateway_url",
        code="gateway_unreachable",
        retry_after=DEAD_AFTER_S,
    )
