"""The server's requests: each is let in or refused, runs as one job per image, and ends exactly once.

The dialects hand over submissions and wait for the tickets that they get.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.exc import SQLAlchemyError

from mezzotint.config import Settings
from mezzotint.errors import (
    DeadlineError,
    InternalError,
    MezzotintError,
    NotFoundError,
    RequestCancelledError,
    UnavailableError,
    echo,
)
from mezzotint.messages import Done, Generate, Preview
from mezzotint.server.metrics import Metrics
from mezzotint.server.store.keys import Key
from mezzotint.server.store.quotas import Quotas
from mezzotint.server.store.spool import Spool
from mezzotint.server.threads import DATABASE, Threads
from mezzotint.server.work.estimate import Estimate
from mezzotint.server.work.joining import Joining
from mezzotint.server.work.queueing import Job
from mezzotint.server.work.tickets import (
    Answer,
    ClientGone,
    Finished,
    Picture,
    Submission,
    Ticket,
    Tickets,
)

if TYPE_CHECKING:
    from mezzotint.server.tracing import Tracing

STOPPING_RETRY_S = 5.0
"""Retry-After of a server that stops; another one, or the same after a restart, may answer by then."""
DRAWN_SEEDS = 2**32
LISTED_WITHIN_S = 1.0
"""How long an answer waits for the entry of its pictures in the gallery."""

log = structlog.get_logger(__name__)


class Admission:
    """Every request of the server. All methods run in the event loop."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        quotas: Quotas,
        making: Threads,
        tracing: Tracing | None = None,
        listed: Callable[[str, float], Awaitable[None]] | None = None,
    ) -> None:
        """`making` runs the `finish` of submissions.

        Before an answer goes out, `listed` may take up to so many seconds for a key's new pictures.
        """
        self._settings = settings
        self._tracing = tracing
        self._metrics = metrics
        self._quotas = quotas
        self._making = making
        self._listed = listed
        self.tickets = Tickets(settings.idempotency_ttl_s)
        self._spool = Spool(settings.data_dir)
        self._joining = Joining(
            self.tickets, settings.attach_window_s, settings.max_watchers, self._abandoned
        )
        self._finishing: set[asyncio.Task[None]] = set()
        """Answers that are being made; `wait_for_answers` waits for them."""

    # ------------------------------------------------------------ in

    async def submit(self, submission: Submission) -> Ticket:
        """The ticket that this submission may join, or a new one, with its client attached.

        ClientGone means that this client has hung up and that the same request waits on another connection.
        """
        ticket = await self._joining.find(submission)
        if ticket is None and submission.finished is not None:
            ticket = self._take_finished(submission, submission.finished)
        elif ticket is None and self._quotas.must_pay(submission.key):
            ticket = await self._find_or_pay(submission)
        elif ticket is None:  # nothing is awaited from here on, or a twin could come between
            ticket = self._admit(submission)
        if ticket.id != submission.request_id:
            self._metrics.joined.labels(ticket.endpoint.id).inc()
            log.info("request joins an earlier one", earlier=ticket.id, endpoint=ticket.endpoint.id)
            if self._tracing is not None:
                self._tracing.joined(ticket.id, ticket.trace)
        if submission.hold:
            ticket.held = True
        else:
            self._joining.attach(ticket)
        return ticket

    async def _find_or_pay(self, submission: Submission) -> Ticket:
        """A new ticket that its key has paid for, or the one of a twin that came in the meantime."""
        key = submission.key
        paid_s = sum(job.work_s for job in self._checked(submission).jobs)
        await DATABASE.run(self._quotas.pay, key, paid_s)
        joined = None
        try:
            joined = await self._joining.find(submission)
            ticket = joined or self._admit(submission)
        except BaseException:
            await self._pay_back(key, paid_s)
            raise
        if joined is not None:
            await self._pay_back(key, paid_s)
        elif key.limits.step_seconds_per_day is not None:  # a step's time may have been measured anew
            self._quotas.book(key, step_seconds=sum(job.work_s for job in ticket.jobs) - paid_s)
        return ticket

    async def _pay_back(self, key: Key, paid_s: float) -> None:
        with contextlib.suppress(SQLAlchemyError, UnavailableError):
            await DATABASE.run(self._quotas.pay_back, key, paid_s)

    def _admit(self, submission: Submission) -> Ticket:
        endpoint, now = submission.endpoint, asyncio.get_running_loop().time()
        ticket = self._checked(submission)
        self._quotas.spend_request(submission.key, now, sum(job.work_s for job in ticket.jobs))
        self.tickets.add(ticket)
        ticket.deadline_timer = asyncio.get_running_loop().call_at(ticket.deadline, self._out_of_time, ticket)
        if self._tracing is not None:
            ticket.trace = self._tracing.begin(ticket.id, endpoint.id, len(ticket.jobs))
        for job in ticket.jobs:
            if ticket.trace is not None:
                job.trace = ticket.trace.job(job.request.job_id)
            endpoint.enqueue(job, now)
        return ticket

    def _take_finished(self, submission: Submission, finished: Finished) -> Ticket:
        """A request that another server has answered, and that was counted there: only kept from here on."""
        now = asyncio.get_running_loop().time()
        ticket = Ticket.of(submission, now)
        ticket.jobs = [self._job(ticket, message) for message in _messages(submission)]
        for job in ticket.jobs:
            job.step, job.ended = job.spec.num_steps, True
        ticket.status, ticket.answer, ticket.finish = "done", finished.answer, None
        ticket.warnings, ticket.held = list(finished.warnings), submission.hold
        self.tickets.add(ticket)
        self.tickets.keep(ticket, now)
        return ticket

    def _checked(self, submission: Submission) -> Ticket:
        """The ticket with its jobs, if the request can be let in now; nothing is counted or queued."""
        endpoint, key = submission.endpoint, submission.key
        endpoint.require_available()
        submission.require()
        now = asyncio.get_running_loop().time()
        timeout_s = endpoint.spec.deadline_s if submission.timeout_s is None else submission.timeout_s
        deadline = submission.arrived + timeout_s
        timeout_s = max(0.0, deadline - now)
        ticket = Ticket.of(submission, deadline)
        ticket.jobs = [self._job(ticket, message) for message in _messages(submission)]
        for job in ticket.jobs:
            endpoint.profile.check(job.spec)
        self.tickets.require_room(key.id, now)
        estimate = Estimate.of(
            [job.work_s for job in ticket.jobs],
            endpoint.dispatcher.speed,
            start_s=endpoint.current.start_left_s(now),
            wait_s=endpoint.wait_s(key, now),
        )
        refusal = estimate.refusal(endpoint.id, timeout_s=timeout_s, max_queue_s=endpoint.spec.max_queue_s)
        if refusal is not None:
            if isinstance(refusal, UnavailableError):  # it starts too late for this request, not for the next
                endpoint.wake()
            raise refusal
        return ticket

    def _job(self, ticket: Ticket, message: Generate) -> Job:
        work_s = ticket.endpoint.profile.work_s(message.spec)
        return Job(
            message,
            ticket.key.id,
            ticket.key.limits.weight,
            ticket.key.limits.priority,
            work_s,
            ticket.deadline,
            on_end=lambda job, outcome: self._job_ended(ticket, job, outcome, work_s),
            on_progress=lambda job: self._job_moved(ticket, job),
            on_preview=lambda job, preview: self._job_previewed(ticket, job, preview),
        )

    # ------------------------------------------------------------ waiting

    @contextlib.contextmanager
    def attached(self, ticket: Ticket) -> Iterator[None]:
        """For a connection that is sent the answer; it holds this from `submit` until the last byte is out.

        The client has left the request if the block ends before the request, or with ClientGone.
        """
        hung_up = False
        try:
            yield
        except (ClientGone, asyncio.CancelledError):
            hung_up = True
            raise
        finally:
            if hung_up or not ticket.ended:
                self._joining.leave(ticket)
            else:
                self._joining.detach(ticket)
                self._forget_answer(ticket)

    @contextlib.contextmanager
    def watching(self, ticket: Ticket) -> Iterator[None]:
        """For a connection that follows a request: its answer is kept until the block ends.

        RateLimitError at its begin, if the key has too many of them.
        """
        try:
            with self._joining.watching(ticket):
                yield
        finally:
            self._forget_answer(ticket)

    def find(self, request_id: str, key: Key) -> Ticket:
        """The ticket of this id, for the key that made it and for nobody else."""
        self.tickets.sweep_key(key.id, asyncio.get_running_loop().time())
        ticket = self.tickets.by_id.get(request_id)
        if ticket is None or ticket.key.id != key.id:
            raise NotFoundError(
                f"no request {echo(request_id)} of this key is known; finished ones are forgotten after "
                f"{self._settings.idempotency_ttl_s:g} s",
                code="request_not_found",
            )
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request because its owner asked for it."""
        self._end(ticket, RequestCancelledError("the request was cancelled"))

    def end_all(self) -> list[str]:
        """Ends all requests because the server stops; returns the ids of those that it ended."""
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
        """Forgets ended requests that nobody may ask for any more."""
        self.tickets.sweep(asyncio.get_running_loop().time())

    async def drained(self, until: float) -> None:
        """Waits for the requests that run without a connection, until a time of the event loop's clock."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                for ticket in self.tickets.living():
                    with contextlib.suppress(MezzotintError):
                        await ticket.outcome()

    async def wait_for_answers(self) -> None:
        """Waits for answers that are being encoded."""
        while self._finishing:
            await asyncio.gather(*self._finishing)

    def _abandoned(self, ticket: Ticket) -> None:
        if ticket.ended:
            self._forget_answer(ticket)
        else:
            text = "the client hung up and nobody asked for the request again"
            self._end(ticket, RequestCancelledError(text))

    def _forget_answer(self, ticket: Ticket) -> None:
        if ticket.ended and not ticket.wanted:
            self.tickets.drop_answer(ticket)

    # ------------------------------------------------------------ jobs move

    def _job_moved(self, ticket: Ticket, job: Job) -> None:
        if ticket.status == "queued" and not job.queued:
            ticket.status = "running"
        ticket.touch()

    def _job_previewed(self, ticket: Ticket, job: Job, preview: Preview) -> None:
        number = ticket.jobs.index(job)
        if (number, preview.index) not in ticket.previewed:
            ticket.previewed.add((number, preview.index))
            ticket.previews.append((number, preview))
            ticket.touch()

    def _job_ended(self, ticket: Ticket, job: Job, outcome: Done | MezzotintError, reserved_s: float) -> None:
        done = min(1.0, job.step / job.spec.num_steps)
        self._quotas.release(ticket.key, reserved_s)
        self._quotas.book(ticket.key, step_seconds=min(job.work_s, reserved_s) * done)
        if job.trace is not None:
            job.trace.end(outcome)
        if ticket.ended:
            return
        if isinstance(outcome, MezzotintError):
            self._end(ticket, outcome)
            return
        number = ticket.jobs.index(job)
        queue_s = (job.started_at or job.queued_at) - job.queued_at
        ticket.pictures[number] = [
            Picture(
                job.spec, outcome.width, outcome.height, pixels, queue_s, outcome.generate_s,
                outcome.adapter_load_s, tuple(outcome.warnings),
            )
            for pixels in outcome.pictures
        ]  # fmt: skip
        self._metrics.queue_seconds.labels(ticket.endpoint.id).observe(queue_s)
        self._metrics.generate_seconds.labels(ticket.endpoint.id).observe(outcome.generate_s)
        if len(ticket.pictures) == len(ticket.jobs):
            task = asyncio.get_running_loop().create_task(self._finish(ticket))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)

    async def _finish(self, ticket: Ticket) -> None:
        if ticket.ended:  # in the same turn of the loop as its last picture came
            return
        pictures = [picture for number in range(len(ticket.jobs)) for picture in ticket.pictures[number]]
        for text in (text for picture in pictures for text in picture.warnings):
            if text not in ticket.warnings:
                ticket.warnings.append(text)
        finish = ticket.finish
        assert finish is not None, "only the end takes it away"
        if ticket.trace is not None:
            finish = ticket.trace.encoding(finish)
        outcome: Answer | MezzotintError
        try:
            outcome = await self._making.run(finish, ticket, pictures)
            if self._listed is not None:
                left_s = ticket.deadline - asyncio.get_running_loop().time()
                await self._listed(ticket.key.id, min(LISTED_WITHIN_S, max(0.0, left_s)))
            if not self.tickets.fits_memory(ticket.key.id, len(outcome.content)):
                outcome = await self._making.run(self._to_disk, outcome)
        except MezzotintError as error:
            outcome = error
        except Exception:
            log.exception("answer could not be made", ticket=ticket.id)
            outcome = InternalError("the server failed to make the answer; its log says why")
        self._end(ticket, outcome)

    def _to_disk(self, answer: Answer) -> Answer:
        """The same answer on disk, or still in memory when the disk takes no more (blocking)."""
        assert isinstance(answer.content, bytes)
        try:
            return replace(answer, content=self._spool.write(answer.content))
        except OSError as error:
            log.error("answer stays in memory, the disk takes no more", error=error.strerror)
            return answer

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
            self._quotas.book(ticket.key, images=len(ticket.jobs))
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
        if ticket.trace is not None:
            ticket.trace.end(ticket.status, ticket.error)
        ticket.pictures, ticket.previews, ticket.finish, ticket.previewed = {}, [], None, set()
        for job in ticket.jobs:
            job.drop_pictures()
        if ticket.deadline_timer is not None:
            ticket.deadline_timer.cancel()
        self.tickets.keep(ticket, asyncio.get_running_loop().time())
        ticket.touch()


def _messages(submission: Submission) -> list[Generate]:
    """One message per image; image i uses seed + i, and the endpoint's defaults are filled in."""
    spec, endpoint, key, num = submission.spec, submission.endpoint, submission.key, submission.num_images
    seed = _drawn_seed(submission.request_id, num) if spec.seed is None else spec.seed
    filled = replace(
        spec,
        guidance_scale=endpoint.profile.guidance_scale(spec.guidance_scale),
        width=spec.width or (None if spec.images else endpoint.spec.width),
        height=spec.height or (None if spec.images else endpoint.spec.height),
        negative_prompt=spec.negative_prompt or None,
    )
    return [
        Generate(
            f"{submission.request_id}-{number}",
            endpoint.profile.filled(replace(filled, seed=seed + number)),
            num_previews=submission.num_previews,
            priority=key.limits.priority,
            owner=key.id,
        )
        for number in range(num)
    ]


def _drawn_seed(request_id: str, num: int) -> int:
    """Follows from the 64 random bits of the id, so a request that another server runs again keeps it."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % (DRAWN_SEEDS - num)
