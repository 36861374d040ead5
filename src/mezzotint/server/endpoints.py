"""Endpoints: their life cycle, their workers, and the hand-over of queued jobs to workers.

    created -> starting -> ready -> sleeping -> draining -> stopped or failed

An endpoint has one current Generation (a version of its settings and the replicas that run it). An update starts the
next generation beside it and retires the old one when the new one is ready, so no request fails.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import structlog

from mezzotint.config import EndpointSettings
from mezzotint.errors import (
    ConflictError,
    GenerationError,
    InvalidRequestError,
    MezzotintError,
    ModelLoadError,
    NotFoundError,
    RequestCancelledError,
    UnavailableError,
    echo,
)
from mezzotint.messages import (
    AdapterAdded,
    AdapterFailed,
    AddAdapter,
    Cancel,
    Cancelled,
    Done,
    Failed,
    FromWorker,
    Generate,
    LoadModel,
    ModelInfo,
    PrefetchAdapter,
    Preview,
    Progress,
    Ready,
    RemoveAdapter,
    Stats,
)
from mezzotint.schemas import nearest
from mezzotint.server.metrics import Metrics
from mezzotint.server.queueing import Job, JobQueue, Pace
from mezzotint.server.supervisor import Launcher, Replica, ReplicaState

MAX_LONE_DEATHS = 2
"""A job that has killed this many workers on its own fails; its request would only kill more."""
GUESSED_STEP_S = 0.05
"""Seconds per step before the model has ever been measured."""
FAILED_RETRY_S = 30.0
"""Retry-After of an endpoint that has failed: somebody has to look at it first."""

log = structlog.get_logger(__name__)


class State(StrEnum):
    CREATED = "created"
    STARTING = "starting"
    READY = "ready"
    SLEEPING = "sleeping"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Desired(StrEnum):
    """What the owner wants of an endpoint; survives restarts of the server."""

    RUNNING = "running"
    SLEEPING = "sleeping"
    TERMINATED = "terminated"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What earlier starts measured. `fingerprint` tells whether it still fits the settings."""

    fingerprint: str
    info: ModelInfo
    load_s: float


@dataclass(slots=True, eq=False)
class Generation:
    """One version of an endpoint's settings and the replicas that run it."""

    version: int
    spec: EndpointSettings
    replicas: list[Replica] = field(default_factory=list)

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.is_ready]

    @property
    def failed(self) -> bool:
        return bool(self.replicas) and all(replica.state is ReplicaState.FAILED for replica in self.replicas)


