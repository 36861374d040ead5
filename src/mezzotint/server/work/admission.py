"""Requests: admitted or refused, joined when they come back, ended exactly once.

A Ticket is one request of one key: one job per image, then one answer. The dialects make tickets and wait for
them; `finish` turns the pictures into the answer's bytes, in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Executor
from dataclasses import replace

import structlog

from mezzotint.config import Settings
from mezzotint.errors import (
    ConflictError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    MezzotintError,
    NotFoundError,
    QueueFullError,
    RequestCancelledError,
    UnavailableError,
    echo,
)
from mezzotint.messages import Done, Generate, Preview
from mezzotint.server.metrics import Metrics
from mezzotint.server.store.keys import Key
from mezzotint.server.store.quotas import Quotas
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.queueing import Job
from mezzotint.server.work.tickets import Answer, ClientGone, Finish, Picture, Ticket, Tickets
from mezzotint.spec import ImageSpec

MAX_TIMEOUT_S = 3600.0
STOPPING_RETRY_S = 5.0
"""Retry-After of a server that stops: another, or the same one restarted, may be there by then."""
DRAWN_SEEDS = 2**32
NOTICING_TURNS = 20
"""Turns of the event loop in which a hang-up that has arrived is noticed (up to 6, measured) and to spare."""
DEADLINE_MARGIN = 1.2
"""A request is only let in behind others if it would be done in time even were all this much slower."""

log = structlog.get_logger(__name__)


class Admission:
    """Every request of the server. All methods run in the event loop."""

    def __init__(self, settings: Settings, metrics: Metrics, quotas: Quotas, pool: Executor) -> None:
        self._settings = settings
        self._metrics = metrics
        self._quotas = quotas
        self._pool = pool
        self.tickets = Tickets(settings.idempotency_ttl_s)
        self._attached: Counter[tuple[str, str]] = Counter()
        """Connections that wait for an answer, by key and fingerprint."""
        self._vanished: dict[tuple[str, str], list[Ticket]] = {}
        self._finishing: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ in

    async def submit(
        self,
        endpoint: Endpoint,
        spec: ImageSpec,
        *,
        n: int = 1,
        num_previews: int = 0,
        key: Key,
        finish: Finish,
        request_id: str,
        fingerprint: str,
        gone: Callable[[], Awaitable[bool]],
        idempotency_key: str | None = None,
        timeout_s: float | None = None,
        hold: bool = False,
    ) -> Ticket:
        """A ticket with this client attached: an earlier one where that may be joined, else a new one.

        `gone` says whether this client has hung up already; ClientGone if so and the same request waits on
        another connection. `hold`: nobody waits on this connection, and the request runs to its end.
        """
        ticket = self._to_join(key, fingerprint, idempotency_key)
        if ticket is None and idempotency_key is None and self._attached[key.id, fingerprint]:
            await self._notice_hang_ups(gone)
            ticket = self._to_join(key, fingerprint, idempotency_key)
        if ticket is None:
            ticket = self._admit(
                endpoint,
                _messages(spec, n, num_previews, request_id, endpoint, key),
                key,
                finish,
                request_id,
                fingerprint,
                idempotency_key,
                timeout_s,
            )
        else:
            self._metrics.joined.labels(endpoint.id).inc()
            log.info("request joins an earlier one", earlier=ticket.id, endpoint=endpoint.id)
        if hold:
            ticket.held = True
        else:
            ticket.clients += 1
            self._attached[key.id, fingerprint] += 1
        return ticket

    async def _notice_hang_ups(self, gone: Callable[[], Awaitable[bool]]) -> None:
        """Before a request is taken for the twin of one that waits: did one of the two clients hang up?

        Who gives up and sends again at once may be heard in any order, the old connection's end last.
        """
        for _ in range(NOTICING_TURNS):
            await asyncio.sleep(0)
        if await gone():
            raise ClientGone

    def _to_join(self, key: Key, fingerprint: str, idempotency_key: str | None) -> Ticket | None:
        if idempotency_key is not None:
            ticket = self.tickets.by_idempotency.get((key.id, idempotency_key))
            if ticket is not None and ticket.fingerprint != fingerprint:
                raise ConflictError(
                    f"Idempotency-Key {echo(idempotency_key)} was used for another body; "
                    "take a new key for a new request"
                )
            if ticket is not None and (not ticket.ended or ticket.answer is not None):
                self._reappeared(ticket)
                return ticket
            return None
        waiting = self._vanished.get((key.id, fingerprint), [])
        for ticket in waiting:
            if not ticket.ended or ticket.answer is not None:
                self._reappeared(ticket)
                return ticket
        return None

    def _admit(
        self,
        endpoint: Endpoint,
        messages: list[Generate],
        key: Key,
        finish: Finish,
        request_id: str,
        fingerprint: str,
        idempotency_key: str | None,
        timeout_s: float | None,
    ) -> Ticket:
        endpoint.require_available()
        now = asyncio.get_running_loop().time()
        timeout_s = endpoint.spec.deadline_s if timeout_s is None else timeout_s
        ticket = Ticket(request_id, key, endpoint, finish, fingerprint, idempotency_key, now + timeout_s)
        jobs = [self._job(ticket, part) for part in messages]
        for job in jobs:
            endpoint.profile.check(job.spec)
        self._quotas.require(key, now)
        self._require_room(endpoint, key, [job.work_s for job in jobs], timeout_s, now)
        ticket.jobs = jobs
        self.tickets.add(ticket)
        loop = asyncio.get_running_loop()
        ticket.deadline_timer = loop.call_at(ticket.deadline, self._out_of_time, ticket)
        for job in jobs:
            endpoint.enqueue(job, now)
        return ticket

    def _job(self, ticket: Ticket, request: Generate) -> Job:
        return Job(
            request,
            ticket.key.id,
            ticket.key.limits.weight,
            ticket.key.limits.priority,
            ticket.endpoint.profile.work_s(request.spec),
            ticket.deadline,
            on_end=lambda job, outcome: self._job_ended(ticket, job, outcome),
            on_progress=lambda job: self._job_moved(ticket, job),
            on_preview=lambda job, preview: self._job_previewed(ticket, job, preview),
        )

    def _require_room(
        self, endpoint: Endpoint, key: Key, works_s: list[float], timeout_s: float, now: float
    ) -> None:
        """Refuses now what would only be late, by its deadline or by the queue's bound in seconds of work.

        `works_s` has each image's work. No image is done sooner than alone, however many run beside it.
        """
        start_s = endpoint.start_left_s(now)
        share_s = sum(works_s) / max(endpoint.dispatcher.speed, 1.0)
        alone_s = max(share_s, *works_s)
        if start_s > timeout_s:
            endpoint.wake()
            raise UnavailableError(
                f"endpoint {endpoint.id} is starting and should be ready in {start_s:.0f} s, "
                f"after this request's deadline ({timeout_s:g} s); send it again then",
                param="model",
                retry_after=start_s,
            )
        if start_s + alone_s > timeout_s:
            raise DeadlineError(
                f"the request needs about {start_s + alone_s:.1f} s, over its deadline ({timeout_s:g} s); "
                "ask for fewer steps or smaller images, or raise X-Request-Timeout-S"
            )
        wait_s = endpoint.wait_s(key, now)
        late_s = wait_s + alone_s - timeout_s / DEADLINE_MARGIN
        over_s = max(late_s, wait_s + share_s - endpoint.spec.max_queue_s - start_s)
        if wait_s > start_s and over_s > 0:
            raise QueueFullError(
                f"endpoint {endpoint.id} has about {wait_s:.0f} s of work before this request, "
                f"more than it may wait ({max(0.0, wait_s - over_s):.0f} s); "
                f"send it again in {math.ceil(over_s)} s",
                retry_after=max(1.0, over_s),
            )

    # ------------------------------------------------------------ waiting

    @contextlib.contextmanager
    def attached(self, ticket: Ticket) -> Iterator[None]:
        """For a client that is sent events; leaving before the ticket has ended means that it vanished."""
        try:
            yield
        finally:
            if ticket.ended:
                self.release(ticket)
            else:
                self.let_go(ticket)

    @contextlib.contextmanager
    def watching(self, ticket: Ticket) -> Iterator[None]:
        """For a connection that follows a request: its answer is kept until the block ends."""
        ticket.watchers += 1
        try:
            yield
        finally:
            ticket.watchers -= 1
            self._forget_answer(ticket)

    def find(self, request_id: str, key: Key) -> Ticket:
        """The ticket of this id, for the key that made it and for nobody else."""
        self.sweep()
        ticket = self.tickets.by_id.get(request_id)
        if ticket is None or ticket.key.id != key.id:
            raise NotFoundError(
                f"no request {echo(request_id)} of this key is known; finished ones are forgotten after "
                f"{self._settings.idempotency_ttl_s:g} s",
                code="request_not_found",
            )
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request at its owner's wish."""
        self._end(ticket, RequestCancelledError("the request was cancelled"))

    def end_all(self) -> list[str]:
        """Ends whatever is left when the server stops; answers the ids of what was dropped."""
        left = self.tickets.living()
        for ticket in left:
            error = UnavailableError(
                "the server is stopping; send the request again in a moment",
                code="server_stopping",
                retry_after=STOPPING_RETRY_S,
            )
            self._end(ticket, error)
        return [ticket.id for ticket in left]

    def sweep(self) -> None:
        """Forgets what nobody may ask for any more."""
        self.tickets.sweep(asyncio.get_running_loop().time())

    async def settle(self) -> None:
        """Waits for answers that are being encoded."""
        while self._finishing:
            await asyncio.gather(*self._finishing)

    # ------------------------------------------------------------ clients that come and go

    def let_go(self, ticket: Ticket) -> None:
        """A client has hung up; when the last one has, the same request may join for a while."""
        self._detach(ticket)
        if ticket.clients == 0 and not ticket.held:
            self._vanished.setdefault((ticket.key.id, ticket.fingerprint), []).append(ticket)
            loop = asyncio.get_running_loop()
            ticket.vanished_at = loop.time()
            loop.call_later(self._settings.attach_window_s, self._close_window, ticket, ticket.vanished_at)
            log.info("client vanished; its request may be joined", ticket=ticket.id)

    def _reappeared(self, ticket: Ticket) -> None:
        tickets = self._vanished.get((ticket.key.id, ticket.fingerprint), [])
        if ticket in tickets:
            tickets.remove(ticket)
            if not tickets:
                del self._vanished[ticket.key.id, ticket.fingerprint]

    def _close_window(self, ticket: Ticket, opened: float) -> None:
        vanished = ticket in self._vanished.get((ticket.key.id, ticket.fingerprint), [])
        if not vanished or ticket.vanished_at != opened:  # joined, and perhaps let go once more
            return
        self._reappeared(ticket)
        if ticket.ended:
            self._forget_answer(ticket)
        else:
            self._end(
                ticket, RequestCancelledError("the client hung up and nobody asked for the request again")
            )

    def release(self, ticket: Ticket) -> None:
        """A client has its answer."""
        self._detach(ticket)
        if ticket.clients == 0:
            self._forget_answer(ticket)

    def _detach(self, ticket: Ticket) -> None:
        ticket.clients -= 1
        place = (ticket.key.id, ticket.fingerprint)
        self._attached[place] -= 1
        if not self._attached[place]:
            del self._attached[place]

    def _forget_answer(self, ticket: Ticket) -> None:
        wanted = ticket.clients or ticket.watchers or ticket.held or ticket.idempotency_key is not None
        if ticket.ended and not wanted:
            self.tickets.drop_answer(ticket)

    # ------------------------------------------------------------ jobs move

    def _job_moved(self, ticket: Ticket, job: Job) -> None:
        if ticket.status == "queued" and not job.queued:
            ticket.status = "running"
        ticket.touch()

    def _job_previewed(self, ticket: Ticket, job: Job, preview: Preview) -> None:
        ticket.previews.append((ticket.jobs.index(job), preview))
        ticket.touch()

    def _job_ended(self, ticket: Ticket, job: Job, outcome: Done | MezzotintError) -> None:
        done = job.step / job.spec.num_inference_steps
        self._quotas.used(ticket.key, step_seconds=job.work_s * done)
        if ticket.ended:
            return
        if isinstance(outcome, MezzotintError):
            self._end(ticket, outcome)
            return
        number = ticket.jobs.index(job)
        queue_s = (job.started_at or job.queued_at) - job.queued_at
        ticket.pictures[number] = Picture(
            job.spec, outcome.width, outcome.height, outcome.payload, queue_s, outcome.generate_s,
            outcome.adapter_load_s, tuple(outcome.warnings),
        )  # fmt: skip
        self._metrics.queue_seconds.labels(ticket.endpoint.id).observe(queue_s)
        self._metrics.generate_seconds.labels(ticket.endpoint.id).observe(outcome.generate_s)
        if len(ticket.pictures) == len(ticket.jobs):
            task = asyncio.get_running_loop().create_task(self._finish(ticket))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)

    async def _finish(self, ticket: Ticket) -> None:
        if ticket.ended:  # in the same turn of the loop as its last picture came
            return
        pictures = [ticket.pictures[number] for number in range(len(ticket.jobs))]
        for text in (text for picture in pictures for text in picture.warnings):
            if text not in ticket.warnings:
                ticket.warnings.append(text)
        loop = asyncio.get_running_loop()
        outcome: Answer | MezzotintError
        try:
            outcome = await loop.run_in_executor(self._pool, ticket.finish, ticket, pictures)
        except MezzotintError as error:
            outcome = error
        except Exception:
            log.exception("answer could not be made", ticket=ticket.id)
            outcome = InternalError("the server failed to make the answer; its log says why")
        self._end(ticket, outcome)

    def _out_of_time(self, ticket: Ticket) -> None:
        if not ticket.ended and len(ticket.pictures) < len(ticket.jobs):
            step = (
                f"at step {ticket.step} of {ticket.num_steps}"
                if ticket.status == "running"
                else "while it waited"
            )
            self._end(
                ticket,
                DeadlineError(f"the request reached its deadline {step}; allow it more time or fewer steps"),
            )

    def _end(self, ticket: Ticket, outcome: Answer | MezzotintError) -> None:
        """The one place where a request ends."""
        if ticket.ended:
            return
        if isinstance(outcome, Answer):
            ticket.status, ticket.answer = "done", outcome
            self._quotas.used(ticket.key, images=len(ticket.jobs))
        else:
            cancelled = isinstance(outcome, RequestCancelledError)
            ticket.status, ticket.error = "cancelled" if cancelled else "failed", outcome
            self._metrics.failures.labels(ticket.endpoint.id, outcome.code).inc()
            for job in ticket.jobs:
                ticket.endpoint.dispatcher.cancel(job, outcome)
        self._metrics.requests.labels(ticket.endpoint.id, ticket.status).inc()
        log.info(
            "request ended", ticket=ticket.id, endpoint=ticket.endpoint.id, status=ticket.status,
            code=ticket.error.code if ticket.error else None,
        )  # fmt: skip
        ticket.pictures, ticket.previews = {}, []
        if ticket.deadline_timer is not None:
            ticket.deadline_timer.cancel()
        self.tickets.keep(ticket, asyncio.get_running_loop().time())
        ticket.touch()


