"""Connections before there is a request: how long a head may take, how large it may be, how many there are.

The parser is h11 and no other: it alone is measured here. A client that sends no head, or a body that nobody
will read, is cut off after `patience_s`. There are never more connections than the descriptors allow that the
workers and the database leave: then the oldest one without a request makes room, first of those that never
had one; else the newest is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from itertools import chain
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 64 * 2**10
"""Longest request line with headers."""
RESERVED_DESCRIPTORS = 96
"""Descriptors that connections never take: those of workers' starts, the database, and files."""
MIN_CONNECTIONS = 16
MAX_DESCRIPTORS = 2**16


def max_connections() -> int:
    """How many connections the limit of descriptors allows, once that is raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = [limit for limit in (hard, MAX_DESCRIPTORS) if limit != resource.RLIM_INFINITY]
    if soft != resource.RLIM_INFINITY and soft < min(limits):
        with contextlib.suppress(OSError, ValueError):  # a system with a limit below the limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits), hard))
            soft = min(limits)
    most = MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return max(MIN_CONNECTIONS, most - max(RESERVED_DESCRIPTORS, most // 8))


class Connections:
    """What the connections of one server share; makes their protocols, as uvicorn asks for them."""

    def __init__(self, patience_s: float, most: int) -> None:
        self.patience_s = patience_s
        self.most = most
        self.fresh: dict[GuardedProtocol, None] = {}
        """Those that never had a request, the oldest first; each enters and leaves by itself."""
        self.kept: dict[GuardedProtocol, None] = {}
        """Those between two requests, in the same way."""

    def __call__(self, **arguments: Any) -> GuardedProtocol:
        return GuardedProtocol(self, **arguments)


class GuardedProtocol(H11Protocol):
    """uvicorn's connection, with an end to its waiting."""

    def __init__(self, shared: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._shared = shared
        self._overdue: asyncio.TimerHandle | None = None
        """Cuts the connection off, unless what it waits for comes first."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._shared.most:
            waiting = next(chain(self._shared.fresh, self._shared.kept), self)
            waiting.transport.abort()
            waiting.leave()
            self.connections.discard(waiting)
            if waiting is self:
                return
        self._watch()

    def leave(self) -> None:
        """Is no longer among those that make room."""
        self._shared.fresh.pop(self, None)
        self._shared.kept.pop(self, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.leave()
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stop_watching()
        self._watch()

    def _watch(self) -> None:
        """Starts, goes on with or ends the waiting for a head, or for the rest of a body that is answered."""
        if self.transport.is_closing():
            return
        headless = self.conn.their_state is h11.IDLE
        if headless:
            (self._shared.fresh if self.cycle is None else self._shared.kept).setdefault(self)
        else:
            self.leave()
        answered = self.cycle is not None and self.cycle.response_complete
        if headless or (answered and self.conn.their_state is h11.SEND_BODY):
            if self._overdue is None:
                self._overdue = self.loop.call_later(self._shared.patience_s, self.transport.abort)
        else:
            self._stop_watching()

    def _stop_watching(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
