"""The worker process: receive, admit, step, send. One thread runs this loop, a second only writes, a third
tells the server that the process is alive during a long forward.

Importing this module imports what a model needs, so that a forkserver which has preloaded it starts workers
in hundredths of a second. Nothing here touches a device before a model is asked for.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe, wait

import diffusers
import transformers
from tqdm.std import tqdm

from mezzotint.engine import Engine, compiling
from mezzotint.engine.lora.bank import CheckedFile
from mezzotint.engine.recheck import Recheck
from mezzotint.engine.steps.runner import is_out_of_memory
from mezzotint.errors import ModelLoadError
from mezzotint.messages import (
    EXIT_PERMANENT,
    AdapterAdded,
    AdapterFailed,
    AddAdapter,
    Busy,
    Cancel,
    Cancelled,
    FromWorker,
    Generate,
    LoadFailed,
    Loading,
    LoadModel,
    Measured,
    Message,
    Ping,
    Pong,
    PrefetchAdapter,
    Preview,
    Progress,
    Ready,
    RemoveAdapter,
    Shutdown,
    Stats,
    decode,
    encode,
)
from mezzotint.spec import AdapterSpec

MAX_BACKLOG = 256
"""Unsent messages above which progress, previews and stats are dropped: a sleeping reader costs little."""
STATS_EVERY_S = 1.0
BUSY_EVERY_S = 0.5
FLUSH_S = 5.0
"""How long the last messages may take to leave before the process ends."""

PRELOAD = (
    "diffusers.guiders",
    "diffusers.pipelines.flux.pipeline_flux",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)
"""Modules that both libraries would otherwise import only when the built-in model loads."""

_DROPPABLE = (Progress, Preview, Stats, Busy)
_log = logging.getLogger(__name__)


def run(connection: Connection) -> None:
    """The process: one LoadModel, then jobs until Shutdown or until the other end is gone.

    Exits with EXIT_PERMANENT where another start would fail in the same way, with 1 where it might not.
    """
    _quiet_libraries()
    outbox = Outbox(connection)
    try:
        message = decode(connection.recv_bytes())
        assert isinstance(message, LoadModel), "the first message names the model"
        loaded = _load(message, outbox)
        if isinstance(loaded, Engine):
            Worker(connection, outbox, loaded, message).loop()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the server is gone: nobody is left to work for
    finally:
        outbox.close()
    if isinstance(loaded, LoadFailed):
        sys.exit(EXIT_PERMANENT if loaded.permanent else 1)


def _load(message: LoadModel, outbox: Outbox) -> Engine | LoadFailed:
    """The engine, after it has told the server so with Ready; or the LoadFailed that it has told."""
    start = time.perf_counter()
    try:
        engine = Engine.load(
            message.source,
            message.settings,
            rows=message.rows,
            proof=message.proof,
            form=message.form,
            rows_form=message.rows_form or None,
            progress=lambda stage, fraction: outbox.send(Loading(stage, fraction)),
        )
    except Exception as error:
        failed = _load_failed(error)
        outbox.send(failed)
        return failed
    gc.collect()
    gc.freeze()  # what is there now stays: later collections need not look through it
    outbox.send(Ready(engine.info(), time.perf_counter() - start))
    return engine


def _load_failed(error: Exception) -> LoadFailed:
    if isinstance(error, ModelLoadError):
        return LoadFailed(error.code, error.message, error.permanent)
    _log.error("loading the model failed", exc_info=error)
    text = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        advice = "not enough memory; choose a smaller dtype, a smaller default size or turn on offload"
        return LoadFailed(
            "not_enough_memory", f"the model did not survive its first forward: {advice}", False
        )
    return LoadFailed("model_load_failed", f"the model was read but failed its first picture: {text}", True)


def _quiet_libraries() -> None:
    """Warnings and worse to stderr; of the libraries only errors, for their warnings quote prompts.

    The progress bars, shown or not, would make a lock between processes, which a killed worker leaves behind.
    """
    tqdm.set_lock(threading.RLock())
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s"
    )
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _preload() -> None:
    """Imports PRELOAD without the advice that transformers has for each optional package."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    for name in PRELOAD:
        importlib.import_module(name)
    transformers.utils.logging.set_verbosity(before)


