"""One endpoint: its life cycle, its deployments, its jobs and its adapters.

An endpoint has one current Deployment: a version of its settings and the replicas that run it. An update or
a restart brings the next deployment up beside it and retires the old one when the new one is ready, so no
request fails. Where no worker is ready, the new one is tried alone, with a way back to what worked before.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

import structlog

from mezzotint.config import EndpointSettings
from mezzotint.errors import ConflictError, RequestCancelledError, UnavailableError, without_folders
from mezzotint.messages import AdapterAdded, AdapterFailed, FromWorker, Measured, ModelInfo, Stats
from mezzotint.server.metrics import Metrics
from mezzotint.server.store.keys import Key
from mezzotint.server.work.deployments import Deployment
from mezzotint.server.work.dispatch import Dispatcher
from mezzotint.server.work.endpoint_adapters import EndpointAdapters
from mezzotint.server.work.lifecycle import (
    DESIRED_BY,
    LIFE_CYCLE,
    REFUSED_ONCE_TERMINATED,
    Action,
    Command,
    Desired,
    State,
)
from mezzotint.server.work.profiles import Calibration, Profile
from mezzotint.server.work.queueing import Job
from mezzotint.server.work.scaling import Load, Policy, Watch, decide
from mezzotint.server.workers.process import WorkerSettings
from mezzotint.server.workers.replica import Replica, ReplicaState

FAILED_RETRY_S = 30.0
"""Retry-After of an endpoint that has failed: somebody has to look at it first."""
UNPLACED_RETRY_S = 10.0
"""Retry-After while no machine can be had: the next start is less than half a minute away."""

LOOKS_PER_DELAY = 4
"""Looks at the load within the shorter delay of scaling."""
SHORTEST_LOOK_S, LONGEST_LOOK_S = 0.05, 1.0
MAX_SCALINGS = 100
"""The newest scaling events that are kept."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Scaling:
    """One change of the number of workers that nobody asked for; 0 is asleep."""

    at: float
    """Seconds since 1970."""
    before: int
    after: int
    reason: str


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
        fallback: tuple[int, EndpointSettings] | None = None,
        on_calibrated: Callable[[Endpoint, Calibration], None] = lambda endpoint, calibration: None,
        on_given_up: Callable[[Endpoint, int], None] = lambda endpoint, version: None,
    ) -> None:
        """`fallback` is the last version that worked, where `version` has not been tried yet.

        `on_calibrated` is called with each measurement of the current version. `on_given_up` is called with a
        version that could not be loaded, after `current` has become the one that works.
        """
        self.id = spec.id
        self.state = State.CREATED
        self.desired = desired
        self.created = time.time() if created is None else created
        self.updated = self.created
        self.changing = asyncio.Lock()
        """Held by the registry from its look at the endpoint until database and endpoint agree."""
        self.closed = False
        self.awaking = False
        """Whether the start under way ends a sleep."""
        self.update_failure = ""
        """Why the last update was given up."""
        self._workers = workers
        self._metrics = metrics
        self._on_calibrated = on_calibrated
        self._on_given_up = on_given_up
        self._calibration = calibration
        """The newest; every new deployment begins with it."""
        self._all_replicas: set[Replica] = set()
        """Of all deployments, those that retire among them."""
        self._tasks: set[asyncio.Task[object]] = set()
        self._transition: asyncio.Task[object] | None = None
        """What ends the state DRAINING or STOPPING."""
        self._drain_until = math.inf
        """When a drain drops what is left, on the event loop's clock; SLEEP and TERMINATE set it."""
        self._idle_timer: asyncio.TimerHandle | None = None
        self.scalings: deque[Scaling] = deque(maxlen=MAX_SCALINGS)
        """The oldest first."""
        self._watch = Watch()
        self._scale_timer: asyncio.TimerHandle | None = None
        self.current = self._deployment(version, spec)
        self.next: Deployment | None = None
        """What an update or a restart brings up; not started yet while a drain or a stop is under way."""
        self._fallback = fallback
        """Version and settings to go back to if the current ones cannot be loaded."""
        self.adapters = EndpointAdapters(
            lambda: [*self.current.ready, *(self.next.ready if self.next else ())],
            lambda: self.info.pipeline_class if self.info else None,
        )
        self.dispatcher = Dispatcher(spec.max_wait_s, lambda: self.profile, lambda: self.current.ready)

    # ------------------------------------------------------------ what it is

    @property
    def spec(self) -> EndpointSettings:
        return self.current.spec

    @property
    def calibration(self) -> Calibration | None:
        """What was measured under the current settings."""
        return self.current.calibration

    @property
    def info(self) -> ModelInfo | None:
        """What the model is: as a running worker said, or as it was when it last ran."""
        for replica in self.current.replicas:
            if replica.info is not None:
                return replica.info
        return self.calibration.info if self.calibration else None

    @property
    def profile(self) -> Profile:
        return Profile(self.spec, self.info, self.dispatcher.step_seconds)

    @property
    def num_wanted(self) -> int:
        """Workers that there should be now."""
        return len(self.current.replicas) if self.desired is Desired.RUNNING else 0

    @property
    def failure(self) -> str:
        return self.current.failure

    @property
    def not_ready_because(self) -> str:
        """In words for users: what it does before it takes jobs, or why it takes none; empty when it does."""
        loading = self.current.loading(asyncio.get_running_loop().time())
        if self.state is State.FAILED:
            return without_folders(self.failure)
        if loading is not None:
            return loading.text
        return "" if self.state is State.READY else str(self.state)

    def wait_s(self, key: Key, now: float) -> float:
        """Estimated seconds before a new job of this key would get its turn."""
        limits = key.limits
        work_s = self.dispatcher.queue.work_before(key.id, limits.weight, limits.priority, now)
        return self.current.start_left_s(now) + work_s / self.dispatcher.speed

    def left_s(self, job: Job, now: float) -> float:
        """Estimated seconds until this job is done."""
        if not job.queued:
            return job.remaining_s
        queue = self.dispatcher.queue
        ahead_s = queue.running_s() + queue.ahead(job).work_s
        return self.current.start_left_s(now) + ahead_s / self.dispatcher.speed + job.work_s

    def require_available(self) -> None:
        """UnavailableError when a job could not be run however long it waited."""
        if self.state is State.FAILED:
            raise self._failed_error()
        if not self.current.ready and any(replica.unplaced for replica in self.current.replicas):
            raise UnavailableError(
                f"endpoint {self.id} has no machine to run on: {self.failure}; "
                f"its workers are started as soon as there is one",
                code="workers_unavailable",
                param="model",
                retry_after=UNPLACED_RETRY_S,
            )
        if self.desired is Desired.TERMINATED:
            raise UnavailableError(
                f"endpoint {self.id} has been terminated; its owner can restart it",
                code="endpoint_stopped",
                param="model",
                retry_after=FAILED_RETRY_S,
            )

    def _failed_error(self) -> UnavailableError:
        return UnavailableError(
            f"endpoint {self.id} has failed: {without_folders(self.failure)}; its owner can restart it",
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
            self._note_scaling(0, self.spec.num_replicas[0], "a request came")
            self.obey(Command.START)

    # ------------------------------------------------------------ commands

    def require_allowed(self, command: Command) -> None:
        """ConflictError for a command that must wait for another one."""
        if command in REFUSED_ONCE_TERMINATED and self.desired is Desired.TERMINATED:
            raise ConflictError(f"endpoint {self.id} has been terminated; restart it first")
        if command is Command.UPDATE and self.next is not None and self.state is State.READY:
            version = self.next.version
            if version != self.current.version:  # else a restart, which an update may replace
                raise ConflictError(
                    f"endpoint {self.id} is being updated to version {version}; wait for that"
                )

    def obey(self, command: Command, *, drain_s: float = math.inf) -> None:
        """Carries out a command, in the background where it takes time. Jobs may take `drain_s` to finish."""
        self.require_allowed(command)
        if self.closed:
            return
        wanted = DESIRED_BY[command]
        if wanted is not self.desired:
            self.awaking = command is Command.START and self.desired is Desired.SLEEPING
        self.desired = wanted
        if command is Command.RESTART:
            self.update_failure = ""
        elif wanted is not Desired.RUNNING:
            self._drain_until = asyncio.get_running_loop().time() + drain_s
        self._act(command)

    def update(self, spec: EndpointSettings, version: int) -> None:
        """Brings up new settings; the ones that work stay until the new ones do."""
        self.require_allowed(Command.UPDATE)
        if self.closed:
            return
        if self.next is not None:
            self._retire(self.next.replicas)
        self.next = self._deployment(version, spec, len(self.current.replicas))
        self.update_failure = ""
        self._act(Command.UPDATE)

    def calibrate(self) -> None:
        """Starts workers that measure anew how many rows a forward has; seeds may then give other bytes."""
        self._calibration = self.current.calibration = None
        self.obey(Command.RESTART)

    def take_rows(self, calibration: Calibration) -> None:
        """Starts workers that merge as many rows as those of another server on the database.

        It measured first under these settings, and the bytes of a seed are those of its rows.
        """
        if self.closed or not calibration.fits(self.spec):
            return
        log.info("another server's rows are taken", endpoint=self.id, rows=calibration.info.rows)
        self._calibration = self.current.calibration = calibration
        if self.state in (State.STARTING, State.READY):
            self._act(Command.RESTART)

    async def settled(self) -> State:
        """Waits for the end of a drain or a stop."""
        while self.state in (State.DRAINING, State.STOPPING):
            await self.dispatcher.moved()
        return self.state

    async def wait_for(self, *states: State, timeout_s: float | None = None) -> State:
        """Waits until the endpoint is in one of these states and not in the middle of an update."""
        async with asyncio.timeout(timeout_s):
            while self.state not in states or self.next is not None:
                await self.dispatcher.moved()
        return self.state

    async def close(self) -> None:
        """Ends the workers now, because the server stops; what the owner wants stays as it is."""
        self.closed = self.dispatcher.closed = True
        for timer in (self._idle_timer, self._scale_timer):
            if timer:
                timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(replica.stop() for replica in self._all_replicas))

    # ------------------------------------------------------------ actions

    def _act(self, command: Command) -> None:
        match LIFE_CYCLE[self.state][command]:
            case Action.LAUNCH:
                self._launch(State.STARTING)
            case Action.ROLL:
                self._roll()
            case Action.DRAIN:
                self._set(State.DRAINING)
                self._begin(self._drain())
            case Action.RESUME:
                self._resume()
                self._act(command)
            case Action.STOP:
                self._set(State.STOPPING)
                self._begin(self._stop())
            case Action.REST:
                self._rest()
            case Action.ADOPT:
                self._adopt_next()
            case Action.NOTHING:
                pass
        self.dispatcher.touch()

    def _launch(self, state: State) -> None:
        self._set(state)
        self.current.start()

    def _roll(self) -> None:
        if self.next is None:
            self.next = self._deployment(self.current.version, self.spec, len(self.current.replicas))
        self.next.start()

    def _resume(self) -> None:
        assert self._transition is not None
        self._transition.cancel()
        self._set(State.STARTING)
        self._follow_workers()
        if self.next is not None:  # an update that came during the drain
            self._act(Command.UPDATE)

    def _rest(self) -> None:
        self._all_replicas.difference_update(self.current.shrink(self.spec.num_replicas[0], lambda _: 0.0))
        self._set(State.SLEEPING if self.desired is Desired.SLEEPING else State.STOPPED)

    def _begin(self, transition: Coroutine[None, None, None]) -> None:
        if self._transition is not None:
            self._transition.cancel()
        self._transition = self._spawn(transition)

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(None if math.isinf(self._drain_until) else self._drain_until):
                while not self.dispatcher.idle:
                    await self.dispatcher.moved()
        self._set(State.STOPPING)
        await self._stop()

    async def _stop(self) -> None:
        replicas = set(self._all_replicas)
        if self.desired is Desired.RUNNING:  # those that retire finish their jobs
            replicas = {*self.current.replicas, *(self.next.replicas if self.next else ())}
        self._drop_late_jobs()
        await asyncio.gather(*(replica.stop() for replica in replicas))
        self._transition = None
        self._drop_late_jobs()
        if self.next is not None:
            self._adopt_next()
        if self.desired is Desired.RUNNING:
            self._launch(State.STARTING)
        elif self.dispatcher.idle:
            self._rest()
        else:  # what came while the workers ended is done first
            self._launch(State.DRAINING)
            self._begin(self._drain())

    def _drop_late_jobs(self) -> None:
        """Ends what is left when the time of a termination is up."""
        if self.desired is Desired.TERMINATED and asyncio.get_running_loop().time() >= self._drain_until:
            text = f"endpoint {self.id} was terminated before the request was done"
            dropped = self.dispatcher.end_all(RequestCancelledError(text))
            if dropped:
                log.warning("requests dropped, the endpoint ends", endpoint=self.id, num=len(dropped))

    # ------------------------------------------------------------ deployments

    def _deployment(self, version: int, spec: EndpointSettings, replicas: int = 0) -> Deployment:
        """With as many replicas as there are now, within what its settings allow."""
        least, most = spec.num_replicas
        num = max(least, min(most, replicas))
        deployment = Deployment(
            version,
            spec,
            self._workers,
            self._calibration,
            num=num,
            on_message=self._receive,
            on_change=self._replica_changed,
            on_exit=self._worker_exited,
        )
        self._all_replicas.update(deployment.replicas)
        return deployment

    def _adopt_next(self) -> None:
        """Makes the next deployment the current one before it is known to work."""
        assert self.next is not None
        if self.current.proven and self.current.version != self.next.version:
            self._fallback = (self.current.version, self.spec)
        self._replace_current(self.next)
        self.next = None

    def _replace_current(self, deployment: Deployment) -> None:
        old, self.current = self.current, deployment
        self.dispatcher.refit()
        self._retire(old.replicas)

    def _current_failed(self) -> None:
        """Goes on with the next deployment or back to the last version that worked, else fails."""
        failed = self.current
        if self.next is not None:
            self._adopt_next()
        elif self._fallback is not None:
            self._replace_current(self._deployment(*self._fallback, len(failed.replicas)))
            self.current.proven, self._fallback = True, None
            self._give_up(failed)
        else:
            self.dispatcher.end_all(self._failed_error())
            if self.state is not State.DRAINING:
                self._set(State.FAILED)
            return
        self._launch(State.DRAINING if self.state is State.DRAINING else State.STARTING)

    def _give_up(self, deployment: Deployment) -> None:
        self.update_failure = deployment.failure
        log.error("update given up", endpoint=self.id, version=deployment.version, error=deployment.failure)
        if deployment.version != self.current.version:
            self._on_given_up(self, deployment.version)

    def _retire(self, replicas: list[Replica]) -> None:
        """Stops replicas that are given no more jobs, each when it has done those that it has."""
        for replica in replicas:
            self._spawn(self._retire_when_idle(replica))

    async def _retire_when_idle(self, replica: Replica) -> None:
        while self.dispatcher.holds_jobs([replica]):
            await self.dispatcher.moved()
        await replica.stop()
        self._all_replicas.discard(replica)

    # ------------------------------------------------------------ what happens to workers

    def _replica_changed(self, replica: Replica) -> None:
        if replica.is_ready:
            self._became_ready(replica)
        coming = self.next
        if coming is not None and replica in coming.replicas:
            if len(coming.ready) == len(coming.replicas):
                self.next, self._fallback = None, None
                self._replace_current(coming)
                self._take_calibration()
                log.info("endpoint updated", endpoint=self.id, version=coming.version)
            elif replica.state is ReplicaState.FAILED:
                self.next = None
                self._give_up(coming)
                self._retire(coming.replicas)
        self._follow_workers()

    def _follow_workers(self) -> None:
        """Derives the endpoint's state from the workers of its current deployment."""
        if self.closed:
            return
        if self.state in (State.STARTING, State.READY, State.DRAINING, State.FAILED):
            if self.current.failed:
                self._current_failed()
            elif self.state is not State.DRAINING:
                self._set(State.READY if self.current.ready else State.STARTING)
        self.dispatcher.touch()
        self.dispatcher.pump()
        self._watch_idleness()
        self._watch_load()

    def _became_ready(self, replica: Replica) -> None:
        self.adapters.worker_ready(replica)
        for deployment in (self.current, self.next):
            if deployment is not None and replica in deployment.replicas:
                deployment.became_ready(replica)
        if replica in self.current.replicas:
            self.awaking, self._fallback = False, None
            self._take_calibration()

    def _take_calibration(self) -> None:
        """Keeps what the current deployment has measured; the registry stores it."""
        self._calibration = self.current.calibration
        assert self._calibration is not None
        self._on_calibrated(self, self._calibration)
        self._metrics.load_seconds.labels(self.id).set(self._calibration.load_s)
        self.dispatcher.refit()

    def _worker_exited(self, replica: Replica, crashed: bool) -> int:
        self._metrics.worker_exits.labels(self.id).inc()
        self.adapters.worker_exited(replica)
        return self.dispatcher.take_back(replica, crashed)

    def _receive(self, replica: Replica, message: FromWorker) -> None:
        match message:
            case AdapterAdded() | AdapterFailed():
                self.adapters.receive(replica, message)
            case Measured(info) if replica in self.current.replicas:
                replica.info = info
                self.current.became_ready(replica)
                self._take_calibration()
            case Stats():
                self._metrics.stats(self.id, message)
                self.dispatcher.receive(replica, message)
            case _:
                self.dispatcher.receive(replica, message)

    # ------------------------------------------------------------ small parts

    def _set(self, state: State) -> None:
        if state is not self.state:
            self.updated = time.time()
            log.info("endpoint state", endpoint=self.id, was=str(self.state), now=str(state))
            self.state = state
        self.dispatcher.touch()

    def _watch_idleness(self) -> None:
        if self._idle_timer:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self.spec.sleep_after_s is not None and self.state is State.READY:
            loop = asyncio.get_running_loop()
            run = self.current.ready[0].run
            since = max(self.dispatcher.last_used, run.ready_at or 0.0 if run else 0.0)
            when = max(since + self.spec.sleep_after_s, loop.time() + 0.01)
            self._idle_timer = loop.call_at(when, self._sleep_if_idle, self.spec.sleep_after_s)

    def _sleep_if_idle(self, after_s: float) -> None:
        idle_s = asyncio.get_running_loop().time() - self.dispatcher.last_used
        if self.dispatcher.idle and idle_s >= after_s and self.next is None:
            self._note_scaling(len(self.current.replicas), 0, f"no request for {after_s:g} s")
            self.obey(Command.SLEEP)
        else:
            self._watch_idleness()

    # ------------------------------------------------------------ scaling

    def _watch_load(self) -> None:
        """Looks at the load from time to time where the number of workers may change."""
        spec = self.spec
        least, most = spec.num_replicas
        if self._scale_timer is None and least < most and self.state is State.READY:
            look_s = min(spec.scale_up_delay_s, spec.scale_down_delay_s) / LOOKS_PER_DELAY
            look_s = max(SHORTEST_LOOK_S, min(LONGEST_LOOK_S, look_s))
            self._scale_timer = asyncio.get_running_loop().call_later(look_s, self._look_at_load)

    def _look_at_load(self) -> None:
        self._scale_timer = None
        if self.state is State.READY and self.next is None:
            loop, dispatcher, gain = asyncio.get_running_loop(), self.dispatcher, self.profile.gain
            spec, before = self.spec, len(self.current.replicas)
            delays = spec.scale_up_delay_s, spec.scale_down_delay_s
            policy = Policy(*spec.num_replicas, spec.target_backlog_s, *delays)
            num_jobs = len(dispatcher.queue) + dispatcher.num_running()
            backlog_s = dispatcher.queue.backlog_s() / gain
            load = Load(before, backlog_s, num_jobs, dispatcher.taken_s / gain)
            self._watch, decision = decide(policy, self._watch, loop.time(), load)
            if decision is not None:
                self._note_scaling(before, decision.replicas, decision.reason)
                self._scale(decision.replicas)
        else:
            self._watch = Watch()
        self._watch_load()

    def _scale(self, num: int) -> None:
        """Adds workers, or takes some out of service, which finish their jobs first."""
        if num > len(self.current.replicas):
            self._all_replicas.update(self.current.grow(num))
            self.current.start()
        else:
            self._retire(self.current.shrink(num, self.dispatcher.load_of))
            self.dispatcher.refit()
        self.dispatcher.touch()

    def _note_scaling(self, before: int, after: int, reason: str) -> None:
        self.scalings.append(Scaling(time.time(), before, after, reason))
        self._metrics.scalings.labels(self.id, "up" if after > before else "down").inc()
        log.info("endpoint scaled", endpoint=self.id, was=before, now=after, reason=reason)

    # ------------------------------------------------------------ the smallest parts

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[object]:
        """Runs a part of a change in the background."""
        task: asyncio.Task[object] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
