"""A worker that takes the time of the real one: the engine's own picking, with timers in place of forwards.

It stands for `engine.worker` and `engine.engine` in all that takes time: messages are read between two
forwards, and a forward serves the jobs that `pick` puts together. A picture's text encoder and decoder run as
one call after its last step. Adapters take no time.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from mezzotint.engine.steps.scheduler import Candidate, FairShares, pick
from mezzotint.messages import (
    Cancel,
    Cancelled,
    Done,
    FromWorker,
    Generate,
    LoadModel,
    Message,
    ModelInfo,
    Ping,
    Pong,
    Progress,
    Ready,
    Shutdown,
    Stats,
)
from mezzotint.server.workers.process import OnExit, OnMessage
from mezzotint.sizing.speed import Speed
from mezzotint.spec import EngineSettings

NO_PICTURE = bytes(3)


@dataclass(slots=True, eq=False)
class _Job:
    request: Generate
    size: tuple[int, int]
    arrival: int
    came: float
    parked: float
    """When its last call ended."""
    priority: int
    step: int = 0

    @property
    def steps_left(self) -> int:
        return self.request.spec.num_steps - self.step


class SimulatedWorker:
    """A WorkerProcess of the server."""

    pid = None

    def __init__(self, speed: Speed) -> None:
        self.started_at = asyncio.get_running_loop().time()
        self.ended_at: float | None = None
        self._speed = speed
        self._settings = EngineSettings()
        self._jobs: dict[str, _Job] = {}
        self._inbox: list[Message] = []
        """What came during the forward under way; read at its end."""
        self._in_turn = False
        self._shares = FairShares()
        self._num_jobs = 0
        self._on_message: OnMessage = lambda message: None
        self._on_exit: OnExit = lambda code: None

    def listen(self, on_message: OnMessage, on_exit: OnExit) -> None:
        self._on_message, self._on_exit = on_message, on_exit

    def send(self, message: Message) -> None:
        self._inbox.append(message)
        if not self._in_turn:
            self._in_turn = True
            asyncio.get_running_loop().call_soon(self._turn)

    def kill(self) -> None:
        if self.ended_at is None:
            loop = asyncio.get_running_loop()
            self.ended_at = loop.time()
            loop.call_soon(self._on_exit, 0)

    def _say(self, message: FromWorker) -> None:
        if self.ended_at is None:
            self._on_message(message)

    # ------------------------------------------------------------ one turn of the worker's loop

    def _turn(self) -> None:
        """Reads what came and begins the next forward, if there is one."""
        inbox, self._inbox = self._inbox, []
        for message in inbox:
            self._receive(message)
        if self.ended_at is not None:
            return
        if not self._jobs:
            self._shares.forget()
            self._in_turn = False
            return
        batch = self._pick()
        ratio = self._speed.ratio(batch[0].size)
        seconds = (
            self._speed.step_s(len(batch), batch[0].size)
            if batch[0].steps_left
            else self._speed.picture_s * ratio
        )
        asyncio.get_running_loop().call_later(seconds, self._end_forward, batch, seconds)

    def _end_forward(self, batch: list[_Job], seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        self._shares.add([job.request.owner for job in batch], seconds)
        for job in batch:
            job.parked = now
            spec, job_id = job.request.spec, job.request.job_id
            if job.steps_left:
                job.step += 1
                self._say(Progress(job_id, job.step, spec.num_steps))
                if job.steps_left or self._speed.picture_s:
                    continue
            del self._jobs[job_id]
            self._say(Done(job_id, 1, 1, now - job.came, NO_PICTURE))
        self._turn()

    def _pick(self) -> list[_Job]:
        now, jobs = asyncio.get_running_loop().time(), self._jobs
        leads = self._shares.leads(frozenset(job.request.owner for job in jobs.values()))
        merges = self._speed.most_jobs > 1
        candidates = [
            Candidate(
                job_id,
                job.size if merges and job.steps_left else None,
                1,
                job.steps_left * self._speed.step_s(1, job.size),
                now - job.parked,
                job.request.owner,
                leads[job.request.owner],
                job.priority,
                job.arrival,
            )
            for job_id, job in jobs.items()
        ]
        picked = pick(candidates, max_rows=self._speed.most_jobs, max_wait_s=self._settings.max_wait_s)
        if picked[0].waited_s > self._settings.max_wait_s:  # as the engine does
            jobs[picked[0].job_id].priority = max(each.priority for each in candidates)
        return [jobs[each.job_id] for each in picked]

    # ------------------------------------------------------------ messages

    def _receive(self, message: Message) -> None:
        match message:
            case LoadModel():
                self._settings = message.settings
                asyncio.get_running_loop().call_later(self._speed.load_s, self._loaded)
            case Generate():
                self._take(message)
            case Cancel(job_id):
                if self._jobs.pop(job_id, None) is not None:
                    self._say(Cancelled(job_id))
            case Ping(number):
                self._say(Pong(number))
            case Shutdown():
                self.kill()
            case _:
                pass

    def _loaded(self) -> None:
        self._say(Ready(_model_info(self._speed), self._speed.load_s))
        sizes = (self._speed.own_size, *self._speed.ratios)
        seconds = {f"{size[0]}x{size[1]}": self._speed.step_s(1, size) for size in sizes}
        self._say(Stats(0, 0, 0, 0, 0.0, seconds))

    def _take(self, message: Generate) -> None:
        spec, now = message.spec, asyncio.get_running_loop().time()
        wide, high = self._speed.own_size
        self._num_jobs += 1
        size = spec.width or wide, spec.height or high
        self._jobs[message.job_id] = _Job(message, size, self._num_jobs, now, now, message.priority)
        self._say(Progress(message.job_id, 0, spec.num_steps))


class SimulatedCarrier:
    """A Carrier whose workers are as fast as `speed` says."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self.workers: list[SimulatedWorker] = []
        """All that were ever started; the simulation counts their hours."""

    async def start(self) -> SimulatedWorker:
        self.workers.append(SimulatedWorker(self._speed))
        return self.workers[-1]

    def close(self) -> None:
        pass


def _model_info(speed: Speed) -> ModelInfo:
    """What the server must know of a model this fast; what it can draw plays no part."""
    table = [
        {"rows": float(jobs), "forward_s": seconds, "rows_per_s": jobs / seconds}
        for jobs, seconds in sorted(speed.forward_s.items())
    ]
    return ModelInfo(
        pipeline_class="",
        model_class="",
        dtype="",
        device="",
        num_threads=1,
        batching="exact",
        performance="auto",
        rows=speed.most_jobs,
        mergeable=speed.most_jobs > 1,
        width=speed.own_size[0],
        height=speed.own_size[1],
        size_multiple=1,
        default_steps=20,
        default_guidance=None,
        guidance_effective=True,
        supports_negative_prompt=True,
        max_prompt_tokens=None,
        num_parameters=0,
        calibration=list(table),
        step_s=speed.forward_s[1],
    )
