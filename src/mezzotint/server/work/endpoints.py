"""One endpoint: its life cycle, its generations of workers, its adapters.

    created -> starting -> ready -> sleeping -> draining -> stopped or failed

An endpoint has one current Generation: a version of its settings and the replicas that run it. An update
starts the next generation beside it and retires the old one when the new one is ready, so no request fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum

import structlog

from mezzotint.config import EndpointSettings
from mezzotint.errors import ConflictError, RequestCancelledError, UnavailableError
from mezzotint.messages import AdapterAdded, AdapterFailed, FromWorker, ModelInfo, Stats
from mezzotint.server.metrics import Metrics
from mezzotint.server.store.keys import Key
from mezzotint.server.work.dispatch import Dispatcher
from mezzotint.server.work.endpoint_adapters import EndpointAdapters
from mezzotint.server.work.profiles import Calibration, Profile, load_message, settings_digest
from mezzotint.server.work.queueing import Job
from mezzotint.server.workers.process import WorkerSettings
from mezzotint.server.workers.replica import Replica, ReplicaState

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
        workers: WorkerSettings,
        metrics: Metrics,
        *,
        version: int = 1,
        desired: Desired = Desired.RUNNING,
        created: float | None = None,
        calibration: Calibration | None = None,
        on_calibrated: Callable[[Endpoint, Calibration], None] = lambda endpoint, calibration: None,
    ) -> None:
        self.id = spec.id
        self.state = State.CREATED
        self.desired = desired
        self.created = time.time() if created is None else created
        self.updated = self.created
        self.current = Generation(version, spec)
        self.next: Generation | None = None
        self.update_failure = ""
        """Why the last update was given up."""
        self.adapters = EndpointAdapters(
            lambda: [*self.current.ready, *(self.next.ready if self.next else ())],
            lambda: self.info.pipeline_class if self.info else None,
        )
        self._calibration = calibration
        self.dispatcher = Dispatcher(lambda: self.profile, lambda: self.current.ready)
        self._workers = workers
        self._metrics = metrics
        self._on_calibrated = on_calibrated
        self._tasks: set[asyncio.Task[object]] = set()
        self._all_replicas: set[Replica] = set()
        self._idle_timer: asyncio.TimerHandle | None = None
        self.awaking = False
        """Whether the start in progress ends a sleep."""

    # ------------------------------------------------------------ what it is

    @property
    def spec(self) -> EndpointSettings:
        return self.current.spec

    @property
    def calibration(self) -> Calibration | None:
        """What was measured under the current settings."""
        known = self._calibration
        return known if known and known.fingerprint == settings_digest(self.spec) else None

    @property
    def info(self) -> ModelInfo | None:
        """What the model is: as a running worker said, or as it was when it last ran."""
        for replica in self.current.replicas:
            if replica.info is not None:
                return replica.info
        return self.calibration.info if self.calibration else None

    @property
    def profile(self) -> Profile:
        return Profile(self.spec, self.info)

    @property
    def failure(self) -> str:
        return next((replica.failure for replica in self.current.replicas if replica.failure), "")

    def start_left_s(self, now: float) -> float:
        """Estimated seconds until the endpoint takes jobs; 0 when it does, and when nobody knows."""
        if self.current.ready or self.calibration is None:
            return 0.0
        expected = self.calibration.load_s + 0.5
        starting = [r.run.started_at for r in self.current.replicas if r.run and not r.is_ready]
        return max(0.0, expected - (now - min(starting))) if starting else expected

    def wait_s(self, key: Key, now: float) -> float:
        """Estimated seconds before a new job of this key would get its turn."""
        limits = key.limits
        work_s = self.dispatcher.queue.work_before(key.id, limits.weight, limits.priority, now)
        return self.start_left_s(now) + work_s / self.dispatcher.speed

    def left_s(self, job: Job, now: float) -> float:
        """Estimated seconds until this job is done."""
        if not job.queued:
            return job.remaining_s
        queue = self.dispatcher.queue
        ahead_s = queue.running_s() + sum(other.work_s for other in queue.ahead(job))
        return self.start_left_s(now) + ahead_s / self.dispatcher.speed + job.work_s

    def require_available(self) -> None:
        """UnavailableError when a job could not be run however long it waited."""
        if self.state is State.FAILED:
            raise self._failed_error()
        if self.desired is Desired.TERMINATED:
            raise UnavailableError(
                f"endpoint {self.id} has been terminated; its owner can restart it",
                code="endpoint_stopped",
                param="model",
                retry_after=FAILED_RETRY_S,
            )

    def _failed_error(self) -> UnavailableError:
        return UnavailableError(
            f"endpoint {self.id} has failed; its owner finds the reason in its status and can restart it",
            code="endpoint_failed",
            param="model",
            retry_after=FAILED_RETRY_S,
        )

    # ------------------------------------------------------------ jobs

    def enqueue(self, job: Job, now: float) -> None:
        """Takes a job in; wakes the endpoint if it sleeps."""
        self.wake()
        self.dispatcher.put(job, now)

    def wake(self) -> None:
        """Starts an endpoint that sleeps or is about to; does nothing to any other."""
        if self.desired is Desired.SLEEPING:
            log.info("endpoint wakes", endpoint=self.id)
            self.awaking = True
            self.start()

    # ------------------------------------------------------------ life cycle

    def start(self) -> None:
        """Starts, wakes or restarts: brings up the current generation's replicas in the background."""
        self.desired = Desired.RUNNING
        if not self.current.replicas:
            self._staff(self.current)
        for replica in self.current.replicas:
            if replica.state in (ReplicaState.STOPPED, ReplicaState.FAILED):
                replica.start()
        self._settle()

    def rest(self) -> None:
        """Takes up the state that the owner left it in, without starting anything."""
        self._set(State.SLEEPING if self.desired is Desired.SLEEPING else State.STOPPED)

    async def sleep(self) -> None:
        """Lets what is queued and running finish, then gives the memory back; a request wakes it."""
        self.desired = Desired.SLEEPING
        await self._drain(math.inf)
        if self.desired is Desired.SLEEPING:  # nobody woke it meanwhile
            await self._stop_workers()
            self._rest_or_start(State.SLEEPING)

    async def terminate(self, drain_s: float = math.inf) -> list[str]:
        """Lets what is there finish for `drain_s`, then ends it; answers the dropped jobs' ids."""
        self.desired = Desired.TERMINATED
        await self._drain(drain_s)
        dropped = self.dispatcher.end_all(
            RequestCancelledError(f"endpoint {self.id} was terminated before the request was done")
        )
        await self._stop_workers()
        self._rest_or_start(State.STOPPED)
        return dropped

    async def restart(self) -> None:
        """New workers for the same settings, without failing a request where a worker still runs."""
        if self.desired is Desired.RUNNING and self.current.ready:
            if self.next is None:  # else an update is bringing up new workers already
                self.update(self.spec, self.current.version)
            return
        self.update_failure = ""
        await self._stop_workers()
        self.start()

    def update(self, spec: EndpointSettings, version: int) -> None:
        """Brings up new settings beside the old; the old workers retire when the new ones are ready."""
        if self.next is not None:
            raise ConflictError(
                f"endpoint {self.id} is being updated to version {self.next.version}; wait for that"
            )
        self.update_failure = ""
        coming = Generation(version, spec)
        if not self.current.ready:
            old, self.current = self.current, coming
            self._retire(old)
            self.dispatcher.refit()
            if self.desired is Desired.RUNNING:
                self.start()
            return
        self.next = coming
        self._staff(coming)
        for replica in coming.replicas:
            replica.start()
        self.dispatcher.touch()

    async def close(self) -> None:
        """Ends the workers now, because the server stops; what the owner wants stays as it is."""
        self.dispatcher.closed = True
        if self._idle_timer:
            self._idle_timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(replica.stop() for replica in self._all_replicas))

    async def wait_for(self, *states: State, timeout_s: float | None = None) -> State:
        """Waits until the endpoint is in one of these states and not in the middle of an update."""
        async with asyncio.timeout(timeout_s):
            while self.state not in states or self.next is not None:
                await self.dispatcher.moved()
        return self.state

    async def _drain(self, drain_s: float) -> None:
        wanted = self.desired
        if self.state in (State.READY, State.STARTING):
            self._set(State.DRAINING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if math.isinf(drain_s) else drain_s):
                while not self.dispatcher.idle and self.desired is wanted and not self.current.failed:
                    await self.dispatcher.moved()

    async def _stop_workers(self) -> None:
        replicas = [*self.current.replicas, *(self.next.replicas if self.next else [])]
        self.next = None
        await asyncio.gather(*(replica.stop() for replica in replicas))

    def _rest_or_start(self, resting: State) -> None:
        if self.desired is Desired.RUNNING:  # woken while the workers were ending
            self.start()
        else:
            self._set(resting)

    def _staff(self, generation: Generation) -> None:
        spec = generation.spec
        for number in range(spec.replicas):
            replica = Replica(
                f"{self.id}/{generation.version}/{number}",
                self._workers,
                lambda: load_message(spec, self._calibration),
                on_message=self._hear,
                on_change=self._replica_changed,
                on_exit=self._worker_exited,
            )
            generation.replicas.append(replica)
            self._all_replicas.add(replica)

    def _replica_changed(self, replica: Replica) -> None:
        if replica.is_ready:
            self._became_ready(replica)
        coming = self.next
        if coming is not None and replica in coming.replicas:
            if all(other.is_ready for other in coming.replicas):
                old, self.current, self.next = self.current, coming, None
                self.dispatcher.refit()
                self._retire(old)
                log.info("endpoint updated", endpoint=self.id, version=coming.version)
            elif replica.state is ReplicaState.FAILED:
                self.update_failure, self.next = replica.failure, None
                self._retire(coming)
                log.error("update given up", endpoint=self.id, version=coming.version, error=replica.failure)
        self._settle()

    def _settle(self) -> None:
        """Derives the endpoint's state from its replicas."""
        if self.dispatcher.closed:
            return
        if self.desired is Desired.RUNNING:
            if self.current.ready:
                self.awaking = False
                self._set(State.READY)
            elif self.current.failed:
                self._set(State.FAILED)
                self.dispatcher.end_all(self._failed_error())
            elif self.current.replicas:
                self._set(State.STARTING)
        self.dispatcher.touch()
        self.dispatcher.pump()
        self._watch_idleness()

    def _set(self, state: State) -> None:
        if state is not self.state:
            self.updated = time.time()
            log.info("endpoint state", endpoint=self.id, was=str(self.state), now=str(state))
            self.state = state
        self.dispatcher.touch()

    def _retire(self, generation: Generation) -> None:
        self.spawn(self._retire_when_idle(generation))

    async def _retire_when_idle(self, generation: Generation) -> None:
        while self.dispatcher.holds_jobs(generation.replicas):
            await self.dispatcher.moved()
        await asyncio.gather(*(replica.stop() for replica in generation.replicas))
        for replica in generation.replicas:
            self.dispatcher.drop(replica)
            self._all_replicas.discard(replica)

    def _watch_idleness(self) -> None:
        if self._idle_timer:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self.spec.idle_sleep_s and self.state is State.READY and not self.dispatcher.closed:
            loop = asyncio.get_running_loop()
            run = self.current.ready[0].run
            since = max(self.dispatcher.last_used, run.ready_at or 0.0 if run else 0.0)
            when = max(since + self.spec.idle_sleep_s, loop.time() + 0.01)
            self._idle_timer = loop.call_at(when, self._sleep_if_idle)

    def _sleep_if_idle(self) -> None:
        idle_s = asyncio.get_running_loop().time() - self.dispatcher.last_used
        if self.dispatcher.idle and idle_s >= self.spec.idle_sleep_s and self.next is None:
            log.info("endpoint falls asleep", endpoint=self.id, idle_s=round(idle_s, 1))
            self.spawn(self.sleep())
        else:
            self._watch_idleness()

    def spawn(self, work: Coroutine[None, None, object]) -> None:
        """Runs one of this endpoint's changes in the background."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------ what workers say

    def _hear(self, replica: Replica, message: FromWorker) -> None:
        match message:
            case AdapterAdded() | AdapterFailed():
                self.adapters.hear(replica, message)
            case Stats():
                self._metrics.stats(self.id, message)
                self.dispatcher.hear(replica, message)
            case _:
                self.dispatcher.hear(replica, message)

    def _became_ready(self, replica: Replica) -> None:
        assert replica.info is not None
        self.adapters.greet(replica)
        generation = self.next if self.next and replica in self.next.replicas else self.current
        self._calibration = Calibration(settings_digest(generation.spec), replica.info, replica.load_s)
        self._on_calibrated(self, self._calibration)
        self._metrics.load_seconds.labels(self.id).set(replica.load_s)
        if generation is self.current:
            self.dispatcher.refit()

    def _worker_exited(self, replica: Replica, crashed: bool) -> int:
        self._metrics.worker_exits.labels(self.id).inc()
        self.adapters.lost(replica)
        return self.dispatcher.take_back(replica, crashed)
