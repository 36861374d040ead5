"""An endpoint's jobs and its workers: who gets what, what comes back, what runs again after a death."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from mezzotint.errors import (
    ANSWERS,
    GenerationError,
    InvalidRequestError,
    MezzotintError,
    RequestCancelledError,
)
from mezzotint.messages import (
    Cancel,
    Cancelled,
    Done,
    Failed,
    FromWorker,
    PrefetchAdapter,
    Preview,
    Progress,
    Stats,
)
from mezzotint.server.work.profiles import Profile
from mezzotint.server.work.queueing import Job, JobQueue, Throughput
from mezzotint.server.workers.replica import Replica

MAX_LONE_DEATHS = 4
"""A job during which this many workers died that held nothing else is given up, wherever they died."""

NEWS = 1.2
"""Steps that take so many times longer, or less long, than thought have the waiting work counted anew."""


class Dispatcher:
    """The jobs of one endpoint, waiting and running. `ready` gives the workers that may be handed some."""

    def __init__(
        self, max_wait_s: float, profile: Callable[[], Profile], ready: Callable[[], list[Replica]]
    ) -> None:
        self.step_seconds: dict[str, float] = {}
        """Seconds of a lone job's step by size, as the slowest worker last said; `receive` keeps it."""
        self.queue = JobQueue(max_wait_s)
        self.taken_s = 0.0
        """Work of all jobs that ever came; scaling reads it."""
        self.last_used = 0.0
        """When a job last came or was done; the endpoint falls asleep by it."""
        self.closed = False
        """Whether the server stops; the endpoint sets it, and no job is handed over any more."""
        self._profile = profile
        self._ready = ready
        self.text_hits = self.text_misses = 0
        """Calls of text encoders that were remembered, and that ran; as workers report them."""
        self._stats: dict[Replica, Stats] = {}
        """The newest of each worker, as `receive` heard it; tells which adapters are resident."""
        self._held: dict[Replica, dict[str, Job]] = {}
        """The jobs in each worker, by id: from `_hand_over` to the worker's last word, or its exit."""
        self._throughput: Throughput | None = None
        """Observed at each finished job; None until somebody asks after a `refit`."""
        self._last_end = 0.0
        """When the last job was done, or work began; the next observation counts from here."""
        self._moved = asyncio.Event()

    @property
    def idle(self) -> bool:
        return not len(self.queue) and not self.num_running()

    @property
    def speed(self) -> float:
        """Seconds of lone work done per second: above 1 where merging or several workers help."""
        return self.throughput.speed

    @property
    def throughput(self) -> Throughput:
        if self._throughput is None:
            self._throughput = Throughput.expected(self._profile().gain * max(1, len(self._ready())))
        return self._throughput

    def num_running(self) -> int:
        return sum(len(jobs) for jobs in self._held.values())

    def uses_adapter(self, route: str) -> bool:
        """Whether a waiting or running job asked for this adapter."""
        held = (job for jobs in self._held.values() for job in jobs.values())
        return any(route in job.spec.routes for job in (*self.queue.waiting(), *held))

    def holds_jobs(self, replicas: list[Replica]) -> bool:
        return any(self._held.get(replica) for replica in replicas)

    def refit(self) -> None:
        """The model or the workers have changed: counts the waiting work anew."""
        profile = self._profile()
        self._throughput = None
        self.queue.max_wait_s = profile.spec.max_wait_s
        self.queue.reestimate(lambda job: profile.work_s(job.spec))

    async def moved(self) -> None:
        """Waits until a job has ended or a worker has changed."""
        self._moved.clear()
        await self._moved.wait()

    def touch(self) -> None:
        self._moved.set()

    # ------------------------------------------------------------ in

    def put(self, job: Job, now: float) -> None:
        """Takes a job in and hands it on at once where there is room."""
        self.last_used = now
        self.taken_s += job.work_s
        if self.idle:
            self._last_end = now
        self.queue.put(job, now)
        self.pump()
        ready = self._ready()
        if job.queued and job.route and ready:
            min(ready, key=self.load_of).send(PrefetchAdapter(job.route))

    def cancel(self, job: Job, error: MezzotintError) -> None:
        """Ends a job at once; a worker that runs it stops within one step."""
        if job.ended:
            return
        if job.queued:
            self.queue.remove(job)
        else:
            for replica, jobs in self._held.items():
                if job.request.job_id in jobs and replica.is_ready:
                    replica.send(Cancel(job.request.job_id))
        job.end(error)
        self.touch()
        self.pump()

    def end_all(self, error: MezzotintError) -> list[str]:
        """Ends every waiting and running job with this error; answers their ids."""
        running = [job for jobs in self._held.values() for job in jobs.values() if not job.ended]
        jobs = [*self.queue.waiting(), *running]
        for job in jobs:
            self.cancel(job, error)
        return [job.request.job_id for job in jobs]

    # ------------------------------------------------------------ out

    def pump(self) -> None:
        """Hands waiting jobs to workers that have room, the least loaded worker first."""
        if self.closed:
            return
        now = asyncio.get_running_loop().time()
        for replica in sorted(self._ready(), key=self.load_of):
            while (job := self.queue.peek(now)) is not None and self._has_room(replica, job):
                if not self._adapter_suits(job, replica):
                    break
                self._hand_over(replica, job, now)

    def _has_room(self, replica: Replica, job: Job) -> bool:
        """Whether this worker should get this job now.

        A worker holds only what fills its next forwards, because a job in the server's queue can still be
        overtaken by another key's. At once goes a job shorter than all that runs, and one whose key has
        none in this worker, for there keys take turns. What is of lower priority than the job takes no room
        from it, for it goes before. A suspect runs alone.
        """
        held, profile = self._held.get(replica, {}), self._profile()
        if not held:
            return True
        suspicion = job.deaths or any(other.deaths for other in held.values())
        if suspicion or len(held) >= profile.spec.max_jobs:
            return False
        level = [other for other in held.values() if other.priority >= job.priority]
        if len(level) < max(2, 2 * profile.rows):
            return True
        if all(other.key_id != job.key_id for other in held.values()):
            return True
        return job.remaining_s < min(other.remaining_s for other in level)

    def _adapter_suits(self, job: Job, replica: Replica) -> bool:
        """False when a worker as free as this one has the job's adapter in memory and this one has not."""
        route = job.route
        if route is None or self._resident(replica, route):
            return True
        load = len(self._held.get(replica, {}))
        return not any(
            self._resident(other, route)
            and len(self._held.get(other, {})) <= load
            and self._has_room(other, job)
            for other in self._ready()
        )

    def _resident(self, replica: Replica, route: str) -> bool:
        stats = self._stats.get(replica)
        return stats is not None and route in stats.resident_routes

    def _hand_over(self, replica: Replica, job: Job, now: float) -> None:
        self.queue.take(job, now)
        profile = self._profile()
        try:
            spec = profile.filled(job.spec)  # for jobs that came before the model was known
            profile.check(spec)
        except InvalidRequestError as error:
            self.queue.finished(job)
            job.end(error)
            return
        job.request = replace(job.request, spec=spec)
        self._held.setdefault(replica, {})[job.request.job_id] = job
        if job.trace is not None:
            job.trace.handed_over(replica.name, replica.node, replica.pid)
        replica.send(job.request)

    def load_of(self, replica: Replica) -> float:
        """Seconds of lone work that this worker has in hand."""
        return sum(job.remaining_s for job in self._held.get(replica, {}).values())

    # ------------------------------------------------------------ back

    def receive(self, replica: Replica, message: FromWorker) -> None:
        """What a worker says about jobs; other messages are not for here."""
        match message:
            case Progress(job_id, step):
                self._progressed(replica, job_id, step)
            case Preview(job_id):
                job = self._held.get(replica, {}).get(job_id)
                if job is not None and not job.ended:
                    job.on_preview(job, message)
            case Done(job_id):
                self._done(replica, job_id, message)
            case Failed(job_id, code, text, param):
                self._ended(replica, job_id, job_error(code, text, param))
            case Cancelled(job_id):
                self._ended(replica, job_id, RequestCancelledError("the request was cancelled"))
            case Stats():
                self._learn_speed(replica, message)

    def _learn_speed(self, replica: Replica, stats: Stats) -> None:
        """Estimates follow the steps that were measured last, from the first ones on."""
        before = self._profile().step_s(None, None)
        self._stats[replica] = stats
        self.text_hits += stats.text_hits
        self.text_misses += stats.text_misses
        self._collect_step_seconds()
        now = self._profile().step_s(None, None)
        if max(before, now) > NEWS * min(before, now):
            self.refit()

    @property
    def text_bytes(self) -> int:
        """What remembered results of text encoders take in the workers, all together."""
        return sum(stats.text_bytes for stats in self._stats.values())

    def _collect_step_seconds(self) -> None:
        self.step_seconds = {}
        for stats in self._stats.values():
            for size, seconds in stats.step_s.items():
                self.step_seconds[size] = max(seconds, self.step_seconds.get(size, 0.0))

    def take_back(self, replica: Replica, crashed: bool) -> int:
        """Takes the jobs of a worker that has ended back into the queue; they will give the same bytes.

        A job that kills its workers is given up. Returns the number of crashes that are its fault.
        """
        now = asyncio.get_running_loop().time()
        self._stats.pop(replica, None)
        self._collect_step_seconds()
        jobs = list(self._held.pop(replica, {}).values())
        blamed = 0
        for job in jobs:
            self.queue.finished(job)
            if job.ended:
                continue
            if crashed:
                job.deaths += 1
                if len(jobs) == 1:
                    job.lone_deaths.append(job.step)
                if _guilty(job):
                    blamed = max(blamed, job.deaths)
                    job.end(_given_up(job))
                    continue
            if job.trace is not None:
                job.trace.came_back(job.step, crashed)
            self.queue.put(job, now)
            job.on_progress(job)
        self.touch()
        return blamed

    def _progressed(self, replica: Replica, job_id: str, step: int) -> None:
        job = self._held.get(replica, {}).get(job_id)
        if job is None:
            return
        if step > job.step:
            self.queue.progressed(job, step)
        if not job.ended:
            job.on_progress(job)

    def _done(self, replica: Replica, job_id: str, message: Done) -> None:
        job = self._held.get(replica, {}).get(job_id)
        if job is not None:
            now = asyncio.get_running_loop().time()
            self._throughput = self.throughput.observed(job.work_s, now - self._last_end)
            self._last_end = self.last_used = now
            self.queue.progressed(job, job.spec.num_steps)
        self._ended(replica, job_id, message)

    def _ended(self, replica: Replica, job_id: str, outcome: Done | MezzotintError) -> None:
        job = self._held.get(replica, {}).pop(job_id, None)
        if job is not None:
            self.queue.finished(job)
            job.end(outcome)
            self.touch()
        self.pump()


def _guilty(job: Job) -> bool:
    """Whether a job kills its workers: a pure function does so at one step each time, chance does not."""
    steps = job.lone_deaths
    return (len(steps) > 1 and steps[-1] == steps[-2]) or len(steps) >= MAX_LONE_DEATHS


def _given_up(job: Job) -> GenerationError:
    return GenerationError(
        f"the request was given up: {job.deaths} workers died while they ran it; "
        "change its size, steps or prompt, and tell the server's owner",
        code="worker_crashed",
    )


def job_error(code: str, text: str, param: str | None) -> MezzotintError:
    """A worker's Failed as the error that the request ends with."""
    cls = next((each for each in ANSWERS if code in each.codes), GenerationError)
    return cls(text, code=code, param=param)
