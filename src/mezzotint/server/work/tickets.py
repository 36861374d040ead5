"""One request from beginning to end, and the memory of those that have ended.

A Ticket is one request of one key: one job per image, then one answer.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mezzotint.errors import MezzotintError, NotFoundError, RateLimitError
from mezzotint.messages import Preview
from mezzotint.schemas import RequestStatus
from mezzotint.server.store.keys import Key
from mezzotint.server.store.spool import Spooled
from mezzotint.server.threads import FILES
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.queueing import Job
from mezzotint.spec import ImageSpec

if TYPE_CHECKING:
    from mezzotint.server.tracing import RequestTrace

ANSWER_MEMORY_BYTES = 64 * 2**20
"""Once the ended requests of one key hold this much in memory, its further answers go to disk."""
MAX_MEMORY_BYTES = 128 * 2**20
"""Most that the ended requests of one key may hold in memory, the records of the requests included."""
MAX_DISK_BYTES = 4 * 2**30
"""Most that the ended requests of one key may hold on disk."""
RECORD_BYTES = 4096
"""Estimated memory of an ended request's job, without its texts and answer."""
PIECE_BYTES = 128 * 2**10
"""Answers go out in pieces of this size, so that a client that does not read holds one of them."""


class ClientGone(Exception):
    """The client has closed its connection; nobody reads the answer."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One finished image: its pixels and what made them."""

    spec: ImageSpec
    width: int
    height: int
    pixels: bytes
    """uint8 red, green, blue and perhaps alpha, height x width x 3 or 4."""
    queue_s: float
    generate_s: float
    adapter_load_s: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def seed(self) -> int:
        assert self.spec.seed is not None, "admission draws the seed"
        return self.spec.seed

    @property
    def channels(self) -> int:
        return len(self.pixels) // (self.width * self.height)


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished request's answer: its bytes, in memory or on disk, and what Server-Timing says."""

    content: bytes | Spooled
    is_json: bool = True
    """Whether it may be part of a JSON answer; streamed events may not."""
    queue_s: float = 0.0
    generate_s: float = 0.0
    encode_s: float = 0.0

    @property
    def on_disk(self) -> bool:
        return isinstance(self.content, Spooled)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The bytes, PIECE_BYTES at a time."""
        for start in range(0, len(self.content), PIECE_BYTES):
            if isinstance(self.content, bytes):
                yield self.content[start : start + PIECE_BYTES]
            else:
                yield await FILES.run(self.content.read, start, PIECE_BYTES)


@dataclass(frozen=True, slots=True)
class Finished:
    """What a request that is done has come to: its answer and the warnings in its header."""

    answer: Answer
    warnings: tuple[str, ...]


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
    warnings: tuple[str, ...] = ()
    """What the dialect has bent to fit; the answer repeats it."""
    hold: bool = False
    """Nobody waits on this connection, and the request runs to its end."""
    arrived: float
    """When its head was there, on the event loop's clock; its deadline counts from here."""
    require: Callable[[], None] = lambda: None
    """Raises when the answer could not be made; called before a new request is queued."""
    finished: Finished | None = None
    """What came of it at another server that has died since; it does not run again."""

    @property
    def identity(self) -> Identity:
        return self.key.id, self.fingerprint


