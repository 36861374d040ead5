"""Which earlier request a new one joins, and which requests have lost their clients.

A client that gives up often sends the identical request again at once. It then gets the request that it left,
for as long as a window is open after the last client has hung up. A request that somebody still waits for is
joined only under the same idempotency key.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import structlog

from mezzotint.errors import ConflictError, RateLimitError, echo
from mezzotint.server.work.tickets import ClientGone, Identity, Submission, Ticket, Tickets

NOTICING_TURNS = 20
"""Turns of the event loop in which a hang-up that has arrived is noticed (up to 6, measured) and to spare."""
WATCHERS_RETRY_S = 5.0

log = structlog.get_logger(__name__)


class Joining:
    """The clients of every request. All methods run in the event loop."""

    def __init__(
        self, tickets: Tickets, window_s: float, max_watchers: int, on_abandoned: Callable[[Ticket], None]
    ) -> None:
        """`on_abandoned` is told of a request whose window has closed without anyone coming back."""
        self._tickets = tickets
        self._window_s = window_s
        self._max_watchers = max_watchers
        self._on_abandoned = on_abandoned
        self._waiting: Counter[Identity] = Counter()
        """Connections that wait for an answer. `attach` and `detach` count them; `find` looks for twins."""
        self._left: dict[Identity, list[Ticket]] = {}
        """Requests that all clients have left. `leave` adds them; `find` or the window's end removes them."""
        self._watchers: Counter[str] = Counter()
        """By key id: connections that follow a request, and clients of a request besides its first."""

    async def find(self, submission: Submission) -> Ticket | None:
        """The earlier request that this one joins, if there is one.

        ClientGone means that this client has hung up and that the same request waits on another connection.
        ConflictError means that the idempotency key belongs to another body.
        """
        if submission.idempotency_key is not None:
            return self._under_its_key(submission, submission.idempotency_key)
        ticket = self._take_left(submission.identity)
        if ticket is None and self._waiting[submission.identity]:
            await _notice_hang_ups(submission.gone)
            ticket = self._take_left(submission.identity)
        return ticket

    def attach(self, ticket: Ticket) -> None:
        """A client waits for this request; RateLimitError if it joins others and its key has too many."""
        if ticket.clients:
            self._watch(ticket)
        ticket.clients += 1
        self._waiting[ticket.identity] += 1

    def detach(self, ticket: Ticket) -> None:
        """A client waits no longer."""
        ticket.clients -= 1
        if ticket.clients:
            self._unwatch(ticket)
        self._waiting[ticket.identity] -= 1
        if not self._waiting[ticket.identity]:
            del self._waiting[ticket.identity]

    def leave(self, ticket: Ticket) -> None:
        """A client has hung up; when the last one has, the same request may join for a while."""
        self.detach(ticket)
        if ticket.clients or ticket.held:
            return
        loop = asyncio.get_running_loop()
        self._left.setdefault(ticket.identity, []).append(ticket)
        ticket.left_at = loop.time()
        loop.call_later(self._window_s, self._close_window, ticket, ticket.left_at)
        log.info("client hung up; its request may be joined", ticket=ticket.id)

    @contextlib.contextmanager
    def watching(self, ticket: Ticket) -> Iterator[None]:
        """A connection follows this request; RateLimitError if its key has too many that do."""
        self._watch(ticket)
        ticket.watchers += 1
        try:
            yield
        finally:
            ticket.watchers -= 1
            self._unwatch(ticket)

    def _watch(self, ticket: Ticket) -> None:
        num, most = self._watchers[ticket.key.id], self._max_watchers
        if num >= most:
            raise RateLimitError(
                f"{num} connections of this key follow its requests already, of {most} (max_watchers); "
                "close one, or ask for the request's state from time to time",
                code="too_many_watchers",
                retry_after=WATCHERS_RETRY_S,
            )
        self._watchers[ticket.key.id] += 1

    def _unwatch(self, ticket: Ticket) -> None:
        self._watchers[ticket.key.id] -= 1
        if not self._watchers[ticket.key.id]:
            del self._watchers[ticket.key.id]

    def _under_its_key(self, submission: Submission, idempotency_key: str) -> Ticket | None:
        ticket = self._tickets.by_idempotency.get((submission.key.id, idempotency_key))
        if ticket is None:
            return None
        if ticket.fingerprint != submission.fingerprint:
            raise ConflictError(
                f"Idempotency-Key {echo(idempotency_key)} was used for another body; "
                "take a new key for a new request"
            )
        if not ticket.joinable:
            return None
        self._take_back(ticket)
        return ticket

    def _take_left(self, identity: Identity) -> Ticket | None:
        ticket = next((ticket for ticket in self._left.get(identity, []) if ticket.joinable), None)
        if ticket is not None:
            self._take_back(ticket)
        return ticket

    def _take_back(self, ticket: Ticket) -> bool:
        """Whether the request was among those that were left; it no longer is."""
        left = self._left.get(ticket.identity, [])
        if ticket not in left:
            return False
        left.remove(ticket)
        if not left:
            del self._left[ticket.identity]
        return True

    def _close_window(self, ticket: Ticket, opened: float) -> None:
        # A request that was joined and left once more has a later window.
        if ticket.left_at == opened and self._take_back(ticket):
            self._on_abandoned(ticket)


async def _notice_hang_ups(gone: Callable[[], Awaitable[bool]]) -> None:
    """Lets the event loop hear of hang-ups before a request is taken for the twin of one that waits.

    A client that gives up and sends again at once may be heard in any order, the old connection's end last.
    """
    for _ in range(NOTICING_TURNS):
        await asyncio.sleep(0)
    if await gone():
        raise ClientGone