class Outbox:
    """Sends from a thread of its own, so that a reader that does not read never holds up a step."""

    def __init__(self, connection: Connection) -> None:
        self.broken = threading.Event()
        """Set by the writing thread when the reader is gone; ends the worker's loop."""
        self._connection = connection
        self._queue: queue.SimpleQueue[FromWorker | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="outbox", daemon=True)
        self._thread.start()

    def send(self, message: FromWorker) -> None:
        """Queues `message`; with a long backlog, drops what a later message makes good."""
        if self._queue.qsize() < MAX_BACKLOG or not isinstance(message, _DROPPABLE):
            self._queue.put(message)

    def close(self) -> None:
        """Waits a little until everything has left."""
        self._queue.put(None)
        self._thread.join(FLUSH_S)

    def _write(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                self._connection.send_bytes(encode(message))
            except (OSError, ValueError):
                self.broken.set()
                return


class Pulse:
    """Says `Busy` from its own thread while a turn of the loop takes long; torch lets it run meanwhile."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._began: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Around one turn of the loop."""
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._began = None

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._closed.wait(BUSY_EVERY_S):
            began = self._began
            if began is not None and (seconds := time.monotonic() - began) >= BUSY_EVERY_S:
                self._outbox.send(Busy(seconds))


class Worker:
    """The loop around one engine."""

    def __init__(self, connection: Connection, outbox: Outbox, engine: Engine, message: LoadModel) -> None:
        """`message` is what the engine was made from."""
        self.engine = engine
        self._connection = connection
        self._outbox = outbox
        self._open = True
        self._stats = StatsReporter(engine)
        self._pulse = Pulse(outbox)
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="adapter-checker")
        self._checks: dict[str, tuple[AdapterSpec, Future[CheckedFile]]] = {}
        """By route, the adapters whose file is being checked; filled by `_check`, emptied as they finish."""
        self._held: list[Generate] = []
        """Requests for those adapters."""
        self._woken, self._wake = Pipe(duplex=False)
        """Both ends of a pipe through which a finished check wakes the idle loop."""
        self._build = compiling.begin(engine, message, self._wake_up)
        """Compiles the model for the endpoint's next start; None where there is nothing to compile."""
        if self._build is not None:
            outbox.send(Measured(engine.info()))
        self._recheck = Recheck(engine, message.settings, lambda: connection.poll() or self._woken.poll())

    def loop(self) -> None:
        """Runs until Shutdown; EOFError when the other end is gone."""
        try:
            while self._open and not self._outbox.broken.is_set():
                if not self.engine.has_work and not self._stats.pending:
                    self._idle()
                with self._pulse.turn():
                    self._turn()
        finally:
            self._pulse.close()
            self._checker.shutdown(wait=False, cancel_futures=True)
            if self._build is not None:
                self._build.close()
            self.engine.close()

    def _idle(self) -> None:
        """Waits for the next message; measures again meanwhile if there is time and a reason."""
        while not wait([self._connection, self._woken], self._recheck.due_s()):
            with self._pulse.turn():
                found = self._recheck.measure()
            if found is not None:
                self._outbox.send(Measured(found))

    def _turn(self) -> None:
        while self._open and self._connection.poll():
            self._receive(decode(self._connection.recv_bytes()))
        self._finish_checks()
        if self._build is not None and self._build.ended:
            compiling.end(self.engine, self._build)
            self._build = None
            self._outbox.send(Measured(self.engine.info()))
        if self.engine.has_work:
            self._recheck.worked()
        for event in self.engine.step():
            self._outbox.send(event)
        stats = self._stats.due()
        if stats is not None:
            self._outbox.send(stats)

    def _receive(self, message: Message) -> None:
        match message:
            case Generate():
                self._generate(message)
            case Cancel(job_id):
                self._cancel(job_id)
            case Ping(number):
                self._outbox.send(Pong(number))
            case AddAdapter(adapter):
                self._check(adapter)
            case RemoveAdapter(route):
                self._checks.pop(route, None)
                self.engine.enable_adapters().remove(route)
                self._release_held(route)
            case PrefetchAdapter(route):
                self.engine.enable_adapters().prefetch(route)
            case Shutdown():
                self._open = False
            case _:
                _log.warning("a worker does not expect %s", type(message).__name__)

    def _generate(self, message: Generate) -> None:
        if any(route in self._checks for route in message.spec.routes):
            self._held.append(message)
            return
        self.engine.submit(
            message.spec,
            message.job_id,
            num_previews=message.num_previews,
            priority=message.priority,
            owner=message.owner,
        )

    def _cancel(self, job_id: str) -> None:
        held = next((each for each in self._held if each.job_id == job_id), None)
        if held is not None:
            self._held.remove(held)
            self._outbox.send(Cancelled(job_id))
        else:
            self.engine.cancel(job_id)

    # ------------------------------------------------------------------ adapters

    def _check(self, adapter: AdapterSpec) -> None:
        """Has the file read and checked in the background: running requests do not wait for it."""
        bank = self.engine.enable_adapters()  # patches the layers, in this thread
        future = self._checker.submit(bank.check, adapter.path, checksum=adapter.checksum)
        self._checks[adapter.route] = (adapter, future)
        future.add_done_callback(self._wake_up)

    def _wake_up(self, *_: Future[CheckedFile]) -> None:
        with contextlib.suppress(OSError):
            self._wake.send_bytes(b"!")

    def _finish_checks(self) -> None:
        while self._woken.poll():
            self._woken.recv_bytes()
        finished = [route for route, (_, future) in self._checks.items() if future.done()]
        for route in finished:
            adapter, future = self._checks.pop(route)
            self._outbox.send(self._register(adapter, future))
            self._release_held(route)

    def _release_held(self, route: str) -> None:
        """Submits what waited for this adapter, which is registered now or refused."""
        held, self._held = self._held, []
        for each in held:  # those that wait for another adapter are held again
            self._generate(each)

    def _register(self, adapter: AdapterSpec, future: Future[CheckedFile]) -> AdapterAdded | AdapterFailed:
        try:
            info = self.engine.enable_adapters().register(adapter.route, future.result(), scale=adapter.scale)
        except ModelLoadError as error:
            return AdapterFailed(adapter.route, adapter.path, error.code, error.message)
        except Exception as error:
            _log.exception("checking adapter %s failed", adapter.route)
            text = f"{type(error).__name__}: {error}"
            return AdapterFailed(adapter.route, adapter.path, "adapter_load_failed", text)
        file = info.file
        return AdapterAdded(adapter.route, adapter.path, file.rank, file.num_bytes, file.target_modules)


