"""One worker process, and the carrier that starts workers on this machine.

The server knows a worker as a `WorkerProcess` and gets it from a `Carrier`. A carrier that runs workers
elsewhere implements these two protocols; nothing else in the server knows how a message travels.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import multiprocessing
import os
import queue
import selectors
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import BaseContext, ForkServerContext, SpawnContext
from typing import Protocol

import structlog

from mezzotint.config import Settings
from mezzotint.errors import ConfigError
from mezzotint.messages import FromWorker, Message, decode, encode
from mezzotint.server.workers import launch

ENGINE_WORKER = "mezzotint.engine.worker:run"
RELAY = "mezzotint.server.workers.on_ray:run"
"""A process that stands for a worker on another machine."""
PRELOAD = "mezzotint.server.workers.preload"
EXIT_GRACE_S = 1.0
"""How long a worker that has closed its pipe may take to exit before it is killed."""
THREAD_GRACE_S = 0.5
"""How long a thread may take to end once its worker has ended."""
START_DESCRIPTORS = 16
"""File descriptors that one start needs, and some to spare."""

log = structlog.get_logger(__name__)

OnMessage = Callable[[FromWorker], None]
OnExit = Callable[[int | None], None]


class WorkerProcess(Protocol):
    """A worker that has been started. All methods return at once and are called in the event loop."""

    @property
    def pid(self) -> int | None: ...

    def listen(self, on_message: OnMessage, on_exit: OnExit) -> None:
        """Begins to call back, in the event loop; `on_exit` comes once, last, with the exit code if known.

        OSError, after which the worker is gone, when that is not possible.
        """

    def send(self, message: Message) -> None:
        """Queues a message; one that the worker can no longer read is dropped."""

    def kill(self) -> None:
        """Ends the worker as a crash would; does nothing to one that has exited."""


class Carrier(Protocol):
    """Starts workers."""

    async def start(self) -> WorkerProcess:
        """Starts one worker; OSError or EOFError when it cannot. Cancelled, it leaves no worker behind."""

    def close(self) -> None:
        """Lets go of what workers were started with, once all of them should have ended."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """How the server's workers are started, watched and restarted; the same for all endpoints."""

    carrier: Carrier
    heartbeat_s: float
    load_timeout_s: float
    max_restarts: int

    @classmethod
    def of(cls, settings: Settings, target: str) -> WorkerSettings:
        if settings.ray is None:
            carrier = LocalCarrier(target, settings.worker_start)
        elif importlib.util.find_spec("ray") is None:
            raise ConfigError(
                "ray: workers on Ray need it; pip install 'mezzotint[server,ray]'", code="not_installed"
            )
        else:
            carrier = LocalCarrier(RELAY, settings.worker_start, (settings.ray, target))
        return cls(carrier, settings.heartbeat_s, settings.load_timeout_s, settings.max_restarts)