@dataclass(slots=True, eq=False)
class Ticket:
    """One request on its way to exactly one of done, failed, cancelled.

    Admission fills its fields, except where a field says otherwise; the dialects read them.
    """

    id: str
    key: Key
    endpoint: Endpoint
    finish: Finish | None
    """None once the request has ended, because it may hold much of the request's body."""
    fingerprint: str
    idempotency_key: str | None
    deadline: float
    """On the event loop's clock."""
    warnings: list[str] = field(default_factory=list)
    """What was bent or had no effect, as the dialect and the workers said; each once."""
    created: float = field(default_factory=time.time)
    status: RequestStatus = "queued"
    jobs: list[Job] = field(default_factory=list)
    pictures: dict[int, list[Picture]] = field(default_factory=dict)
    """Those of each finished job, by its number: one, or one for each layer."""
    previews: list[tuple[int, Preview]] = field(default_factory=list)
    """Image number and preview, in the order in which they came."""
    answer: Answer | None = None
    error: MezzotintError | None = None
    clients: int = 0
    """Connections that wait for the answer; Joining counts them."""
    watchers: int = 0
    """Connections that follow the events; they keep the answer, not the request."""
    held: bool = False
    """Runs to its end, and keeps its answer, without any connection."""
    stored: bool = False
    """Whether its answer names pictures in this server's storage; set by whoever stores them."""
    left_at: float = 0.0
    """When the last client hung up; Joining alone uses it."""
    ended_at: float = 0.0
    """Tickets alone uses it."""
    previewed: set[tuple[int, int]] = field(default_factory=set)
    """Image number and preview index of those that came: a job that runs again makes them again."""
    shown: tuple[object, bytes] = (None, b"")
    """The state as it was last told to a watcher, and of what it was made; the dialect alone uses it."""
    forgotten: bool = False
    """Tickets no longer finds it; clients that wait still get the answer."""
    deadline_timer: asyncio.TimerHandle | None = None
    trace: RequestTrace | None = None
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
            list(submission.warnings),
        )

    @property
    def identity(self) -> Identity:
        return self.key.id, self.fingerprint

    @property
    def joinable(self) -> bool:
        """Whether another client can still get this request's answer."""
        return not self.ended or self.answer is not None

    @property
    def promised(self) -> bool:
        """Whether its sender may ask for the answer later."""
        return self.held or self.idempotency_key is not None

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for the answer or may ask for it later."""
        return bool(self.clients or self.watchers or (self.promised and not self.forgotten))

    @property
    def record_bytes(self) -> int:
        """Memory that an ended request takes beside its answer."""
        spec = self.jobs[0].spec
        texts = sys.getsizeof(spec.prompt) + sys.getsizeof(spec.negative_prompt or "")
        return RECORD_BYTES * len(self.jobs) + texts

    @property
    def ended(self) -> bool:
        return self.status in ("done", "failed", "cancelled")

    @property
    def step(self) -> int:
        return sum(min(job.step, job.spec.num_steps) for job in self.jobs)

    @property
    def num_steps(self) -> int:
        return sum(job.spec.num_steps for job in self.jobs)

    @property
    def picture(self) -> int:
        """The number, from 1, of the first picture that is not done; at the end, of the last one."""
        return min(sum(job.ended for job in self.jobs) + 1, len(self.jobs))

    @property
    def picture_step(self) -> int:
        """Steps done of the unfinished picture that has come furthest."""
        unfinished = [job for job in self.jobs if not job.ended] or self.jobs[-1:]
        return max(min(job.step, job.spec.num_steps) for job in unfinished)

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


@dataclass(slots=True)
class _Account:
    """What the ended requests of one key hold. Tickets alone fills and reads it."""

    promised: deque[Ticket] = field(default_factory=deque)
    """Those whose answer may still be asked for, in the order of their end."""
    others: deque[Ticket] = field(default_factory=deque)
    memory_bytes: int = 0
    disk_bytes: int = 0


class Tickets:
    """All requests that live, and for `ttl_s` those that have ended.

    Each key has bounds of its own. A request that was promised to be found again, because nobody waited for
    it or because it has an idempotency key, is never forgotten earlier; new requests are refused instead.
    """

    def __init__(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self.by_id: dict[str, Ticket] = {}
        self.by_idempotency: dict[tuple[str, str], Ticket] = {}
        """By key id and idempotency key."""
        self._accounts: dict[str, _Account] = {}
        """By key id."""

    @property
    def num_bytes(self) -> int:
        """What ended requests hold, in memory and on disk."""
        return sum(account.memory_bytes + account.disk_bytes for account in self._accounts.values())

    def add(self, ticket: Ticket) -> None:
        self.by_id[ticket.id] = ticket
        if ticket.idempotency_key is not None:
            self.by_idempotency[ticket.key.id, ticket.idempotency_key] = ticket

    def living(self) -> list[Ticket]:
        return [ticket for ticket in self.by_id.values() if not ticket.ended]

    def fits_memory(self, key_id: str, num_bytes: int) -> bool:
        """Whether another answer of this key should stay in memory."""
        account = self._accounts.get(key_id)
        return num_bytes + (account.memory_bytes if account else 0) <= ANSWER_MEMORY_BYTES

    def keep(self, ticket: Ticket, now: float) -> None:
        """Takes note that a request has ended; forgets old ones of its key that no longer fit."""
        account = self._accounts.setdefault(ticket.key.id, _Account())
        ticket.ended_at = now
        (account.promised if ticket.promised else account.others).append(ticket)
        account.memory_bytes += ticket.record_bytes
        self._book(account, ticket.answer, 1)
        self.sweep_key(ticket.key.id, now)

    def require_room(self, key_id: str, now: float) -> None:
        """RateLimitError while the key's answers, kept or on their way out, hold more than they may."""
        self.sweep_key(key_id, now)
        account = self._accounts.get(key_id)
        if account is None:
            return
        for held, most in ((account.memory_bytes, MAX_MEMORY_BYTES), (account.disk_bytes, MAX_DISK_BYTES)):
            if held > most:
                oldest = next(iter(account.promised), None)
                raise RateLimitError(
                    f"the finished requests of this key hold {held // 2**20} MiB, over {most // 2**20} MiB; "
                    "read the answers that are on their way, or wait until older ones are forgotten",
                    code="too_many_answers",
                    retry_after=max(1.0, oldest.ended_at + self.ttl_s - now) if oldest else 1.0,
                )

    def drop_answer(self, ticket: Ticket) -> None:
        """Frees an answer that nobody will ask for."""
        if ticket.answer is not None:
            self._book(self._accounts[ticket.key.id], ticket.answer, -1)
            ticket.answer = None
            self._close_if_empty(ticket.key.id)

    def sweep(self, now: float) -> None:
        """Forgets the requests that ended too long ago; whoever waits for an answer still gets it."""
        for key_id in list(self._accounts):
            self.sweep_key(key_id, now)

    def sweep_key(self, key_id: str, now: float) -> None:
        """As `sweep`, for one key; forgets also what was not promised and no longer fits."""
        account = self._accounts.get(key_id)
        if account is None:
            return
        for ended in (account.promised, account.others):
            while ended and ended[0].ended_at + self.ttl_s <= now:
                self._forget(account, ended.popleft())
        while account.others and account.memory_bytes > MAX_MEMORY_BYTES:
            ticket = account.others.popleft()
            if ticket.promised:  # since its end
                account.promised.append(ticket)
            else:
                self._forget(account, ticket)
        self._close_if_empty(key_id)

    def _forget(self, account: _Account, ticket: Ticket) -> None:
        ticket.forgotten = True
        account.memory_bytes -= ticket.record_bytes
        if not ticket.wanted:
            self._book(account, ticket.answer, -1)
            ticket.answer = None
        self.by_id.pop(ticket.id, None)
        name = (ticket.key.id, ticket.idempotency_key or "")
        if self.by_idempotency.get(name) is ticket:
            del self.by_idempotency[name]

    def _book(self, account: _Account, answer: Answer | None, sign: int) -> None:
        if answer is None:
            return
        if answer.on_disk:
            account.disk_bytes += sign * len(answer.content)
        else:
            account.memory_bytes += sign * len(answer.content)

    def _close_if_empty(self, key_id: str) -> None:
        account = self._accounts[key_id]
        if not (account.promised or account.others or account.memory_bytes or account.disk_bytes):
            del self._accounts[key_id]
