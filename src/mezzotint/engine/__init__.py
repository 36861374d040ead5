"""The engine as a library: many requests through one pipeline, one denoising step at a time.

    from mezzotint.engine import Engine, Request

    engine = Engine.load("emoji")
    results = engine.generate([Request(prompt="a happy cat", num_inference_steps=8, seed=1)])

Every request runs the unmodified pipeline in a Job; the loop in `Engine.step` is: pick parked calls, run them in one
forward, split the result among the jobs, report. An engine belongs to the thread that uses it.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mezzotint.engine.arguments import PipelineFacts, Request
from mezzotint.engine.batching import Call
from mezzotint.engine.jobs import Job, Tap
from mezzotint.engine.rules import RULES
from mezzotint.engine.runner import Mode, Runner, is_out_of_memory
from mezzotint.engine.scheduler import StepTimes, Waiting, pick
from mezzotint.errors import GenerationError, InvalidRequestError, MezzotintError, error_class
from mezzotint.messages import Cancelled, Done, Failed, Preview, Progress

__all__ = ["Engine", "Event", "Request", "Result"]

Event = Progress | Preview | Done | Failed | Cancelled
Image = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one request: an image, or the error that ended it."""

    request: Request
    seed: int
    """The seed used; drawn where the request had none."""
    image: Image | None
    """uint8, height x width x 3; None if the request failed."""
    timings: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: MezzotintError | None = None


@dataclass(slots=True)
class _Active:
    """A job in flight and what the loop must know of it."""

    job_id: str
    request: Request
    job: Job
    width: int
    height: int
    warnings: list[str]
    arrival: int
    admitted: float
    parked: float
    num_forwards: int = 0
    reported: int = 0


class Engine:
    """Runs requests through one diffusers pipeline. See `load`; `generate` and `stream` are all a library user needs."""

    def __init__(
        self,
        pipe: Any,
        *,
        batching: Mode = "exact",
        rows: int = 1,
        max_rows: int = 16,
        max_jobs: int = 64,
        max_wait_s: float = 20.0,
    ) -> None:
        """Takes a loaded pipeline as it is; `rows` are those of every merged forward in `exact` mode."""
        self.pipe = pipe
        self.facts = PipelineFacts(pipe)
        self.max_jobs = max_jobs
        self.max_wait_s = max_wait_s
        self._runner = Runner(batching, rows if batching == "exact" else max_rows)
        self._times = StepTimes()
        self._taps = _tap(pipe, self.facts)
        self._queue: deque[_Active] = deque()
        self._active: dict[str, _Active] = {}
        self._events: list[Event] = []
        self._arrivals = 0

    # ------------------------------------------------------------------ for library users

    def generate(self, requests: Iterable[Request]) -> list[Result]:
        """The results of all requests, in their order; a request that fails has its error in its result."""
        requests = list(requests)
        results = dict(self._run(requests))
        return [results[index] for index in range(len(requests))]

    def stream(self, requests: Iterable[Request]) -> Iterator[Result]:
        """The results as they finish."""
        for _, result in self._run(list(requests)):
            yield result

    def close(self) -> None:
        """Ends what runs and gives the pipeline back as it was before."""
        for job_id in [*self._active, *(waiting.job_id for waiting in self._queue)]:
            self.cancel(job_id)
        for tap in reversed(self._taps):
            tap.close()
        self._taps.clear()

    def _run(self, requests: Sequence[Request]) -> Iterator[tuple[int, Result]]:
        ids: dict[str, int] = {}
        seeds: list[int] = []
        try:
            for index, request in enumerate(requests):
                seeds.append(secrets.randbelow(2**32) if request.seed is None else request.seed)
                job_id = f"library-{self._arrivals}"
                ids[job_id] = index
                self.submit(request, job_id, seed=seeds[index])
            while ids:
                for event in self.step():
                    if isinstance(event, (Done, Failed)) and event.job_id in ids:
                        index = ids.pop(event.job_id)
                        yield index, _result(requests[index], seeds[index], event)
        finally:
            for job_id in ids:
                self.cancel(job_id)

    # ------------------------------------------------------------------ one request at a time

    @property
    def num_jobs(self) -> int:
        """Jobs admitted and not ended."""
        return len(self._active) + len(self._queue)

    def submit(self, request: Request, job_id: str, *, seed: int | None = None) -> None:
        """Admits a request. It ends in exactly one Done, Failed or Cancelled event of a later `step`."""
        assert job_id not in self._active, f"job {job_id} is already running"
        now = time.perf_counter()
        self._arrivals += 1
        seed = request.seed if seed is None else seed
        if seed is None:
            seed = secrets.randbelow(2**32)
        try:
            arguments, warnings = self.facts.call_arguments(request)
            job = Job(self.pipe, arguments, seed=seed)
        except MezzotintError as error:
            self._events.append(Failed(job_id, error.code, error.message, error.param))
            return
        width, height = arguments.get("width", self.facts.width), arguments.get("height", self.facts.height)
        self._queue.append(
            _Active(job_id, request, job, width, height, warnings, self._arrivals, admitted=now, parked=now)
        )
        self._events.append(Progress(job_id, 0, request.num_inference_steps))

    def cancel(self, job_id: str) -> bool:
        """Ends a job now, between two steps; False if there is no such job (any more)."""
        active = self._active.pop(job_id, None)
        if active is None:
            active = next((each for each in self._queue if each.job_id == job_id), None)
            if active is None:
                return False
            self._queue.remove(active)
        with torch.inference_mode():
            active.job.close()
        self._events.append(Cancelled(job_id))
        return True

    def step(self) -> list[Event]:
        """Runs one forward, for one job or for as many as it fits, and returns what happened since the last step."""
        with torch.inference_mode():
            self._admit()
            picked = pick(
                [self._waiting(active) for active in self._active.values()],
                max_rows=self._runner.num_rows,
                max_wait_s=self.max_wait_s,
            )
            if picked:
                self._forward([self._active[waiting.job_id] for waiting in picked])
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------------ the loop's four parts

    def _admit(self) -> None:
        while self._queue and len(self._active) < self.max_jobs:
            active = self._queue.popleft()
            self._active[active.job_id] = active
            active.job.start()
            self._report(active)

    def _waiting(self, active: _Active) -> Waiting:
        call = active.job.call
        assert call is not None, "an active job is parked"
        steps = active.job.num_steps
        forwards_per_step = max(1.0, active.num_forwards / steps) if steps else 1.0
        left = max(0, active.request.num_inference_steps - steps) * forwards_per_step
        return Waiting(
            job_id=active.job_id,
            key=call.key,
            rows=call.rows,
            remaining_s=left * self._times.estimate(active.width, active.height),
            waited_s=time.perf_counter() - active.parked,
            priority=active.request.priority,
            arrival=active.arrival,
        )

    def _forward(self, batch: Sequence[_Active]) -> None:
        calls: list[Call] = []
        for active in batch:
            assert active.job.call is not None, "an active job is parked"
            calls.append(active.job.call)
        start = time.perf_counter()
        outcomes = self._runner.run(calls)
        self._synchronize()
        if calls[0].name == self.facts.family.denoiser:
            self._times.add(batch[0].width, batch[0].height, time.perf_counter() - start)
            for active in batch:
                active.num_forwards += 1
        for active, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                active.job.fail(outcome)
            else:
                active.job.resume(outcome)
            self._report(active)

    def _synchronize(self) -> None:
        """Waits for the device, so that times are true and an error shows in the forward that caused it."""
        if self.pipe.device.type == "cuda":
            torch.cuda.synchronize(self.pipe.device)

    def _report(self, active: _Active) -> None:
        active.parked = time.perf_counter()
        job, steps = active.job, active.request.num_inference_steps
        done = min(job.num_steps, steps)
        if done > active.reported:
            active.reported = done
            self._events.append(Progress(active.job_id, done, steps))
        if not job.done:
            return
        del self._active[active.job_id]
        if job.error is not None:
            self._events.append(_failed(active, job.error))
        else:
            self._events.append(_done(active))