class Endpoint:
    """One dedicated endpoint. All methods run in the event loop."""

    def __init__(
        self,
        spec: EndpointSettings,
        launcher: Launcher,
        metrics: Metrics,
        *,
        version: int = 1,
        desired: Desired = Desired.RUNNING,
        calibration: Calibration | None = None,
        on_calibrated: Callable[[Endpoint, Calibration], None] = lambda endpoint, calibration: None,
    ) -> None:
        self.id = spec.id
        self.state = State.CREATED
        self.desired = desired
        self.current = Generation(version, spec)
        self.next: Generation | None = None
        self.update_failure = ""
        """Why the last update was given up."""
        self.calibration = (
            calibration if calibration and calibration.fingerprint == fingerprint(spec) else None
        )
        self.adapters: dict[str, AddAdapter] = {}
        self.adapter_facts: dict[str, AdapterAdded | AdapterFailed] = {}
        self.queue = JobQueue(spec.max_wait_s)
        self.last_stats: dict[str, Stats] = {}
        self.last_used = 0.0
        self._launcher = launcher
        self._metrics = metrics
        self._on_calibrated = on_calibrated
        self._jobs: dict[Replica, dict[str, Job]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._pace: Pace | None = None
        self._last_end = 0.0
        self._changed = asyncio.Event()
        self._closed = False
        self._adapter_waiters: dict[str, list[asyncio.Future[AdapterAdded | AdapterFailed]]] = {}

    # ------------------------------------------------------------ facts

    @property
    def spec(self) -> EndpointSettings:
        return self.current.spec

    @property
    def info(self) -> ModelInfo | None:
        """What the model is: as the running worker said, or as it was when it last ran."""
        for replica in self.current.replicas:
            if replica.info is not None:
                return replica.info
        return self.calibration.info if self.calibration else None

    @property
    def should_be_ready(self) -> bool:
        return self.desired is Desired.RUNNING

    @property
    def failure(self) -> str:
        return next((replica.failure for replica in self.current.replicas if replica.failure), "")

    def num_running(self) -> int:
        return sum(len(jobs) for jobs in self._jobs.values())

    def size(self, width: int | None, height: int | None) -> tuple[int, int] | None:
        """The size of a request's picture in pixels; None while nobody knows the model's own."""
        info = self.info
        wide = width or self.spec.width or (info.width if info else None)
        high = height or self.spec.height or (info.height if info else None)
        return (wide, high) if wide and high else None

    def step_s(self, width: int | None, height: int | None) -> float:
        """Seconds that one step of a lone job takes, as calibrated, scaled by pixels to other sizes."""
        info = self.info
        if info is None or info.step_s <= 0:
            return GUESSED_STEP_S
        size = self.size(width, height)
        return info.step_s * (size[0] * size[1]) / (info.width * info.height) if size else info.step_s

    def work_s(self, request: Generate) -> float:
        """Seconds that this job would take alone; the text encoder and the decoder count as one step."""
        return (request.num_inference_steps + 1) * self.step_s(request.width, request.height)

    @property
    def pace(self) -> Pace:
        if self._pace is None:
            self._pace = Pace.expected(_gain(self.info) * max(1, len(self.current.replicas)))
        return self._pace

    def start_left_s(self, now: float) -> float:
        """Estimated seconds until the endpoint takes jobs; 0 when it does."""
        if self.current.ready:
            return 0.0
        expected = self.calibration.load_s + 0.5 if self.calibration else 0.0
        starting = [
            replica.started_at for replica in self.current.replicas if replica.state is ReplicaState.STARTING
        ]
        return max(0.0, expected - (now - min(starting))) if starting else expected

    def wait_s(self, key_id: str, weight: float, now: float) -> float:
        """Estimated seconds before a new job of this key would get its turn."""
        return self.start_left_s(now) + self.queue.work_before(key_id, weight) / self.pace.speed

    def left_s(self, job: Job, now: float) -> float:
        """Estimated seconds until this job is done."""
        if not job.queued:
            return job.remaining_s
        ahead = sum(other.work_s for other in self.queue.waiting() if other.work_s < job.work_s)
        return self.start_left_s(now) + ahead / self.pace.speed + job.work_s

    # ------------------------------------------------------------ validation

    def require_route(self, route: str | None) -> None:
        if route is not None and route not in self.adapters:
            hint = nearest(route, self.adapters)
            known = ", ".join(sorted(self.adapters)[:10]) or "none"
            nearby = f"did you mean {self.id}:{hint}?" if hint else f"its adapters are {known}"
            raise NotFoundError(
                f"endpoint {self.id} has no adapter {echo(route)}; {nearby}",
                code="adapter_not_found",
                param="model",
            )

    def check(self, request: Generate) -> None:
        """InvalidRequestError for what this endpoint's model cannot do, as far as it is known yet."""
        size, info = self.size(request.width, request.height), self.info
        if info is None:
            return
        for name, value in (("width", request.width), ("height", request.height)):
            if value is not None and value % info.size_multiple:
                raise InvalidRequestError(
                    f"{name} must be a multiple of {info.size_multiple} for endpoint {self.id} (got {value})",
                    code="out_of_range",
                    param=name,
                )
        limit = self.spec.max_pixels or 4 * info.width * info.height
        if size and size[0] * size[1] > limit:
            raise InvalidRequestError(
                f"width x height must be at most {limit} pixels for endpoint {self.id} (got {size[0]} x {size[1]})",
                code="out_of_range",
                param="width" if request.width else "height",
            )
        if request.negative_prompt and not info.supports_negative_prompt:
            raise InvalidRequestError(
                f"endpoint {self.id} runs a model without negative prompts; leave negative_prompt out",
                code="not_supported",
                param="negative_prompt",
            )

    def warnings(self, *, guidance: float | None) -> list[str]:
        """What was accepted without effect."""
        if guidance is not None and self.info and not self.info.guidance_effective:
            return [f"guidance_scale has no effect on endpoint {self.id}: its model ignores it"]
        return []

    def require_available(self) -> None:
        """UnavailableError when a job could never be run as things stand."""
        if self.state is State.FAILED:
            raise UnavailableError(
                f"endpoint {self.id} has failed; its owner finds the reason in its status and can restart it",
                code="endpoint_failed",
                param="model",
                retry_after=FAILED_RETRY_S,
            )
        if self.desired is Desired.TERMINATED:
            raise UnavailableError(
                f"endpoint {self.id} has been terminated; its owner can restart it",
                code="endpoint_stopped",
                param="model",
                retry_after=FAILED_RETRY_S,
            )

    # ------------------------------------------------------------ life cycle

    def start(self) -> None:
        """Starts, wakes or restarts: brings up the current generation's replicas in the background."""
        self.desired = Desired.RUNNING
        if not self.current.replicas:
            self.current.replicas = [
                self._replica(self.current, number) for number in range(self.current.spec.replicas)
            ]
        for replica in self.current.replicas:
            if replica.state in (ReplicaState.STOPPED, ReplicaState.FAILED):
                replica.start()
        self._settle()

    def rest(self) -> None:
        """Takes up the state that the owner left it in, without starting anything."""
        self._set(State.SLEEPING if self.desired is Desired.SLEEPING else State.STOPPED)

    async def close(self) -> None:
        """Ends the workers now, because the server stops; what the owner wants stays as it is."""
        self._closed = True
        generations = [self.current, *([self.next] if self.next else [])]
        await asyncio.gather(*(replica.stop() for part in generations for replica in part.replicas))
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await asyncio.gather(*(replica.stop() for replica in list(self._jobs)))

    async def sleep(self) -> None:
        """Lets what runs finish, then gives the memory back; a request wakes the endpoint."""
        self.desired = Desired.SLEEPING
        await self._drain_and_stop(State.SLEEPING)

    async def terminate(self, drain_s: float = math.inf) -> list[str]:
        """Lets what is queued and running finish for at most `drain_s`, then ends it; answers the dropped job ids."""
        self.desired = Desired.TERMINATED
        dropped = await self._drain_and_stop(State.STOPPED, drain_s)
        return dropped

    async def restart(self) -> None:
        """New workers for the same settings, without failing a request where a worker still runs."""
        if self.current.ready:
            self.update(self.spec, self.current.version)
        else:
            await asyncio.gather(*(replica.stop() for replica in self.current.replicas))
            self.start()

    def update(self, spec: EndpointSettings, version: int) -> None:
        """Brings up the new settings beside the old ones; the old workers retire when the new ones are ready."""
        if self.next is not None:
            raise ConflictError(
                f"endpoint {self.id} is being updated to version {self.next.version}; wait for that"
            )
        self.update_failure = ""
        if not self.current.ready:
            self._retire(self.current)
            self.current = Generation(version, spec)
            self._refit(spec)
            if self.should_be_ready:
                self.start()
            return
        self.next = Generation(version, spec)
        self.next.replicas = [self._replica(self.next, number) for number in range(spec.replicas)]
        for replica in self.next.replicas:
            replica.start()

    async def wait_for(self, *states: State, timeout_s: float | None = None) -> State:
        """Waits until the endpoint is in one of these states (and not in the middle of an update)."""
        async with asyncio.timeout(timeout_s):
            while self.state not in states or self.next is not None:
                self._changed.clear()
                await self._changed.wait()
        return self.state

    async def _drain_and_stop(self, final: State, drain_s: float = math.inf) -> list[str]:
        if self.state in (State.READY, State.STARTING):
            self._set(State.DRAINING)
        dropped: list[str] = []
        try:
            async with asyncio.timeout(None if math.isinf(drain_s) else drain_s):
                while (
                    (self.num_running() or len(self.queue))
                    and self.current.replicas
                    and self.state is State.DRAINING
                ):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        if self.state not in (State.DRAINING, State.CREATED, State.FAILED, State.SLEEPING):
            return dropped  # woken meanwhile
        dropped = self._end_all(
            RequestCancelledError(f"endpoint {self.id} was stopped before the request was done")
        )
        generations = [self.current, self.next] if self.next else [self.current]
        self.next = None
        self._set(State.DRAINING)
        await asyncio.gather(*(replica.stop() for part in generations if part for replica in part.replicas))
        if self.desired is not Desired.RUNNING:
            self._set(final)
        else:
            self.start()
        await asyncio.gather(*self._retiring)
        return dropped

    def _replica(self, generation: Generation, number: int) -> Replica:
        spec = generation.spec
        replica = Replica(
            f"{self.id}/{generation.version}/{number}",
            self._launcher,
            lambda: load_message(spec, self.calibration),
            on_message=self._hear,
            on_change=self._replica_changed,
            on_lost=self._lost,
        )
        self._jobs[replica] = {}
        return replica

    def _replica_changed(self, replica: Replica) -> None:
        coming = self.next
        if coming is not None and replica in coming.replicas:
            if all(other.is_ready for other in coming.replicas):
                old, self.current, self.next = self.current, coming, None
                self.queue.max_wait_s = coming.spec.max_wait_s
                self._pace = None
                self._retire(old)
                log.info("endpoint updated", endpoint=self.id, version=coming.version)
            elif any(other.state is ReplicaState.FAILED for other in coming.replicas):
                self.update_failure = replica.failure
                self.next = None
                self._retire(coming)
                log.error("update given up", endpoint=self.id, version=coming.version, error=replica.failure)
        self._settle()

    def _settle(self) -> None:
        """Derives the endpoint's state from its replicas."""
        if self.state in (State.DRAINING, State.SLEEPING, State.STOPPED) and not self.should_be_ready:
            self._changed.set()
            self.pump()
            return
        if self.current.ready:
            self._set(State.READY)
        elif self.current.failed:
            self._set(State.FAILED)
            self._end_all(
                UnavailableError(
                    f"endpoint {self.id} has failed; its owner finds the reason in its status and can restart it",
                    code="endpoint_failed",
                    retry_after=FAILED_RETRY_S,
                )
            )
        elif self.current.replicas and self.should_be_ready:
            self._set(State.STARTING)
        self.pump()

    def _set(self, state: State) -> None:
        if state is not self.state:
            log.info("endpoint state", endpoint=self.id, was=str(self.state), now=str(state))
            self.state = state
        self._changed.set()

    def _retire(self, generation: Generation) -> None:
        task = asyncio.get_running_loop().create_task(self._retire_when_idle(generation))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def _retire_when_idle(self, generation: Generation) -> None:
        while any(self._jobs.get(replica) for replica in generation.replicas):
            self._changed.clear()
            await self._changed.wait()
        await asyncio.gather(*(replica.stop() for replica in generation.replicas))
        for replica in generation.replicas:
            self._jobs.pop(replica, None)
            self.last_stats.pop(replica.name, None)

    def _refit(self, spec: EndpointSettings) -> None:
        self._pace = None
        self.queue.max_wait_s = spec.max_wait_s
        if self.calibration and self.calibration.fingerprint != fingerprint(spec):
            self.calibration = None

    # ------------------------------------------------------------ jobs

    def enqueue(self, job: Job, now: float) -> None:
        """Takes a job in; wakes the endpoint if it sleeps."""
        self.last_used = now
        if not self.queue.backlog_s():
            self._last_end = now
        self.queue.put(job, now)
        if self.state is State.SLEEPING or (
            self.state is State.DRAINING and self.desired is Desired.SLEEPING
        ):
            log.info("a request wakes the endpoint", endpoint=self.id)
            self.start()
        self.pump()
        if job.queued and job.request.adapter and self.current.ready:
            best = min(self.current.ready, key=self._load_of)
            best.send(PrefetchAdapter(job.request.adapter))

    def cancel(self, job: Job, error: MezzotintError) -> None:
        """Ends a job at once; a worker that runs it stops within one step."""
        if job.ended:
            return
        if job.queued:
            self.queue.remove(job)
        else:
            for replica, jobs in self._jobs.items():
                if job.request.job_id in jobs and replica.is_ready:
                    replica.send(Cancel(job.request.job_id))
        job.end(error)
        self._changed.set()
        self.pump()

    def pump(self) -> None:
        """Hands waiting jobs to workers that have room."""
        if self._closed:
            return
        now = asyncio.get_running_loop().time()
        for replica in sorted(self.current.ready, key=self._load_of):
            while (job := self.queue.peek(now)) is not None and self._has_room(replica, job):
                if job.request.adapter and not self._best_for(job, replica):
                    break
                self._dispatch(replica, job, now)

    def _has_room(self, replica: Replica, job: Job) -> bool:
        """Whether this worker should get this job now.

        A worker holds only what fills its next forwards, because a job in the server's queue can still be overtaken by
        another key's; a job much shorter than all that runs goes at once. A suspect runs alone.
        """
        held, spec = self._jobs[replica], self.current.spec
        if not held:
            return True
        if job.deaths or any(other.deaths for other in held.values()) or len(held) >= spec.max_jobs:
            return False
        if len(held) < max(2, 2 * _rows(replica.info, spec)):
            return True
        return job.remaining_s < min(other.remaining_s for other in held.values()) / 2

    def _best_for(self, job: Job, replica: Replica) -> bool:
        """False when an equally free worker has this job's adapter in memory and this one has not."""
        route, load = job.request.adapter, len(self._jobs[replica])

        def resident(other: Replica) -> bool:
            stats = self.last_stats.get(other.name)
            return stats is not None and route in stats.resident_routes

        if resident(replica):
            return True
        return not any(resident(other) and len(self._jobs[other]) <= load for other in self.current.ready)

    def _dispatch(self, replica: Replica, job: Job, now: float) -> None:
        self.queue.take(job, now)
        self._jobs[replica][job.request.job_id] = job
        try:
            self.check(job.request)  # for jobs that came before the model was known
        except InvalidRequestError as error:
            self._book_out(replica, job.request.job_id)
            job.end(error)
            return
        replica.send(job.request)

    def _load_of(self, replica: Replica) -> float:
        return sum(job.remaining_s for job in self._jobs[replica].values())

    def _book_out(self, replica: Replica, job_id: str) -> Job | None:
        job = self._jobs.get(replica, {}).pop(job_id, None)
        if job is not None:
            self.queue.finished(job)
            self._changed.set()
        return job

    def _end_all(self, error: MezzotintError) -> list[str]:
        """Ends every waiting and running job with this error; answers their ids."""
        waiting = self.queue.waiting()
        running = [job for jobs in self._jobs.values() for job in jobs.values() if not job.ended]
        for job in (*waiting, *running):
            self.cancel(job, error)
        return [job.request.job_id for job in (*waiting, *running)]

    # ------------------------------------------------------------ what workers say

    def _hear(self, replica: Replica, message: FromWorker) -> None:
        match message:
            case Progress(job_id, step):
                self._progressed(replica, job_id, step)
            case Preview(job_id):
                if (job := self._jobs[replica].get(job_id)) and not job.ended:
                    job.on_preview(job, message)
            case Done(job_id):
                self._done(replica, job_id, message)
            case Failed(job_id, code, text, param):
                if job := self._book_out(replica, job_id):
                    job.end(_failure(code, text, param))
                self.pump()
            case Cancelled(job_id):
                if job := self._book_out(replica, job_id):
                    job.end(RequestCancelledError("the request was cancelled"))
                self.pump()
            case Ready(info, load_s):
                self._became_ready(replica, info, load_s)
            case Stats():
                self.last_stats[replica.name] = message
                self._metrics.stats(self.id, message)
            case AdapterAdded() | AdapterFailed():
                self.adapter_facts[message.route] = message
                for waiter in self._adapter_waiters.pop(message.route, []):
                    if not waiter.done():
                        waiter.set_result(message)
            case _:
                pass

    def _progressed(self, replica: Replica, job_id: str, step: int) -> None:
        job = self._jobs[replica].get(job_id)
        if job is not None and step > job.step:
            self.queue.progressed(job, step)
        if job is not None and not job.ended:
            job.on_progress(job)

    def _done(self, replica: Replica, job_id: str, message: Done) -> None:
        now = asyncio.get_running_loop().time()
        job = self._jobs[replica].get(job_id)
        if job is not None:
            self._pace = self.pace.observed(job.work_s, now - self._last_end)
            self._last_end = self.last_used = now
            self.queue.progressed(job, job.request.num_inference_steps)
            self._book_out(replica, job_id)
            job.deaths = 0
            job.end(message)
        self.pump()

    def _became_ready(self, replica: Replica, info: ModelInfo, load_s: float) -> None:
        for adapter in self.adapters.values():
            replica.send(adapter)
        if replica in self.current.replicas or self.next:
            spec = self.next.spec if self.next and replica in self.next.replicas else self.spec
            self.calibration = Calibration(fingerprint(spec), info, load_s)
            self._on_calibrated(self, self.calibration)
        self._pace = None
        self.queue.reestimate(lambda job: self.work_s(job.request))
        self._metrics.ready(self.id, load_s)

    def _lost(self, replica: Replica) -> None:
        """A worker died: its unfinished jobs run again, as the same request and seed give the same picture."""
        jobs = list(self._jobs.get(replica, {}).values())
        self._metrics.worker_exits.labels(self.id).inc()
        now = asyncio.get_running_loop().time()
        alone = len(jobs) == 1
        for job in jobs:
            self._book_out(replica, job.request.job_id)
            if job.ended:
                continue
            job.deaths += 1
            job.lone_deaths += alone
            if job.lone_deaths >= MAX_LONE_DEATHS:
                replica.forgive(job.deaths - 1)
                job.end(
                    GenerationError(
                        f"the request was given up: {job.deaths} workers died while they ran it; "
                        "change its size, steps or prompt, and tell the server's owner",
                        code="worker_crashed",
                    )
                )
            else:
                self.queue.put(job, now)
                job.on_progress(job)
        for route in list(self._adapter_waiters):
            if not self.current.ready:
                failed = AdapterFailed(
                    route, "worker_crashed", "the worker died while it looked at the adapter"
                )
                for waiter in self._adapter_waiters.pop(route):
                    if not waiter.done():
                        waiter.set_result(failed)

    # ------------------------------------------------------------ adapters

    async def add_adapter(self, adapter: AddAdapter) -> AdapterAdded | None:
        """Makes an adapter known to every worker. With a worker running, it is looked at first, and ModelLoadError says
        why it does not fit; without one that happens at the next start, and the answer is None."""
        ready = self.current.ready
        self.adapters[adapter.route] = adapter
        if not ready:
            return None
        waiter: asyncio.Future[AdapterAdded | AdapterFailed] = asyncio.get_running_loop().create_future()
        self._adapter_waiters.setdefault(adapter.route, []).append(waiter)
        for replica in ready:
            replica.send(adapter)
        found = await waiter
        if isinstance(found, AdapterFailed):
            self.remove_adapter(adapter.route)
            raise ModelLoadError(found.message, code=found.code)
        return found

    def remove_adapter(self, route: str) -> None:
        """Forgets an adapter; jobs that already use it finish."""
        self.adapters.pop(route, None)
        self.adapter_facts.pop(route, None)
        for replica in self.current.ready:
            replica.send(RemoveAdapter(route))


def fingerprint(spec: EndpointSettings) -> str:
    """Tells apart settings for which the calibrated rows, and so the promised bytes, may differ."""
    names = "model revision dtype device num_threads batching performance max_rows min_batch_gain max_batch_stretch offload"
    values = {name: getattr(spec, name) for name in names.split()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_message(spec: EndpointSettings, calibration: Calibration | None) -> LoadModel:
    """What a worker is told at its start; rows calibrated earlier are kept, because bytes are promised."""
    known = calibration if calibration and calibration.fingerprint == fingerprint(spec) else None
    shared = set(LoadModel.__dataclass_fields__) & set(EndpointSettings.model_fields)
    return LoadModel(
        endpoint_id=spec.id,
        source=spec.model,
        rows=known.info.rows if known else None,
        **{name: getattr(spec, name) for name in shared},
    )


def calibration_to_json(calibration: Calibration) -> dict[str, Any]:
    return asdict(calibration)


def calibration_from_json(values: dict[str, Any] | None) -> Calibration | None:
    """None also for what another version of the program wrote: the worker calibrates again."""
    if not values:
        return None
    try:
        known = Calibration(**values)
        return replace(known, info=ModelInfo(**values["info"]))
    except (TypeError, KeyError):
        return None


def _rows(info: ModelInfo | None, spec: EndpointSettings) -> int:
    if info is None or spec.batching == "off" or not info.mergeable:
        return 1
    return spec.max_rows if spec.batching == "fast" else info.rows


def _gain(info: ModelInfo | None) -> float:
    """How much merging raises throughput, by the calibration's table."""
    if info is None or not info.calibration:
        return 1.0
    rates = {int(entry["rows"]): entry["rows_per_s"] for entry in info.calibration}
    return max(1.0, rates.get(info.rows, 0.0) / rates[1]) if rates.get(1) else 1.0


def _failure(code: str, text: str, param: str | None) -> MezzotintError:
    if code in ("out_of_range", "invalid_value", "not_supported"):
        return InvalidRequestError(text, code=code, param=param)
    return GenerationError(text, code=code, param=param)
