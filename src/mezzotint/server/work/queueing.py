"""One endpoint's queue: which job goes next, and how long a new one would wait. Needs no event loop.

Between keys: the highest priority first, and fair share in step-seconds (start-time fair queueing, by
weight) among equals. Within a key: least remaining work first. A job that has waited too long or whose
deadline is near goes first within its key, and its key takes turns with those of the highest priority. Work
is counted in seconds that a lone job would take. `Throughput` is how much of it is done per second of clock.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from mezzotint.errors import MezzotintError
from mezzotint.messages import Done, Generate, Preview
from mezzotint.spec import ImageSpec

if TYPE_CHECKING:
    from mezzotint.server.tracing import JobTrace

MAX_STALE = 16
"""Stale entries of a key are dropped when they outnumber its waiting jobs by this many."""


@dataclass(slots=True, eq=False)
class Job:
    """One image on its way. `on_end` is called exactly once, with the result or the error."""

    request: Generate
    """The message for its worker."""
    key_id: str
    weight: float
    priority: int
    work_s: float
    deadline: float
    """On the event loop's clock, like all times here."""
    on_end: Callable[[Job, Done | MezzotintError], None]
    on_progress: Callable[[Job], None]
    on_preview: Callable[[Job, Preview], None]
    queued_at: float = 0.0
    started_at: float | None = None
    """When it was last handed to a worker."""
    step: int = 0
    deaths: int = 0
    """Workers that died while they held this job."""
    lone_deaths: list[int] = field(default_factory=list)
    """The step that it had reached when a worker died that held nothing else."""
    entry: int = 0
    """Number of its entry in the queue, which JobQueue sets and reads; 0 while it does not wait."""
    ended: bool = False
    trace: JobTrace | None = None
    """Admission sets it where the request is traced."""

    @property
    def queued(self) -> bool:
        return self.entry > 0

    @property
    def spec(self) -> ImageSpec:
        return self.request.spec

    @property
    def route(self) -> str | None:
        """Route of the adapter that the image uses; None where it uses none or several."""
        return self.spec.routes[0] if len(self.spec.adapters) == 1 else None

    @property
    def remaining_s(self) -> float:
        return self.work_s * (1 - min(self.step / self.spec.num_steps, 1))

    def drop_pictures(self) -> None:
        """Frees the pictures of a job that will not run again."""
        spec = self.spec
        if spec.pictures:
            bare = replace(spec, strength=None, num_inference_steps=spec.num_steps)
            bare = replace(bare, images=(), mask=None, control_images=())
            self.request = replace(self.request, spec=bare)

    def end(self, outcome: Done | MezzotintError) -> None:
        """Ends the job once; later calls do nothing (a result may cross a cancellation)."""
        if not self.ended:
            self.ended = True
            self.on_end(self, outcome)


@dataclass(slots=True)
class _Share:
    """One key's part of the queue."""

    weight: float
    priority: int
    by_work: list[tuple[float, float, int, Job]] = field(default_factory=list)
    """A heap of work, age, entry and job. An entry whose number is not its job's present one is stale."""
    by_age: deque[tuple[int, Job]] = field(default_factory=deque)
    """Entry and job, the oldest job first; stale entries as above."""
    waiting: int = 0
    waiting_s: float = 0.0
    running: int = 0
    running_s: float = 0.0
    served: float = 0.0
    """Step-seconds handed out to this key, divided by its weight."""

    @property
    def active(self) -> bool:
        return self.waiting > 0 or self.running > 0

    def drop_stale(self) -> None:
        """Frees what stale entries hold."""
        self.by_age = deque((job.entry, job) for job in self.jobs())
        self.by_work = [(job.work_s, job.queued_at, job.entry, job) for job in self.jobs()]
        heapq.heapify(self.by_work)

    def jobs(self) -> Iterator[Job]:
        """The waiting jobs, the oldest first."""
        return (job for entry, job in self.by_age if entry == job.entry)


class Ahead(NamedTuple):
    """What goes before a job."""

    num: int
    work_s: float


