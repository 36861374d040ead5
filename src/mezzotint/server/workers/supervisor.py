"""Worker processes: start, watch, restart, stop.

`WorkerProcess` is one process with its pipe; two threads serve the pipe, so a worker that neither reads nor
writes can never block the event loop. `Replica` keeps one such process alive: it sees a death at once,
starts the next, kills what hangs, and gives up where another try would fail again: at once where the worker
says so, and after `max_restarts` workers in a row that died before they were of any use. A worker that was
of use and then dies is no sign of a crash loop, whatever killed it. All callbacks run in the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing import connection as mp_connection
from multiprocessing.context import (
    BaseContext,
    ForkServerContext,
    ForkServerProcess,
    SpawnContext,
    SpawnProcess,
)

import structlog

from mezzotint.config import Settings
from mezzotint.messages import (
    EXIT_PERMANENT,
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
    Pong,
    Ready,
    Shutdown,
    decode,
    encode,
)
from mezzotint.server.workers import launch

ENGINE_WORKER = "mezzotint.engine.worker:run"
PRELOAD = "mezzotint.server.workers.preload"
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
STEADY_S = 10.0
"""A worker that nobody asked for a picture has been of use when it was ready for this long."""
EXIT_GRACE_S = 1.0
"""How long a worker that has closed its pipe may take to exit before it is killed."""
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
    """Died; the next start is a moment away."""
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Launcher:
    """How worker processes start; one for the whole server."""

    target: str
    context: ForkServerContext | SpawnContext
    heartbeat_s: float
    load_timeout_s: float
    max_restarts: int
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8, "launch"))
    """Where starting a process may block (a forkserver imports torch first) and hold up nothing else."""

    @classmethod
    def of(cls, settings: Settings, target: str) -> Launcher:
        context: BaseContext = multiprocessing.get_context(settings.worker_start)
        assert isinstance(context, ForkServerContext | SpawnContext)
        if isinstance(context, ForkServerContext):
            context.set_forkserver_preload([PRELOAD, launch.__name__, target.partition(":")[0]])
        return cls(target, context, settings.heartbeat_s, settings.load_timeout_s, settings.max_restarts)


class WorkerProcess:
    """One process. The constructor blocks until it has been started: call it from a thread."""

    def __init__(
        self,
        launcher: Launcher,
        loop: asyncio.AbstractEventLoop,
        on_message: Callable[[WorkerProcess, FromWorker], None],
        on_exit: Callable[[WorkerProcess, int | None], None],
    ) -> None:
        self._loop = loop
        self._on_message = on_message
        self._on_exit = on_exit
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._pipe, theirs = launcher.context.Pipe()
        self.process: ForkServerProcess | SpawnProcess = launcher.context.Process(
            target=launch.run, args=(launcher.target, theirs), name="mezzotint-worker", daemon=True
        )
        try:
            self.process.start()
        finally:
            theirs.close()
        self.pid = self.process.pid

    def listen(self) -> None:
        """Starts the two threads; from now on callbacks come."""
        writer = threading.Thread(target=self._write, name=f"worker-{self.pid}-write", daemon=True)
        reader = threading.Thread(
            target=self._read, args=(writer,), name=f"worker-{self.pid}-read", daemon=True
        )
        writer.start()
        reader.start()

    def send(self, message: Message) -> None:
        """Hands the message to the writing thread; what a dead worker can no longer read is dropped."""
        self._outbox.put(message)

    def kill(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.process.kill()

    def _read(self, writer: threading.Thread) -> None:
        while True:
            try:
                ready = mp_connection.wait([self._pipe, self.process.sentinel])
                if self._pipe not in ready:
                    break
                message = decode(self._pipe.recv_bytes())
            except (EOFError, OSError):
                break
            except ValueError:
                log.exception("worker sent what is not a message; killing it", pid=self.pid)
                break
            self._post(self._on_message, message)
        self.process.join(EXIT_GRACE_S)
        self.kill()  # no pipe, no worker; does nothing to a process that has exited
        self.process.join()
        code = self.process.exitcode
        self._outbox.put(None)
        writer.join()  # a write to a dead process ends at once
        self._pipe.close()
        self._post(self._on_exit, code)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._pipe.send_bytes(encode(message))
            except (OSError, ValueError):
                return  # the reading thread reports the death

    def _post(self, callback: Callable[..., None], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone
            self._loop.call_soon_threadsafe(callback, self, value)


class Replica:
    """Keeps one worker of an endpoint alive. `load` gives the LoadModel for each start."""

    def __init__(
        self,
        name: str,
        launcher: Launcher,
        load: Callable[[], LoadModel],
        *,
        on_message: Callable[[Replica, FromWorker], None],
        on_change: Callable[[Replica], None],
        on_lost: Callable[[Replica], None],
    ) -> None:
        self.name = name
        self.state = ReplicaState.STOPPED
        self.info: ModelInfo | None = None
        self.load_s = 0.0
        self.stage = ""
        self.failure = ""
        """Why it is FAILED, or what the last start died of."""
        self.started_at = 0.0
        self.ready_at = 0.0
        self.num_restarts = 0
        self._launcher = launcher
        self._load = load
        self._on_message = on_message
        self._on_change = on_change
        self._on_lost = on_lost
        self._process: WorkerProcess | None = None
        self._wanted = False
        self._useless = 0
        """Workers in a row that died before they were of any use."""
        self._pardoned = False
        self._asked = False
        self._delivered = False
        """Whether the current worker was asked for a picture, and whether it has made one."""
        self._timers: list[asyncio.TimerHandle] = []
        self._starting: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._gone.set()
        self._heard = 0.0
        self._pings = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def is_ready(self) -> bool:
        return self.state is ReplicaState.READY

    def start(self) -> None:
        """Begins to start a worker in the background; also the way out of FAILED."""
        self._wanted = True
        self._useless, self._pardoned = 0, False
        self.failure = ""
        self._spawn_soon(0.0)

    def send(self, message: Message) -> None:
        assert self._process is not None, "only a live worker is sent to"
        self._asked |= isinstance(message, Generate)
        self._process.send(message)

    def kill(self) -> None:
        """Ends the process as a crash would; the replica starts another."""
        if self._process is not None:
            self._process.kill()

    def forgive(self, deaths: int) -> None:
        """Takes deaths, the one being reported among them, off the account: one job was guilty."""
        self._pardoned = True
        self._useless = max(0, self._useless - (deaths - 1))

    async def stop(self) -> None:
        """Ends the worker for good: Shutdown, then SIGKILL after a moment."""
        self._wanted = False
        self._clear_timers()
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._process is not None:
            self._process.send(Shutdown())
            try:
                await asyncio.wait_for(self._gone.wait(), STOP_GRACE_S)
            except TimeoutError:
                self.kill()
                await self._gone.wait()
        self._set(ReplicaState.STOPPED)

    # ------------------------------------------------------------ starting

    def _spawn_soon(self, pause_s: float) -> None:
        self._set(ReplicaState.PAUSED if pause_s else ReplicaState.STARTING)
        self._later(pause_s, self._begin_spawn)

    def _begin_spawn(self) -> None:
        if self._wanted:
            self._starting = asyncio.get_running_loop().create_task(self._spawn())

    async def _spawn(self) -> None:
        loop = asyncio.get_running_loop()
        self.started_at, self.stage = loop.time(), "starting the process"
        self._asked = self._delivered = False
        self._set(ReplicaState.STARTING)
        try:
            process = await loop.run_in_executor(
                self._launcher.pool, WorkerProcess, self._launcher, loop, self._receive, self._exited
            )
        except (OSError, EOFError) as error:
            log.error("worker process could not be started", replica=self.name, error=str(error))
            self._died(f"the process could not be started: {error}")
            return
        finally:
            self._starting = None
        self._process = process
        self._gone.clear()
        process.listen()
        process.send(self._load())
        self._later(self._launcher.load_timeout_s, self._give_up_loading, process)
        log.info("worker started", replica=self.name, pid=process.pid)

    def _give_up_loading(self, process: WorkerProcess) -> None:
        if process is self._process and self.state is ReplicaState.STARTING:
            self.failure = (
                f"the model was not loaded after {self._launcher.load_timeout_s:g} s (stage: {self.stage}); "
                "raise load_timeout_s if it needs longer"
            )
            log.error("worker did not load in time", replica=self.name, pid=process.pid, stage=self.stage)
            process.kill()

    # ------------------------------------------------------------ hearing

    def _receive(self, process: WorkerProcess, message: FromWorker) -> None:
        if process is not self._process:
            return
        self._heard = asyncio.get_running_loop().time()
        match message:
            case Pong():
                return
            case Busy(seconds):
                if seconds > max(STUCK_BEATS * self._launcher.heartbeat_s, self._slow_s):
                    log.error(
                        "worker is stuck; killing it", replica=self.name, pid=process.pid, s=round(seconds, 1)
                    )
                    process.kill()
                return
            case Done():
                self._delivered = True
            case Loading(stage):
                self.stage = stage
            case Ready(info, load_s):
                self.info, self.load_s, self.failure, self.stage = info, load_s, "", ""
                self.ready_at = self._heard
                self._clear_timers()
                self._later(self._launcher.heartbeat_s / 3, self._beat, process)
                log.info(
                    "worker ready",
                    replica=self.name,
                    pid=process.pid,
                    load_s=round(load_s, 3),
                    rows=info.rows,
                )
                self._set(ReplicaState.READY)
            case LoadFailed(_, text, permanent):
                self.failure = text
                log.error("model could not be loaded", replica=self.name, error=text, permanent=permanent)
                if permanent:
                    self._wanted = False
        self._on_message(self, message)

    def _beat(self, process: WorkerProcess) -> None:
        """Pings; a worker that has said nothing for `heartbeat_s` although asked is killed.

        It answers between steps only, says that it is busy during long ones, and is given longer where its
        model's steps are slow.
        """
        if process is not self._process:
            return
        silent_s = asyncio.get_running_loop().time() - self._heard
        if silent_s > max(self._launcher.heartbeat_s, self._slow_s):
            log.error(
                "worker hangs; killing it", replica=self.name, pid=process.pid, silent_s=round(silent_s, 1)
            )
            process.kill()
            return
        self._pings += 1
        process.send(Ping(self._pings))
        self._later(self._launcher.heartbeat_s / 3, self._beat, process)

    @property
    def _slow_s(self) -> float:
        return SLOW_STEPS * self.info.step_s * self.info.rows if self.info else 0.0

    # ------------------------------------------------------------ dying

    def _exited(self, process: WorkerProcess, code: int | None) -> None:
        assert process is self._process, "the next process starts only after this one has gone"
        was, self.state = self.state, ReplicaState.PAUSED
        self._process = None
        self._clear_timers()
        self._gone.set()
        self._on_lost(self)
        if was is ReplicaState.STARTING and (code == EXIT_PERMANENT or (self.failure and not self._wanted)):
            self._wanted = False
            self.failure = self.failure or "the worker said that another start would fail again"
            self._set(ReplicaState.FAILED)
        elif not self._wanted:
            self._set(ReplicaState.STOPPED)
        else:
            log.warning("worker died", replica=self.name, pid=process.pid, exit=_cause(code), state=str(was))
            useful = was is ReplicaState.READY and self._was_useful()
            self._died(self.failure or f"the worker process ended ({_cause(code)})", useful=useful)

    def _was_useful(self) -> bool:
        idle_s = asyncio.get_running_loop().time() - self.ready_at
        return self._delivered or (not self._asked and idle_s >= STEADY_S)

    def _died(self, reason: str, *, useful: bool = False) -> None:
        self.failure = reason
        if useful:
            self._useless = 0
        elif not self._pardoned:
            self._useless += 1
        self._pardoned = False
        if self._useless > self._launcher.max_restarts:
            self._wanted = False
            self.failure = (
                f"{self._useless} workers in a row died before they had made a picture, "
                f"the last because: {reason}"
            )
            log.error("endpoint gives up restarting", replica=self.name, deaths=self._useless)
            self._set(ReplicaState.FAILED)
            return
        self.num_restarts += 1
        exponent = self._useless - 2  # the first restart is at once
        self._spawn_soon(0.0 if exponent < 0 else min(FIRST_PAUSE_S * 2**exponent, LONGEST_PAUSE_S))

    # ------------------------------------------------------------ small parts

    def _set(self, state: ReplicaState) -> None:
        if state is not self.state:
            self.state = state
            self._on_change(self)

    def _later(self, delay_s: float, callback: Callable[..., None], *values: object) -> None:
        loop = asyncio.get_running_loop()
        self._timers = [timer for timer in self._timers if timer.when() > loop.time()]
        self._timers.append(loop.call_later(delay_s, callback, *values))

    def _clear_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()


def _cause(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
