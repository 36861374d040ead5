"""The engine: many requests through one pipeline, one denoising step at a time.

Every request runs the unmodified pipeline in a Job; the loop in `Engine.step` is: pick parked calls, run
them in one forward, split the result among the jobs, report. An engine belongs to the thread that uses it.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mezzotint.engine.arguments import PipelineFacts
from mezzotint.engine.lora.bank import AdapterBank, BankStats, Lease
from mezzotint.engine.models.loading import DEFAULTS, Loaded, load
from mezzotint.engine.models.sources import Progress as OnProgress
from mezzotint.engine.models.sources import nothing
from mezzotint.engine.previews import LatentPreview, estimate_clean, preview_steps
from mezzotint.engine.results import Image, Result, failure, pixels, result_of
from mezzotint.engine.steps import exactness
from mezzotint.engine.steps.batching import Call
from mezzotint.engine.steps.jobs import Job, Tap
from mezzotint.engine.steps.rules import RULES
from mezzotint.engine.steps.runner import Mode, Runner
from mezzotint.engine.steps.scheduler import Service, StepTimes, Waiting, pick
from mezzotint.errors import GenerationError, MezzotintError
from mezzotint.messages import Cancelled, Done, Failed, ModelInfo, Preview, Progress
from mezzotint.spec import EngineSettings, ImageSpec

Event = Progress | Preview | Done | Failed | Cancelled

WARM_STEP_S = 0.25
"""Models whose forward is faster make a few pictures at load, so that the first request is fast."""
WARM_S = 0.5
"""How long they may take, once a preview can be drawn."""
_WARM_PROMPTS = (
    "a red apple on a blue table",
    "a yellow duck on a green meadow",
    "a white cat in the snow",
    "a black car at night",
    "a pink flower on a white background",
    "an orange sunset",
    "a brown dog on a grey street",
    "a purple umbrella",
)


@dataclass(slots=True)
class _Active:
    """A job in flight and what the loop must know of it."""

    job_id: str
    spec: ImageSpec
    seed: int
    arguments: dict[str, Any]
    warnings: list[str]
    arrival: int
    admitted: float
    priority: int
    owner: str
    parked: float = 0.0
    job: Job | None = None
    lease: Lease | None = None
    num_forwards: int = 0
    """Denoiser forwards so far."""
    reported: int = 0
    previews_due: tuple[int, ...] = ()
    clean: torch.Tensor | None = None
    """Latents of the finished picture, for the preview to learn from."""

    @property
    def width(self) -> int:
        return int(self.arguments["width"])

    @property
    def height(self) -> int:
        return int(self.arguments["height"])


class Engine:
    """Runs requests through one diffusers pipeline; a library user needs `load`, `generate` and `stream`."""

    def __init__(
        self,
        pipe: Any,
        *,
        batching: Mode = "exact",
        rows: int = 1,
        max_rows: int = 16,
        max_jobs: int = 64,
        max_wait_s: float = 20.0,
        max_merge_pixels: int | None = None,
        adapter_bytes: int = 512 * 1024 * 1024,
    ) -> None:
        """Takes a loaded pipeline as it is; `rows` are those of every merged forward in `exact` mode.

        `max_merge_pixels`: in `exact` mode larger pictures are never merged; None is no limit. It is part
        of what the bytes depend on, as `rows` is.
        """
        self.pipe = pipe
        self.facts = PipelineFacts(pipe)
        self.max_rows = max_rows
        self.max_jobs = max_jobs
        self.max_wait_s = max_wait_s
        self.adapter_bytes = adapter_bytes
        self.busy_s = 0.0
        """Seconds spent in steps that ran something."""
        self.loaded: Loaded | None = None
        """What loading decided; set by `load`."""
        self.measured: list[exactness.Measurement] = []
        """What calibration has measured; empty if R was given."""
        self.times = StepTimes()
        self._service = Service()
        num_rows = rows if batching == "exact" else max_rows
        self.runner = Runner(batching, num_rows, self.facts.denoiser_name, self._synchronize)
        self.max_merge_pixels = max_merge_pixels
        self._device: torch.device = pipe._execution_device  # with offloading, not the device of the weights
        self._preview = LatentPreview(packed=hasattr(pipe, "_pack_latents"))
        self._taps = self._tap()
        self._queue: deque[_Active] = deque()
        self._active: dict[str, _Active] = {}
        self._events: list[Event] = []
        self._arrivals = 0

    @classmethod
    def load(
        cls,
        source: Any,
        settings: EngineSettings = DEFAULTS,
        *,
        rows: int | None = None,
        progress: OnProgress = nothing,
    ) -> Engine:
        """An engine for a built-in name, a folder, a repository id, a safetensors file or a ready pipeline.

        `rows` None measures how many rows a merged forward should have. A seed gives the same bytes only
        under the same number (and dtype, device, threads, performance). Pictures above the model's default
        size are not merged. `progress` is told the stage and its fraction. ModelLoadError says why a model
        cannot load.
        """
        loaded = load(source, settings, progress=progress)
        progress("calibrating", None)
        engine = cls(
            loaded.pipe,
            batching=settings.batching,
            max_rows=settings.max_rows,
            max_jobs=settings.max_jobs,
            max_wait_s=settings.max_wait_s,
            adapter_bytes=settings.adapter_bytes,
        )
        engine.loaded = loaded
        engine.max_merge_pixels = engine.facts.width * engine.facts.height
        engine.calibrate(min_gain=settings.min_batch_gain, max_stretch=settings.max_batch_stretch, rows=rows)
        engine.warm_up()
        return engine

    # ------------------------------------------------------------------ for library users

    def generate(self, requests: Iterable[ImageSpec]) -> list[Result]:
        """The results of all requests, in their order; a request that fails has its error in its result."""
        requests = list(requests)
        results = dict(self._run(requests))
        return [results[index] for index in range(len(requests))]

    def stream(self, requests: Iterable[ImageSpec]) -> Iterator[Result]:
        """The results as they finish."""
        for _, result in self._run(list(requests)):
            yield result

    def close(self) -> None:
        """Ends what runs and takes the taps off the pipeline."""
        for job_id in [*self._active, *(waiting.job_id for waiting in self._queue)]:
            self.cancel(job_id)
        for tap in reversed(self._taps):
            tap.close()
        self._taps.clear()
        if self.runner.adapters is not None:
            self.adapters.close()

    def _run(self, requests: Sequence[ImageSpec]) -> Iterator[tuple[int, Result]]:
        seeds = [secrets.randbelow(2**32) if each.seed is None else each.seed for each in requests]
        ids: dict[str, int] = {}
        try:
            for index, request in enumerate(requests):
                job_id = f"library-{self._arrivals}"
                ids[job_id] = index
                self.submit(request, job_id, seed=seeds[index])
            while ids:
                for event in self.step():
                    if isinstance(event, (Done, Failed, Cancelled)) and event.job_id in ids:
                        index = ids.pop(event.job_id)
                        yield index, result_of(requests[index], seeds[index], event)
        finally:
            for job_id in ids:
                self.cancel(job_id)

    # ------------------------------------------------------------------ one request at a time

    @property
    def num_jobs(self) -> int:
        """Jobs submitted and not ended."""
        return len(self._active) + len(self._queue)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to run or to tell."""
        return bool(self._active or self._queue or self._events)

    @functools.cached_property
    def adapters(self) -> AdapterBank:
        """The LoRA adapters of this pipeline; the first use prepares its layers."""
        bank = AdapterBank(self.pipe, byte_budget=self.adapter_bytes)
        self.runner.adapters = bank
        return bank

    def bank_stats(self) -> BankStats:
        """Hits, loads and residency of the adapters; all zero where none was ever added."""
        return self.adapters.stats() if self.runner.adapters is not None else BankStats(0, 0, 0, 0, [])

    def submit(
        self,
        spec: ImageSpec,
        job_id: str,
        *,
        seed: int | None = None,
        num_previews: int = 0,
        priority: int = 0,
        owner: str = "",
    ) -> None:
        """Admits an image; `num_previews` evenly spaced estimates of it are made on the way.

        It ends in exactly one Done, Failed or Cancelled event of a later `step`.

        For callers that run `step` themselves; `generate` and `stream` would swallow the events.
        """
        assert job_id not in self._active, f"job {job_id} is already running"
        self._arrivals += 1
        seed = spec.seed if seed is None else seed
        try:
            arguments, warnings = self.facts.call_arguments(spec)
            if spec.adapter is not None:
                self.adapters.info(spec.adapter.route)
                self.adapters.prefetch(spec.adapter.route)
        except MezzotintError as error:
            self._events.append(Failed(job_id, error.code, error.message, error.param))
            return
        active = _Active(
            job_id=job_id,
            spec=spec,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            arguments=arguments,
            warnings=warnings,
            arrival=self._arrivals,
            admitted=time.perf_counter(),
            priority=priority,
            owner=owner,
            previews_due=tuple(preview_steps(num_previews, spec.num_inference_steps)),
        )
        self._queue.append(active)
        self._events.append(Progress(job_id, 0, spec.num_inference_steps))

    def cancel(self, job_id: str) -> bool:
        """Ends a job now, between two forwards; False if there is no such job (any more)."""
        active = self._active.get(job_id) or next(
            (each for each in self._queue if each.job_id == job_id), None
        )
        if active is None:
            return False
        if active.job is None:
            self._queue.remove(active)
        self._end(active, Cancelled(job_id))
        return True

    def step(self) -> list[Event]:
        """Runs one forward, for as many jobs as share it; returns what has happened since the last step."""
        with torch.inference_mode():
            self._admit()
            start = time.perf_counter()
            batch = self._pick()
            if batch:
                self._forward(batch)
                seconds = time.perf_counter() - start
                self.busy_s += seconds
                self._service.add([active.owner for active in batch], seconds)
            else:
                self._service.forget()
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------------ the parts of a step

    def _admit(self) -> None:
        """Starts queued jobs, as far as there is room for them and their adapters are at hand."""
        for active in list(self._queue):
            if len(self._active) >= self.max_jobs:
                return
            use = active.spec.adapter
            if use is not None and self._active and not self.adapters.is_ready(use.route):
                continue  # its file is being read in the background, while others run
            try:
                if use is not None:
                    active.lease = self.adapters.acquire(use.route, use.scale)
                    if active.lease is None:
                        continue
                hook = functools.partial(self._before_scheduler_step, active)
                active.job = Job(
                    self.pipe, active.arguments, seed=active.seed, lease=active.lease, before_step=hook
                )
            except Exception as error:
                self._queue.remove(active)
                self._end(active, self._failed(active, error))
                continue
            self._queue.remove(active)
            self._active[active.job_id] = active
            active.job.start()
            self._report(active)

    def _pick(self) -> list[_Active]:
        """The jobs whose parked calls run next, together."""
        now = time.perf_counter()
        leads = self._service.leads(frozenset(active.owner for active in self._active.values()))
        waiting = [self._waiting(active, now, leads) for active in self._active.values()]
        picked = pick(waiting, max_rows=self.runner.num_rows, max_wait_s=self.max_wait_s)
        if picked and picked[0].waited_s > self.max_wait_s:  # or it would get one step per wait
            self._active[picked[0].job_id].priority = max(each.priority for each in waiting)
        return [self._active[each.job_id] for each in picked]

    def _waiting(self, active: _Active, now: float, leads: Mapping[str, float]) -> Waiting:
        job = active.job
        assert job is not None, "an active job has started"
        assert job.call is not None, "an active job is parked"
        forwards_per_step = max(1.0, active.num_forwards / job.num_steps) if job.num_steps else 1.0
        left = max(0, active.spec.num_inference_steps - job.num_steps) * forwards_per_step
        return Waiting(
            job_id=active.job_id,
            key=job.call.key,
            rows=job.call.rows,
            remaining_s=0.0
            if self._prepares(active)
            else left * self.times.estimate(active.width, active.height),
            waited_s=now - active.parked,
            owner=active.owner,
            owner_lead_s=leads[active.owner],
            priority=active.priority,
            arrival=active.arrival,
        )

    def _prepares(self, active: _Active) -> bool:
        """Whether a job has yet to reach the denoiser: where jobs merge it goes first, to fill the batch."""
        assert active.job is not None, "an active job has started"
        assert active.job.call is not None, "an active job is parked"
        merges = self.runner.num_rows > 1 and self.facts.family.merges
        return merges and active.num_forwards == 0 and active.job.call.name != self.facts.denoiser_name

    def _forward(self, batch: Sequence[_Active]) -> None:
        """Runs the parked calls of `batch` and takes each job to its next one."""
        calls: list[Call] = []
        for active in batch:
            assert active.job is not None, "an active job has started"
            assert active.job.call is not None, "an active job is parked"
            calls.append(active.job.call)
        outcomes = self.runner.run(calls)
        if calls[0].name == self.facts.denoiser_name:
            if self.runner.last_s:
                self.times.add(batch[0].width, batch[0].height, self.runner.last_s)
            for active in batch:
                active.num_forwards += 1
        for active, outcome in zip(batch, outcomes, strict=True):
            assert active.job is not None, "an active job has started"
            if isinstance(outcome, Exception):
                active.job.fail(outcome)
            else:
                active.job.resume(outcome)
            self._report(active)

    def _report(self, active: _Active) -> None:
        """Tells how far the job has come, or how it has ended."""
        job, steps = active.job, active.spec.num_inference_steps
        assert job is not None, "an active job has started"
        active.parked = time.perf_counter()
        done = min(job.num_steps, steps)
        if done > active.reported:
            active.reported = done
            self._events.append(Progress(active.job_id, done, steps))
        if job.call is not None:
            if self.max_merge_pixels is not None and active.width * active.height > self.max_merge_pixels:
                job.call.key = job.call.key if self.runner.mode == "fast" else None
            return
        if job.error is not None:
            self._end(active, self._failed(active, job.error))
            return
        try:
            picture = pixels(job.result)
        except GenerationError as error:  # this job's picture is none; others go on
            self._end(active, self._failed(active, error))
            return
        self._end(active, self._done(active, picture))

    def _failed(self, active: _Active, error: Exception) -> Failed:
        size = f"{active.width}x{active.height}"
        return failure(active.job_id, error, size=size, refused=active.num_forwards == 0)

    def _done(self, active: _Active, picture: Image) -> Done:
        if active.clean is not None:
            self._preview.learn(active.clean, torch.from_numpy(picture))
        height, width, _ = picture.shape
        return Done(
            active.job_id,
            width,
            height,
            generate_s=time.perf_counter() - active.admitted,
            payload=picture.tobytes(),
            adapter_load_s=0.0 if active.lease is None else active.lease.load_s,
            warnings=active.warnings,
        )

    def _end(self, active: _Active, event: Done | Failed | Cancelled) -> None:
        self._active.pop(active.job_id, None)
        if active.job is not None:
            with torch.inference_mode():
                active.job.close()
        if active.lease is not None:
            active.lease.release()
        self._events.append(event)

    def _before_scheduler_step(self, active: _Active, scheduler: Any, arguments: Mapping[str, Any]) -> None:
        """Where a preview is due, or one can be learned from: estimates the finished latents."""
        assert active.job is not None, "only a started job steps"
        step = active.job.num_steps + 1
        last = step == len(scheduler.timesteps)
        if not (step in active.previews_due or (last and not self._preview.learned)):
            return
        output, sample = arguments["model_output"], arguments["sample"]
        clean = estimate_clean(scheduler, output, arguments["timestep"], sample)
        if last or clean is None:
            active.clean = clean
            return
        drawn = self._preview.draw(clean, active.width, active.height)
        if drawn is not None:
            index = active.previews_due.index(step)
            height, width = drawn.shape[:2]
            payload = drawn.numpy().tobytes()
            self._events.append(Preview(active.job_id, index, step, width, height, payload))

    def _synchronize(self) -> None:
        """Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _tap(self) -> list[Tap]:
        """Taps on everything that computes: denoiser and text encoders by `forward`, VAEs by `decode`."""
        taps = []
        for name, component in self.pipe.components.items():
            if not isinstance(component, torch.nn.Module):
                continue
            merges = name == self.facts.denoiser_name and self.facts.family.merges
            rule = RULES.get(type(component).__name__) if merges else None
            taps.append(Tap(name, component, "decode" if hasattr(component, "decode") else "forward", rule))
        return taps

    # ------------------------------------------------------------------ at load

    def calibrate(self, *, min_gain: float = 1.4, max_stretch: float = 2.5, rows: int | None = None) -> None:
        """Measures forwards of a real job; in `exact` mode sets R to `rows`, or if None to what they show."""
        with torch.inference_mode():
            request = ImageSpec(prompt=_WARM_PROMPTS[0], num_inference_steps=2)
            call = exactness.first_call(self.pipe, self.facts, request)
            if call is None:
                return
            self.measured = exactness.measure(
                call,
                max_rows=self.max_rows if rows is None and self.runner.mode == "exact" else 1,
                max_stretch=max_stretch,
                synchronize=self._synchronize,
            )
            if self.runner.mode == "exact":
                self.runner.num_rows = rows or exactness.find_rows(call, self.measured, min_gain, max_stretch)
        self.times.add(self.facts.width, self.facts.height, self.measured[0].forward_s)

    def warm_up(self) -> None:
        """Makes a few two-step pictures if that is quick: they teach the preview and warm up the rest."""
        if self.times.estimate(self.facts.width, self.facts.height) > WARM_STEP_S:
            return
        start = time.perf_counter()
        for seed, prompt in enumerate(_WARM_PROMPTS):
            self.submit(ImageSpec(prompt=prompt, num_inference_steps=2, seed=seed), f"warm-{seed}")
            while self.num_jobs:
                self.step()
            late = time.perf_counter() - start > WARM_S
            if self._preview.learned or (self._preview.ready and late):
                return

    def info(self) -> ModelInfo:
        """What the server must know of this model."""
        loaded = self.loaded
        assert loaded is not None, "only a worker's engine, which `load` made, is asked"
        facts = self.facts
        return ModelInfo(
            pipeline_class=type(self.pipe).__name__,
            model_class=type(facts.denoiser).__name__,
            dtype=loaded.dtype,
            device=loaded.device,
            num_threads=loaded.num_threads,
            batching=self.runner.mode,
            performance=loaded.performance,
            rows=self.runner.num_rows if self.runner.mode == "exact" else 1,
            mergeable=facts.family.merges,
            width=facts.width,
            height=facts.height,
            size_multiple=facts.size_multiple,
            default_steps=facts.default_steps,
            default_guidance=facts.family.default_guidance,
            guidance_effective=facts.guidance_effective,
            supports_negative_prompt=facts.supports_negative_prompt,
            max_prompt_tokens=facts.max_prompt_tokens,
            num_parameters=loaded.num_parameters,
            calibration=[
                {"rows": each.rows, "forward_s": each.forward_s, "rows_per_s": each.rows_per_s}
                for each in self.measured
            ],
            step_s=self.times.estimate(facts.width, facts.height),
        )