@dataclass(frozen=True, slots=True)
class _Line:
    """One key's waiting jobs in order, counted."""

    places: dict[int, int]
    """By entry: how many shorter ones there are; of equals, the older is first."""
    shortest_s: list[float]
    """Work of the first 0, 1, 2, ... by length."""
    oldest_s: list[float]
    """Work of the first 0, 1, 2, ... by age."""

    @classmethod
    def of(cls, jobs: list[Job]) -> _Line:
        ranked = sorted(jobs, key=lambda job: (job.work_s, job.queued_at))
        return cls(
            {job.entry: place for place, job in enumerate(ranked)},
            [0.0, *accumulate(job.work_s for job in ranked)],
            [0.0, *accumulate(job.work_s for job in jobs)],
        )


class JobQueue:
    """The waiting jobs of one endpoint, and the work of its running ones."""

    def __init__(self, max_wait_s: float) -> None:
        self.max_wait_s = max_wait_s
        self._shares: dict[str, _Share] = {}
        """By key id; kept while any key has work, so that what was served to each is not forgotten."""
        self.changes = 0
        """Counts up with every change of what waits."""
        self._counted: dict[str, _Line] = {}
        """By key id, as of the change `_lines_at`; `_lines` fills and reads it."""
        self._lines_at = 0
        self._entries = 0
        """Number of the newest entry."""

    def __len__(self) -> int:
        return sum(share.waiting for share in self._shares.values())

    def put(self, job: Job, now: float) -> None:
        """Adds a job; one that comes back from a dead worker keeps its place in age."""
        share = self._shares.get(job.key_id)
        if share is None:
            share = self._shares[job.key_id] = _Share(job.weight, job.priority)
        if not share.active:  # an idle key gathers no credit
            floor = min((other.served for other in self._shares.values() if other.active), default=0.0)
            share.served = max(share.served, floor)
        again = job.queued_at > 0
        job.queued_at = job.queued_at or now
        self._entries += 1
        self.changes += 1
        job.entry, job.step, job.started_at = self._entries, 0, None
        heapq.heappush(share.by_work, (job.work_s, job.queued_at, job.entry, job))
        if again:
            share.by_age.appendleft((job.entry, job))
        else:
            share.by_age.append((job.entry, job))
        share.waiting += 1
        share.waiting_s += job.work_s

    def peek(self, now: float) -> Job | None:
        """The job that should run next; of keys that are level, one that has nothing running."""
        waiting = [share for share in self._shares.values() if share.waiting]
        if not waiting:
            return None
        highest = max(share.priority for share in waiting)
        first = [share for share in waiting if share.priority == highest or self._overdue(share, now)]
        return self._first(min(first, key=lambda share: (share.served, share.running)), now)

    def take(self, job: Job, now: float) -> None:
        """Moves a waiting job to the account of the running ones."""
        share = self._leave(job)
        for other in self._shares.values():
            if other.priority < share.priority:  # waiting behind a higher priority earns no credit
                other.served = max(other.served, share.served)
        job.started_at = now
        share.served += job.work_s / share.weight
        share.running += 1
        share.running_s += job.work_s

    def remove(self, job: Job) -> None:
        """Takes a waiting job out."""
        self._leave(job)
        self._forget_idle(job.key_id)

    def progressed(self, job: Job, step: int) -> None:
        """Books a running job's step."""
        before = job.remaining_s
        job.step = step
        self._shares[job.key_id].running_s -= before - job.remaining_s

    def finished(self, job: Job) -> None:
        """Books a running job out, however it ended; what it did not use is given back to its key."""
        share = self._shares[job.key_id]
        share.running -= 1
        share.running_s = max(0.0, share.running_s - job.remaining_s) if share.running else 0.0
        share.served -= job.remaining_s / share.weight
        self._forget_idle(job.key_id)

    def ahead(self, job: Job) -> Ahead:
        """What goes before this waiting job, as things stand: its key's jobs, and the other keys' share.

        That is all of a higher priority and none of a lower one.
        """
        lines, mine = self._lines(), self._shares[job.key_id]
        line = lines[job.key_id]
        place = line.places[job.entry]
        num, work_s = place, line.shortest_s[place]
        for key_id, share in self._shares.items():
            if share is mine or share.priority < mine.priority:
                continue
            other = lines[key_id]
            count = share.waiting if share.priority > mine.priority else min(share.waiting, place + 1)
            num, work_s = num + count, work_s + other.oldest_s[count]
        return Ahead(num, work_s)

    def _lines(self) -> dict[str, _Line]:
        """Counted once after each change, however many ask."""
        if self._lines_at != self.changes:
            self._counted = {key_id: _Line.of(list(share.jobs())) for key_id, share in self._shares.items()}
            self._lines_at = self.changes
        return self._counted

    def running_s(self) -> float:
        """Work that workers have in hand."""
        return sum(share.running_s for share in self._shares.values())

    def backlog_s(self) -> float:
        """Work that waits or runs, of all keys."""
        return sum(share.waiting_s + share.running_s for share in self._shares.values())

    def work_before(self, key_id: str, weight: float, priority: int, now: float) -> float:
        """Work done before a new job of this key would be finished, the job itself not counted.

        A key's jobs wait behind its own, behind the fair share that others have of that time, and behind all
        of a higher priority; never behind more than all there is.
        """
        mine = self._shares.get(key_id)
        own = mine.waiting_s + mine.running_s if mine else 0.0
        others = [share for key, share in self._shares.items() if key != key_id and share.active]
        higher = sum(share.waiting_s + share.running_s for share in others if share.priority > priority)
        level = [
            share
            for share in others
            if share.priority == priority or (share.priority < priority and self._overdue(share, now))
        ]
        shared = own * (1 + sum(share.weight for share in level) / weight)
        return min(self.backlog_s(), higher + shared + sum(share.running_s for share in level))

    def reestimate(self, work_s: Callable[[Job], float]) -> None:
        """Counts the waiting jobs' work anew, when the model's speed has become known."""
        self.changes += 1
        for share in self._shares.values():
            for job in share.jobs():
                job.work_s = work_s(job)
            share.drop_stale()
            share.waiting_s = sum(job.work_s for job in share.jobs())

    def waiting(self) -> list[Job]:
        return [job for share in self._shares.values() for job in share.jobs()]

    def _overdue(self, share: _Share, now: float) -> bool:
        """Whether this key's oldest waiting job has waited too long or is near its deadline."""
        while share.by_age and share.by_age[0][0] != share.by_age[0][1].entry:
            share.by_age.popleft()
        if not share.by_age:
            return False
        _, oldest = share.by_age[0]
        return now - oldest.queued_at > self.max_wait_s or oldest.deadline - now < 2 * oldest.work_s

    def _first(self, share: _Share, now: float) -> Job:
        if self._overdue(share, now):
            return share.by_age[0][1]
        while share.by_work[0][2] != share.by_work[0][3].entry:
            heapq.heappop(share.by_work)
        return share.by_work[0][3]

    def _leave(self, job: Job) -> _Share:
        assert job.queued
        job.entry = 0
        self.changes += 1
        share = self._shares[job.key_id]
        share.waiting -= 1
        share.waiting_s = max(0.0, share.waiting_s - job.work_s)
        if not share.waiting:
            share.waiting_s = 0.0
        if max(len(share.by_age), len(share.by_work)) - 2 * share.waiting > MAX_STALE:
            share.drop_stale()
        return share

    def _forget_idle(self, key_id: str) -> None:
        share = self._shares[key_id]
        if not share.active and not any(other.active for other in self._shares.values()):
            self._shares.clear()  # nobody is owed anything any more


@dataclass(frozen=True, slots=True)
class Throughput:
    """How many seconds of lone work an endpoint does per second: above 1 where merging or replicas help.

    It is a decaying average over finished jobs that begins with the calibration's figure.
    """

    work_s: float
    clock_s: float

    @classmethod
    def expected(cls, speed: float) -> Throughput:
        return cls(speed, 1.0)

    @property
    def speed(self) -> float:
        return max(self.work_s / self.clock_s, 1e-3)

    def observed(self, work_s: float, clock_s: float) -> Throughput:
        """With one more job's work, done in the time since the one before it ended (or since work began)."""
        keep = 0.98  # fifty jobs: those that run together end together, and must not look like a change
        return replace(
            self, work_s=self.work_s * keep + work_s, clock_s=max(self.clock_s * keep + clock_s, 1e-6)
        )