class LocalCarrier:
    """Starts workers as processes of this machine, by a forkserver or by `spawn`."""

    def __init__(self, target: str, method: str, arguments: tuple[str, ...] = ()) -> None:
        """`arguments` are passed to the target's function behind the connection."""
        context: BaseContext = multiprocessing.get_context(method)
        assert isinstance(context, ForkServerContext | SpawnContext)
        if isinstance(context, ForkServerContext):
            context.set_forkserver_preload([PRELOAD, launch.__name__, target.partition(":")[0]])
        self._context = context
        self._arguments = (target, *arguments)
        self._threads: set[threading.Thread] = set()
        """Threads that start a process or wait for its exit; each takes itself out at its end."""

    async def start(self) -> WorkerProcess:
        """Blocks a thread of its own: a forkserver imports torch first, and a stopped one never answers."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[LocalProcess] = loop.create_future()

        def deliver(outcome: LocalProcess | Exception) -> None:
            if isinstance(outcome, Exception):
                if not started.cancelled():
                    started.set_exception(outcome)
            elif started.cancelled():
                outcome.discard()
            else:
                started.set_result(outcome)

        def work() -> None:
            outcome: LocalProcess | Exception
            try:
                outcome = LocalProcess(self._context, self._arguments, self._run_thread)
            except Exception as error:  # raised again in the event loop
                outcome = error
            try:
                loop.call_soon_threadsafe(deliver, outcome)
            except RuntimeError:  # the loop is closed: the server is gone
                if isinstance(outcome, LocalProcess):
                    outcome.discard()

        self._run_thread("worker-start", work)
        try:
            return await started
        except asyncio.CancelledError:
            if started.done() and not started.cancelled() and started.exception() is None:
                started.result().discard()
            raise

    def close(self) -> None:
        """Kills a forkserver that reports nothing any more: the interpreter would wait for it at its end."""
        for thread in list(self._threads):
            thread.join(THREAD_GRACE_S)
        pid = getattr(forkserver, "_forkserver")._forkserver_pid  # noqa: B009
        if self._threads and pid is not None and isinstance(self._context, ForkServerContext):
            log.error("the forkserver does not answer; killing it", pid=pid, waiting=len(self._threads))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _run_thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            finally:
                self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError as error:
            self._threads.discard(thread)
            raise OSError(f"no thread for a worker: {error}") from None
        return thread


class LocalProcess:
    """A process and its pipe; two threads serve the pipe, so that a worker can never block the event loop.

    The constructor blocks until the process has been started.
    """

    def __init__(
        self,
        context: ForkServerContext | SpawnContext,
        arguments: tuple[str, ...],
        run_thread: Callable[[str, Callable[[], None]], threading.Thread],
    ) -> None:
        _require_descriptors()
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._run_thread = run_thread
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=launch.run,
            args=(arguments[0], theirs, *arguments[1:]),
            name="mezzotint-worker",
            daemon=True,
        )
        try:
            self._process.start()
        except BaseException:
            self._pipe.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def listen(self, on_message: OnMessage, on_exit: OnExit) -> None:
        loop = asyncio.get_running_loop()

        def post(callback: Callable[..., None], value: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is gone
                loop.call_soon_threadsafe(callback, value)

        def read() -> None:
            self._read(lambda message: post(on_message, message))
            code = self._end(writer)
            post(on_exit, code)

        try:
            writer = self._run_thread(f"worker-{self.pid}-write", self._write)
            self._run_thread(f"worker-{self.pid}-read", read)
        except OSError:
            self.discard()
            raise

    def send(self, message: Message) -> None:
        self._outbox.put(message)

    def kill(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._process.kill()

    def discard(self) -> None:
        """Ends a process that nobody listens to."""
        self.kill()
        self._outbox.put(None)
        self._pipe.close()

    def _read(self, on_message: OnMessage) -> None:
        with selectors.PollSelector() as selector:  # takes no descriptor, of which there may be none left
            selector.register(self._pipe, selectors.EVENT_READ)
            selector.register(self._process.sentinel, selectors.EVENT_READ)
            while any(key.fileobj is self._pipe for key, _ in selector.select()):
                try:
                    message = decode(self._pipe.recv_bytes())
                    if not isinstance(message, FromWorker):
                        raise ValueError(f"a {type(message).__name__} is for workers")
                except (EOFError, OSError):
                    return
                except ValueError:
                    log.exception("worker sent what is not a message; killing it", pid=self.pid)
                    return
                on_message(message)

    def _end(self, writer: threading.Thread) -> int | None:
        self._process.join(EXIT_GRACE_S)
        self.kill()  # no pipe, no worker
        self._process.join()
        self._outbox.put(None)
        writer.join()  # a write to a dead process ends at once
        self._pipe.close()
        return self._process.exitcode

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._pipe.send_bytes(encode(message))
            except (OSError, ValueError):
                return  # the reading thread reports the death


def _require_descriptors() -> None:
    """OSError when too few are left for a start: multiprocessing itself would leak the last of them."""
    taken: list[int] = []
    try:
        for _ in range(START_DESCRIPTORS):
            taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        for descriptor in taken:
            os.close(descriptor)
