"""Server-sent events: events to bytes, and the response that streams them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Any

from mezzotint.server.api.answers import HeldStream

HEARTBEAT_S = 10.0
"""After this long without an event a comment is sent, so that proxies keep the connection."""
MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}


def event(name: str | None, data: Any) -> bytes:
    """One event; a `name` of None leaves its type out."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    head = f"event: {name}\n" if name else ""
    body = "".join(f"data: {line}\n" for line in text.split("\n"))
    return f"{head}{body}\n".encode()


def comment(text: str) -> bytes:
    """A line that clients skip."""
    return f": {' '.join(text.split())}\n\n".encode()


async def with_heartbeat(events: AsyncIterator[bytes], every_s: float = HEARTBEAT_S) -> AsyncIterator[bytes]:
    """The same bytes, with a comment after every `every_s` without an event."""
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


async def event_pieces(name: str, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """One event whose data comes in pieces."""
    yield f"event: {name}\ndata: ".encode()
    async for piece in pieces:
        yield piece.replace(b"\n", b"\ndata: ")
    yield b"\n\n"


def stream(events: AsyncIterator[bytes], around: AbstractContextManager[None]) -> HeldStream:
    """The response for a generator of event bytes; it ends the generator when the client goes."""
    return HeldStream(with_heartbeat(events), around, MEDIA_TYPE, HEADERS)