def _messages(
    spec: ImageSpec, n: int, num_previews: int, request_id: str, endpoint: Endpoint, key: Key
) -> list[Generate]:
    """One message per image; image i of n uses seed + i, and the endpoint's defaults are filled in."""
    seed = secrets.randbelow(DRAWN_SEEDS - n) if spec.seed is None else spec.seed
    filled = replace(
        spec,
        guidance_scale=endpoint.profile.guidance_scale(spec.guidance_scale),
        width=spec.width or endpoint.spec.width,
        height=spec.height or endpoint.spec.height,
        negative_prompt=spec.negative_prompt or None,
    )
    return [
        Generate(
            f"{request_id}-{number}",
            replace(filled, seed=seed + number),
            num_previews=num_previews,
            priority=key.limits.priority,
            owner=key.id,
        )
        for number in range(n)
    ]


def new_request_id() -> str:
    """`req_`, the time in milliseconds and chance: sortable, unguessable."""
    return f"req_{int(time.time() * 1000):011x}{secrets.token_hex(8)}"


def parse_timeout(text: str | None) -> float | None:
    """The X-Request-Timeout-S header; InvalidRequestError for what is not a number of seconds in range."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_S:
        raise InvalidRequestError(
            f"X-Request-Timeout-S must be a number of seconds above 0 and at most {MAX_TIMEOUT_S:g} "
            f"(got {echo(text)})",
            code="out_of_range",
            param="X-Request-Timeout-S",
        )
    return seconds
