"""Events to bytes (server-sent events), and a client's absence noticed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive

HEARTBEAT_S = 10.0
"""A comment goes out when nothing else did for this long, so that proxies keep the connection."""
MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

Result = TypeVar("Result")


class ClientGone(Exception):
    """The client has closed its connection; nobody reads the answer."""


def event(name: str | None, data: Any) -> bytes:
    """One event; `name` None leaves the type out."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    body = "".join(f"data: {line}\n" for line in text.split("\n"))
    return f"{head}{body}\n".encode()


def comment(text: str) -> bytes:
    """A line that clients skip."""
    return f": {' '.join(text.split())}\n\n".encode()


async def with_heartbeat(events: AsyncIterator[bytes], every_s: float = HEARTBEAT_S) -> AsyncIterator[bytes]:
    """The same bytes, with a comment whenever nothing came for `every_s`."""
    iterator = aiter(events)
    pending = asyncio.ensure_future(anext(iterator))
    try:
        while True:
            done, _ = await asyncio.wait({pending}, timeout=every_s)
            if not done:
                yield comment("still here")
                continue
            try:
                chunk = pending.result()
            except StopAsyncIteration:
                return
            yield chunk
            pending = asyncio.ensure_future(anext(iterator))
    finally:
        pending.cancel()
        await asyncio.gather(pending, return_exceptions=True)


def stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    """The response for a generator of event bytes; it ends the generator when the client goes."""
    return StreamingResponse(with_heartbeat(events), media_type=MEDIA_TYPE, headers=HEADERS)


async def or_gone(receive: Receive, work: Coroutine[Any, Any, Result], on_gone: Callable[[], None]) -> Result:
    """The result of `work`, or ClientGone (after `on_gone`) when the client hangs up first.

    The request's body must have been read. Plain handlers are not told of a disconnect, hence the watching.
    """
    watching = asyncio.ensure_future(_disconnected(receive))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watching, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    except (ClientGone, asyncio.CancelledError):
        on_gone()
        raise
    finally:
        for task in (watching, working):
            task.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
