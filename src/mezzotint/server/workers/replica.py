"""One replica of an endpoint: a worker, and the next one when it has died.

A `WorkerRun` is one process from its start to its exit, with all that is known of it. A `Replica` has at most
one run at a time, drops it whole when it ends, and asks its RestartPolicy what comes next. All methods and
callbacks run in the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import StrEnum

import structlog

from mezzotint.messages import (
    EXIT_UNPLACED,
    Busy,
    Done,
    FromWorker,
    Generate,
    LoadFailed,
    Loading,
    LoadModel,
    Message,
    ModelInfo,
    Ping,
    Placed,
    Pong,
    Ready,
    Shutdown,
)
from mezzotint.server.workers.policy import Exit, GiveUp, Restart, RestartPolicy
from mezzotint.server.workers.process import WorkerProcess, WorkerSettings

SLOW_STEPS = 20
"""A worker is never taken for hung before it could have done this many steps of a full batch."""
STUCK_BEATS = 20
"""A worker that says it is busy may be at one forward for this many times `heartbeat_s`."""
STOP_GRACE_S = 2.0
"""How long a worker may take to exit after Shutdown before it is killed."""

log = structlog.get_logger(__name__)


class ReplicaState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    PAUSED = "paused"
    """Its worker died; the next start is a moment away."""
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


class WorkerRun:
    """One worker process: started, watched, and over at its exit."""

    def __init__(
        self,
        name: str,
        settings: WorkerSettings,
        load: Callable[[], LoadModel],
        *,
        on_ready: Callable[[Ready], None],
        on_message: Callable[[FromWorker], None],
        on_exit: Callable[[Exit], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.started_at = loop.time()
        self.ready_at: float | None = None
        self.loading: Loading | None = Loading("starting a worker")
        """What it does until it is ready, as it says itself; None once it is."""
        self.node: str | None = None
        """Where it runs, if not on this machine."""
        self.ended = asyncio.Event()
        self._log = log.bind(replica=name)
        self._settings = settings
        self._load = load
        self._on_ready = on_ready
        self._on_message = on_message
        self._on_exit = on_exit
        self._process: WorkerProcess | None = None
        self._info: ModelInfo | None = None
        self._asked = self._delivered = self._permanent = self._stopping = False
        self._failure = ""
        """Why it could not load or was killed; goes into its Exit."""
        self._pings = 0
        self._deadline = self.started_at + settings.load_timeout_s
        """When it is killed unless it is ready, and then unless it has said something."""
        self._timer = loop.call_at(self._deadline, self._check, self._deadline)
        self._start = loop.create_task(self._start_process())

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def send(self, message: Message) -> None:
        assert self._process is not None, "only a ready worker is sent to"
        self._asked |= isinstance(message, Generate)
        self._process.send(message)

    def kill(self, reason: str) -> None:
        """Ends the process as a crash would, for a reason that its Exit tells."""
        self._log.error("killing the worker", pid=self.pid, reason=reason)
        self._failure = self._failure or reason
        if self._process is not None:
            self._process.kill()
        else:
            self._abandon_start()

    def shut_down(self) -> None:
        """Asks the worker to exit, and kills it if it has not after a moment."""
        self._stopping = True
        self._timer.cancel()
        if self._process is None:
            self._abandon_start()
        else:
            self._process.send(Shutdown())
            self._timer = asyncio.get_running_loop().call_later(STOP_GRACE_S, self._process.kill)

    async def _start_process(self) -> None:
        try:
            process = await self._settings.carrier.start()
            process.listen(self._receive, self._exited)
        except Exception as error:
            self._log.error("worker process could not be started", error=str(error))
            self._end(Exit(started=False, failure=f"the process could not be started: {error}"))
            return
        self._process = process
        process.send(self._load())
        self._log.info("worker started", pid=process.pid)

    def _abandon_start(self) -> None:
        self._start.cancel()
        self._end(Exit(started=False, failure=self._failure))

    def _receive(self, message: FromWorker) -> None:
        if self.ready_at is not None:
            self._deadline = asyncio.get_running_loop().time() + self._patience_s
        match message:
            case Pong():
                pass
            case Busy(seconds):
                if seconds > max(STUCK_BEATS * self._settings.heartbeat_s, self._slow_s):
                    self.kill(f"it was busy with one forward for {seconds:.0f} s and was killed")
            case Loading():
                self.loading = message
            case Placed(node):
                self.node = node
            case Ready():
                if not self._stopping:
                    self._became_ready(message)
            case LoadFailed(_, text, permanent):
                self._log.error("model could not be loaded", error=text, permanent=permanent)
                self._failure, self._permanent = text, permanent
            case _:
                self._delivered |= isinstance(message, Done)
                self._on_message(message)

    def _became_ready(self, message: Ready) -> None:
        info, load_s = message.info, message.load_s
        self._log.info("worker ready", pid=self.pid, load_s=round(load_s, 3), rows=info.rows)
        self._info, self.loading, self._failure = info, None, ""
        self.ready_at = asyncio.get_running_loop().time()
        self._deadline = self.ready_at + self._patience_s
        self._timer.cancel()
        self._schedule_check(self.ready_at)
        self._on_ready(message)

    # ------------------------------------------------------------ watching

    @property
    def _slow_s(self) -> float:
        return SLOW_STEPS * self._info.step_s * self._info.rows if self._info else 0.0

    @property
    def _patience_s(self) -> float:
        """It answers between steps only, so it is given longer where its model's steps are slow."""
        return max(self._settings.heartbeat_s, self._slow_s)

    def _schedule_check(self, now: float) -> None:
        due = min(self._deadline, now + self._settings.heartbeat_s / 3)
        self._timer = asyncio.get_running_loop().call_at(due, self._check, due)

    def _check(self, due: float) -> None:
        """Kills the worker when its time is up, else asks it for a sign of life."""
        now, beat_s = asyncio.get_running_loop().time(), self._settings.heartbeat_s / 3
        if now - due > beat_s:  # the server itself stood still and has yet to hear what was said meanwhile
            self._deadline = max(self._deadline + now - due, now + beat_s)
        if now < self._deadline:
            if self.ready_at is not None:
                self._pings += 1
                self.send(Ping(self._pings))
            self._schedule_check(now)
        elif self.ready_at is None:
            limit_s, stage = self._settings.load_timeout_s, self.loading.stage if self.loading else ""
            self.kill(
                f"the model was not loaded after {limit_s:g} s (stage: {stage}); "
                "raise load_timeout_s if it needs longer"
            )
        else:
            self.kill(f"it said nothing for {self._patience_s:g} s and was killed")

    # ------------------------------------------------------------ ending

    def _exited(self, code: int | None) -> None:
        now = asyncio.get_running_loop().time()
        self._end(
            Exit(
                code,
                ready_s=None if self.ready_at is None else now - self.ready_at,
                asked=self._asked,
                delivered=self._delivered,
                failure=self._failure,
                permanent=self._permanent,
            )
        )

    def _end(self, exit: Exit) -> None:
        self._timer.cancel()
        if not self.ended.is_set():
            self.ended.set()
            self._on_exit(exit)


