"""Server-sent events: events to bytes, and the response that streams them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

HEARTBEAT_S = 10.0
"""A comment goes out when nothing else did for this long, so that proxies keep the connection."""
MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


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


class _Stream(StreamingResponse):
    def __init__(self, events: AsyncIterator[bytes], around: AbstractContextManager[None]) -> None:
        super().__init__(with_heartbeat(events), media_type=MEDIA_TYPE, headers=HEADERS)
        self._around = around

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._around:
            await super().__call__(scope, receive, send)


def stream(events: AsyncIterator[bytes], around: AbstractContextManager[None]) -> StreamingResponse:
    """The response for a generator of event bytes; it ends the generator when the client goes.

    `around` is held from the response's first moment to its last, whether or not the generator ever begins.
    """
    return _Stream(events, around)
