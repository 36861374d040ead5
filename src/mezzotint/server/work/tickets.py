"""One request from beginning to end, and the memory of those that have ended.

A Ticket is one request of one key: one job per image, then one answer.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from mezzotint.errors import MezzotintError, NotFoundError
from mezzotint.messages import Preview
from mezzotint.schemas import RequestStatus
from mezzotint.server.store.keys import Key
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.queueing import Job
from mezzotint.spec import ImageSpec

MAX_KEPT = 10_000
"""Most ended requests that can still be asked about; the oldest are forgotten first."""
MAX_KEPT_BYTES = 256 * 2**20
"""Most bytes of their answers."""


class ClientGone(Exception):
    """The client has closed its connection; nobody reads the answer."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished image: uint8 RGB pixels and what made them."""

    spec: ImageSpec
    width: int
    height: int
    pixels: bytes
    queue_s: float
    generate_s: float
    adapter_load_s: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        assert self.spec.seed is not None, "admission draws the seed"
        return self.spec.seed


@dataclass(frozen=True, slots=True)
class Answer:
    """The bytes of a finished request's JSON answer, and what the Server-Timing header says."""

    body: bytes
    queue_s: float = 0.0
    generate_s: float = 0.0
    encode_s: float = 0.0


Finish = Callable[["Ticket", list[Picture]], Answer]
Identity = tuple[str, str]
"""Key id and fingerprint of a body: equal for requests that are the same to their sender."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a dialect hands over: one request, before anyone has decided whether it is let in."""

    endpoint: Endpoint
    spec: ImageSpec
    num_images: int = 1
    num_previews: int = 0
    key: Key
    request_id: str
    finish: Finish
    """Turns the pictures into the answer's bytes; it is called in a thread."""
    fingerprint: str
    """Tells whether two bodies are the same request."""
    gone: Callable[[], Awaitable[bool]]
    """Whether this client has hung up already."""
    idempotency_key: str | None = None
    timeout_s: float | None = None
    """None: the endpoint's own."""
    hold: bool = False
    """Nobody waits on this connection, and the request runs to its end."""

    @property
    def identity(self) -> Identity:
        return self.key.id, self.fingerprint


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way to exactly one of done, failed, cancelled."""

    id: str
    key: Key
    endpoint: Endpoint
    finish: Finish | None
    """None once the request has ended, for it may hold much of the request's body."""
    fingerprint: str
    idempotency_key: str | None
    deadline: float
    """On the event loop's clock."""
    warnings: list[str] = field(default_factory=list)
    """What had no effect, as the workers said; each once."""
    created: float = field(default_factory=time.time)
    status: RequestStatus = "queued"
    jobs: list[Job] = field(default_factory=list)
    pictures: dict[int, Picture] = field(default_factory=dict)
    previews: list[tuple[int, Preview]] = field(default_factory=list)
    """Image number and preview, in the order in which they came."""
    answer: Answer | None = None
    error: MezzotintError | None = None
    clients: int = 0
    """Connections that wait for the answer."""
    watchers: int = 0
    """Connections that follow the events; they keep the answer, not the request."""
    held: bool = False
    """Runs to its end, and keeps its answer, without any connection."""
    left_at: float = 0.0
    """When the last client hung up."""
    deadline_timer: asyncio.TimerHandle | None = None
    changes: int = 0
    """Counts up with every change; see `changed`."""
    _waiters: set[asyncio.Future[None]] = field(default_factory=set)

    @classmethod
    def of(cls, submission: Submission, deadline: float) -> Ticket:
        return cls(
            submission.request_id,
            submission.key,
            submission.endpoint,
            submission.finish,
            submission.fingerprint,
            submission.idempotency_key,
            deadline,
        )

    @property
    def identity(self) -> Identity:
        return self.key.id, self.fingerprint

    @property
    def joinable(self) -> bool:
        """Whether another client can still get this request's answer."""
        return not self.ended or self.answer is not None

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the answer or has been promised it."""
        return bool(self.clients or self.watchers or self.held or self.idempotency_key is not None)

    @property
    def ended(self) -> bool:
        return self.status in ("done", "failed", "cancelled")

    @property
    def step(self) -> int:
        return sum(min(job.step, job.spec.num_inference_steps) for job in self.jobs)

    @property
    def num_steps(self) -> int:
        return sum(job.spec.num_inference_steps for job in self.jobs)

    async def changed(self, seen: int) -> int:
        """Waits until `changes` differs from `seen` and answers it; several changes may come as one."""
        while self.changes == seen:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return self.changes

    async def outcome(self) -> Answer:
        """The answer, or the error raised."""
        seen = -1
        while not self.ended:
            seen = await self.changed(seen)
        if self.error is not None:
            raise self.error
        if self.answer is None:
            raise NotFoundError("the answer of this request is no longer kept", code="request_not_found")
        return self.answer

    def touch(self) -> None:
        self.changes += 1
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class Tickets:
    """All requests that live, and for `ttl_s` those that have ended."""

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.by_id: dict[str, Ticket] = {}
        self.by_idempotency: dict[tuple[str, str], Ticket] = {}
        self._ended: deque[tuple[float, Ticket]] = deque()
        self.num_bytes = 0
        """Of the answers kept."""

    def add(self, ticket: Ticket) -> None:
        self.by_id[ticket.id] = ticket
        if ticket.idempotency_key is not None:
            self.by_idempotency[ticket.key.id, ticket.idempotency_key] = ticket

    def living(self) -> list[Ticket]:
        return [ticket for ticket in self.by_id.values() if not ticket.ended]

    def keep(self, ticket: Ticket, now: float) -> None:
        """Takes note that a request has ended; forgets old ones that no longer fit."""
        self._ended.append((now, ticket))
        self.num_bytes += len(ticket.answer.body) if ticket.answer else 0
        for _, other in self._ended:
            if self.num_bytes <= MAX_KEPT_BYTES:
                break
            if not other.clients:
                self.drop_answer(other)
        self.sweep(now)

    def drop_answer(self, ticket: Ticket) -> None:
        """Frees the memory of an answer that nobody will ask for."""
        if ticket.answer is not None:
            if ticket.id in self.by_id:
                self.num_bytes -= len(ticket.answer.body)
            ticket.answer = None

    def sweep(self, now: float) -> None:
        """Forgets the requests that ended too long ago; whoever waits for an answer still gets it."""
        while self._ended and (self._ended[0][0] + self.ttl_s <= now or len(self._ended) > MAX_KEPT):
            _, ticket = self._ended.popleft()
            if not (ticket.clients or ticket.watchers):
                self.drop_answer(ticket)
            elif ticket.answer is not None:
                self.num_bytes -= len(ticket.answer.body)
            self.by_id.pop(ticket.id, None)
            place = (ticket.key.id, ticket.idempotency_key or "")
            if self.by_idempotency.get(place) is ticket:
                del self.by_idempotency[place]