class Replica:
    """Keeps one worker of an endpoint alive."""

    def __init__(
        self,
        name: str,
        settings: WorkerSettings,
        load: Callable[[], LoadModel],
        *,
        on_message: Callable[[Replica, FromWorker], None],
        on_change: Callable[[Replica], None],
        on_exit: Callable[[Replica, bool], int],
    ) -> None:
        """`load` makes the LoadModel for each start. `on_change` is called after each change of `state`.

        `on_exit` is called when a worker has ended, with True if it crashed. It returns how many crashes,
        this one included, were the fault of a job that has been given up.
        """
        self.name = name
        self.state = ReplicaState.STOPPED
        self.run: WorkerRun | None = None
        self.info: ModelInfo | None = None
        """The model as the last ready worker described it; outlives the run."""
        self.load_s = 0.0
        self.failure = ""
        """Why it is FAILED, or what the last worker died of before one was ready again."""
        self.unplaced = False
        """Whether the last worker found no machine to run on."""
        self.num_restarts = 0
        self._settings = settings
        self._load = load
        self._on_message = on_message
        self._on_change = on_change
        self._on_exit = on_exit
        self._policy = RestartPolicy(settings.max_restarts)
        self._pause: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        return self.run.pid if self.run else None

    @property
    def node(self) -> str | None:
        """Where its worker runs, if not on this machine."""
        return self.run.node if self.run else None

    @property
    def loading(self) -> Loading | None:
        """What its worker does before it is ready; None without a worker, or once it is."""
        return self.run.loading if self.run else None

    @property
    def is_ready(self) -> bool:
        return self.state is ReplicaState.READY

    def start(self) -> None:
        """Begins to start a worker in the background; for a replica that is STOPPED or FAILED."""
        assert self.run is None
        self._policy = RestartPolicy(self._settings.max_restarts)
        self.failure = ""
        self._start_worker()

    def send(self, message: Message) -> None:
        assert self.run is not None, "only a ready worker is sent to"
        self.run.send(message)

    async def stop(self) -> None:
        """Ends the worker for good."""
        if self._pause is not None:
            self._pause.cancel()
        run = self.run
        if run is None:
            self._set(ReplicaState.STOPPED)
        else:
            self._set(ReplicaState.STOPPING)
            run.shut_down()
            await run.ended.wait()

    def _start_worker(self) -> None:
        self._pause = None
        self.run = WorkerRun(
            self.name,
            self._settings,
            self._load,
            on_ready=self._became_ready,
            on_message=lambda message: self._on_message(self, message),
            on_exit=self._worker_exited,
        )
        self._set(ReplicaState.STARTING)

    def _became_ready(self, message: Ready) -> None:
        if self.state is ReplicaState.STARTING:  # else it is stopping
            self.info, self.load_s, self.failure = message.info, message.load_s, ""
            self.unplaced = False
            self._set(ReplicaState.READY)

    def _worker_exited(self, exit: Exit) -> None:
        crashed, self.run = self.state is not ReplicaState.STOPPING, None
        self.state = ReplicaState.PAUSED  # what jobs it had find no ready worker here
        forgiven = self._on_exit(self, crashed) if exit.started else 0
        if not crashed:
            self._set(ReplicaState.STOPPED)
            return
        log.warning("worker died", replica=self.name, reason=exit.reason, ready_s=exit.ready_s)
        self.unplaced = exit.code == EXIT_UNPLACED
        verdict = self._policy.on_exit(exit, forgiven)
        self.failure = verdict.reason
        match verdict:
            case GiveUp():
                log.error("replica gives up restarting", replica=self.name, reason=verdict.reason)
                self._set(ReplicaState.FAILED)
            case Restart(pause_s):
                self.num_restarts += 1
                if pause_s:
                    self._pause = asyncio.get_running_loop().call_later(pause_s, self._start_worker)
                    self._on_change(self)
                else:
                    self._start_worker()

    def _set(self, state: ReplicaState) -> None:
        if state is not self.state:
            self.state = state
            self._on_change(self)