class StatsReporter:
    """Makes a Stats message once a second and when the engine turns idle: what it did since the last one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._last = self._now()
        self._sent_at = time.monotonic()
        self._idle = True

    @property
    def pending(self) -> bool:
        """Whether the engine has turned idle since the last message."""
        return not self._idle

    def due(self) -> Stats | None:
        """The message, if it is time for one."""
        has_work = self._engine.has_work
        if has_work:
            self._idle = False
        elif self._idle:
            return None
        now = time.monotonic()
        if has_work and now - self._sent_at < STATS_EVERY_S:
            return None
        self._sent_at, self._idle = now, not has_work
        before, self._last = self._last, self._now()
        new = [now - then for now, then in zip(self._last, before, strict=True)]
        bank = self._engine.bank_stats()
        return Stats(
            num_jobs=self._engine.num_jobs,
            forwards=int(new[0]),
            rows=int(new[1]),
            padded_rows=int(new[2]),
            busy_s=new[3],
            step_s=self._engine.times.table(),
            adapters_resident=len(bank.resident_routes),
            adapter_bytes=bank.num_bytes,
            adapter_hits=int(new[4]),
            adapter_loads=int(new[5]),
            adapter_evictions=int(new[6]),
            resident_routes=bank.resident_routes,
            text_hits=int(new[7]),
            text_misses=int(new[8]),
            text_bytes=self._engine.runner.texts.num_bytes,
        )

    def _now(self) -> tuple[float, ...]:
        runner, bank = self._engine.runner, self._engine.bank_stats()
        forwards = (runner.num_forwards, runner.num_real_rows, runner.num_padded_rows)
        adapters = (bank.hits, bank.loads, bank.evictions)
        return (*forwards, self._engine.busy_s, *adapters, runner.texts.hits, runner.texts.misses)


_preload()
