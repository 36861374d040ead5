"""A carrier whose workers are objects in the event loop: thousands of starts and deaths a second.

They paint like `fake_worker` and understand its `load_s`, `step_s` and `fail_load`. A test may make them
silent or dead at any moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from mezzotint.fake_worker import model_info, paint, parse_source
from mezzotint.messages import (
    EXIT_PERMANENT,
    Cancel,
    Done,
    FromWorker,
    Generate,
    LoadFailed,
    LoadModel,
    Message,
    Ping,
    Pong,
    Progress,
    Ready,
    Shutdown,
)
from mezzotint.server.workers.process import OnExit, OnMessage

SIZE = 8


class FakeProcess:
    """A worker without a process."""

    def __init__(self, pid: int, exit_s: float = 0.0) -> None:
        self.pid = pid
        self._exit_s = exit_s
        self.alive = True
        self.silent = False
        """Reads nothing and says nothing, as a stopped process."""
        self.received: list[Message] = []
        self.load: LoadModel | None = None
        self._jobs: dict[str, Generate] = {}
        self._on_message: OnMessage = lambda message: None
        self._on_exit: OnExit = lambda code: None
        self._step_s = 0.0

    def listen(self, on_message: OnMessage, on_exit: OnExit) -> None:
        self._on_message, self._on_exit = on_message, on_exit

    def send(self, message: Message) -> None:
        self.received.append(message)
        self._soon(self._answer, message)

    def kill(self) -> None:
        self.exit(-9)

    def exit(self, code: int | None) -> None:
        if self.alive:
            self.alive = False
            asyncio.get_running_loop().call_soon(self._on_exit, code)

    def say(self, message: FromWorker) -> None:
        if self.alive and not self.silent:
            asyncio.get_running_loop().call_soon(self._on_message, message)

    def _soon(self, callback: Callable[..., None], *values: object, delay_s: float = 0.0) -> None:
        def call() -> None:
            if self.alive and not self.silent:
                callback(*values)

        asyncio.get_running_loop().call_later(delay_s, call)

    def _answer(self, message: Message) -> None:
        match message:
            case LoadModel():
                self.load = message
                self._soon(self._loaded, message, delay_s=float(parse_source(message.source)["load_s"]))
            case Generate(job_id):
                self._jobs[job_id] = message
                self._soon(self._step, job_id, 1, delay_s=self._step_s)
            case Cancel(job_id):
                self._jobs.pop(job_id, None)
            case Ping(number):
                self.say(Pong(number))
            case Shutdown():
                self._soon(self.exit, 0, delay_s=self._exit_s)
            case _:
                pass

    def _loaded(self, load: LoadModel) -> None:
        options = parse_source(load.source)
        self._step_s = float(options["step_s"])
        if kind := options["fail_load"]:
            permanent = kind == "permanent"
            self.say(LoadFailed("model_load_failed", "the fake model cannot be loaded", permanent))
            self._soon(self.exit, EXIT_PERMANENT if permanent else 1)
        else:
            self.say(Ready(model_info(load, SIZE, self._step_s), 0.0))

    def _step(self, job_id: str, step: int) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        self.say(Progress(job_id, step, job.spec.num_inference_steps))
        if step < job.spec.num_inference_steps:
            self._soon(self._step, job_id, step + 1, delay_s=self._step_s)
        else:
            del self._jobs[job_id]
            self.say(Done(job_id, SIZE, SIZE, 0.0, paint(job.spec, SIZE, SIZE)))


class FakeCarrier:
    """Starts FakeProcesses, and remembers all that it ever started."""

    def __init__(self, exit_s: float = 0.0) -> None:
        self.exit_s = exit_s
        """Seconds that a worker takes to exit after Shutdown; it goes on with its jobs meanwhile."""
        self.started: list[FakeProcess] = []
        self.errors: list[Exception] = []
        """What the next starts fail with."""
        self.stuck = False
        """Whether starts never come back."""

    async def start(self) -> FakeProcess:
        await asyncio.sleep(0)
        if self.stuck:
            await asyncio.Event().wait()
        if self.errors:
            raise self.errors.pop(0)
        self.started.append(FakeProcess(1000 + len(self.started), self.exit_s))
        return self.started[-1]

    def close(self) -> None:
        pass

    @property
    def alive(self) -> list[FakeProcess]:
        return [process for process in self.started if process.alive]