def _tap(pipe: Any, facts: PipelineFacts) -> list[Tap]:
    """Taps on everything that computes: the denoiser and text encoders by `forward`, VAEs by `decode`."""
    taps = []
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        rule = None
        if component is facts.denoiser and facts.family.merges:
            rule = RULES.get(type(component).__name__)
        taps.append(Tap(name, component, "decode" if hasattr(component, "decode") else "forward", rule))
    return taps


def _done(active: _Active) -> Done:
    picture = _pixels(active.job.result)
    active.job.close()
    height, width, _ = picture.shape
    seconds = time.perf_counter() - active.admitted
    return Done(active.job_id, width, height, seconds, picture.tobytes(), warnings=active.warnings)


def _pixels(result: Any) -> Image:
    """uint8 pixels by the rule by which diffusers makes its PIL images."""
    images = result[0] if isinstance(result, tuple) else result.images
    pixels: Image = (np.asarray(images[0]) * 255).round().astype("uint8")
    return pixels


def _failed(active: _Active, error: Exception) -> Failed:
    """Bad arguments show before the first forward; later, the failure is the generation's."""
    if isinstance(error, MezzotintError):
        return Failed(active.job_id, error.code, error.message, error.param)
    if is_out_of_memory(error):
        size = f"{active.width}x{active.height}"
        advice = (
            f"not enough memory for a {size} picture; ask for a smaller one, or lower max_rows or max_jobs"
        )
        return Failed(active.job_id, "out_of_memory", advice)
    _log.error("job %s failed", active.job_id, exc_info=error)
    text = f"{type(error).__name__}: {error}"
    if active.num_forwards == 0 and isinstance(error, (ValueError, TypeError)):
        return Failed(
            active.job_id, InvalidRequestError.default_code, f"the pipeline refused the request: {text}"
        )
    return Failed(active.job_id, GenerationError.default_code, f"generation failed: {text}")


def _result(request: Request, seed: int, event: Done | Failed) -> Result:
    if isinstance(event, Failed):
        status = 422 if event.code == InvalidRequestError.default_code else 500
        error = error_class(status, event.code)(event.message, code=event.code, param=event.param)
        return Result(request, seed, None, error=error)
    image = np.frombuffer(event.payload, np.uint8).reshape(event.height, event.width, 3)
    return Result(request, seed, image, {"generate_s": event.generate_s}, tuple(event.warnings))
