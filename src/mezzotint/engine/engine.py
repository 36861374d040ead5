"""The engine: many requests through one pipeline, one denoising step at a time.

Every job runs the unmodified pipeline; the loop in `Engine.step` is: pick parked calls, run them in one
forward, split the result among the jobs, report. An engine belongs to the thread that uses it.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mezzotint.engine.arguments import PipelineProfile
from mezzotint.engine.calibration import (
    Measurement,
    Stopwatch,
    find_rows,
    measure,
    row_counts,
    stretch,
    warm_up,
)
from mezzotint.engine.description import findings_of, model_info
from mezzotint.engine.editing import NO_CONTROLNETS, Editing
from mezzotint.engine.lora.bank import AdapterBank, BankStats
from mezzotint.engine.manifest import EMPTY, Manifest
from mezzotint.engine.models.loading import DEFAULTS, Loaded, load
from mezzotint.engine.models.sources import OnProgress, ignore_progress
from mezzotint.engine.previews import LatentPreview, preview_steps, take_preview
from mezzotint.engine.results import Image, Result, failed_event, pixels, repainted, result_of
from mezzotint.engine.steps.inference import ALL, Finding, find_rules
from mezzotint.engine.steps.jobs import Job
from mezzotint.engine.steps.laboratory import Laboratory
from mezzotint.engine.steps.pipeline_run import PipelineRun
from mezzotint.engine.steps.rules import give_rules, tap_all, written_rules
from mezzotint.engine.steps.runner import Forward, Runner
from mezzotint.engine.steps.scheduler import FairShares, StepTimes, pick
from mezzotint.engine.steps.shared_state import AttentionState
from mezzotint.engine.steps.text_cache import TextCache
from mezzotint.engine.trial import (
    first_call,
    trial_arguments,
    trial_request,
    trial_requests,
    try_out,
    without_pictures,
)
from mezzotint.errors import GenerationError, MezzotintError
from mezzotint.images import on_white
from mezzotint.messages import MEASURING, Cancelled, Done, Failed, ModelInfo, Preview, Progress, Proof
from mezzotint.spec import Batching, EngineSettings, ImageSpec

Event = Progress | Preview | Done | Failed | Cancelled

MAX_TRIALS = 3
"""Requests with which merging is tried before the model is left unmerged."""
WARM_STEP_S = 0.25
"""Models whose forward is faster make a few pictures at load, so that the first request is fast."""


class Engine:
    """Runs requests through one diffusers pipeline; a library user needs `load`, `generate` and `stream`."""

    def __init__(
        self,
        pipe: Any,
        *,
        batching: Batching = "exact",
        rows: int = 1,
        max_rows: int = 16,
        max_jobs: int = 64,
        max_wait_s: float = 20.0,
        max_merge_pixels: int | None = None,
        adapter_bytes: int = 512 * 1024 * 1024,
        text_cache_bytes: int = 128 * 1024 * 1024,
        manifest: Manifest = EMPTY,
        settings: EngineSettings = DEFAULTS,
        controlnets: Mapping[str, Any] = NO_CONTROLNETS,
    ) -> None:
        """Takes a loaded pipeline as it is; `rows` are those of every merged forward in `exact` mode.

        `manifest` is what the model's folder says of it; `load` reads it. Of `settings` only the size, steps,
        guidance and arguments of a request that names none are read. `controlnets` are by route.
        `max_merge_pixels`: in `exact` mode larger pictures are never merged; None is no limit. It is part
        of what the bytes depend on, as `rows` is.
        """
        self.pipe = pipe
        self.profile = PipelineProfile(pipe, manifest=manifest, settings=settings)
        self.editing = Editing(self.profile, controlnets)
        self.max_rows = max_rows
        self.max_jobs = max_jobs
        self.max_wait_s = max_wait_s
        self.adapters: AdapterBank | None = None
        """Filled by `enable_adapters`, None before."""
        self._adapter_bytes = adapter_bytes
        self.busy_s = 0.0
        """Seconds spent in steps that ran something."""
        self.loaded: Loaded | None = None
        """What loading decided; set by `load`."""
        self.measured: list[Measurement] = []
        """Filled by `calibrate`: read for the step times and by `info`."""
        self.best_rows: int | None = None
        """The R that all row counts as last measured would give; None where only R itself was measured."""
        self.times = StepTimes()
        self._shares = FairShares()
        num_rows = rows if batching == "exact" else max_rows
        self.device: torch.device = pipe._execution_device  # with offloading, not the device of the weights
        texts = TextCache(text_cache_bytes, self.device)
        self.runner = Runner(batching, num_rows, self.profile.denoiser_name, self.synchronize, texts)
        self.max_merge_pixels = max_merge_pixels
        self._preview = LatentPreview(packed=hasattr(pipe, "_pack_latents"))
        self.findings: dict[str, Finding] = {}  # filled by `find_rules`
        self.attention = AttentionState(pipe.components)
        self.taps = tap_all(pipe, controlnets)
        self._trials_left = MAX_TRIALS  # of merging; 0 once one has succeeded
        self._queue: deque[Job] = deque()
        self._active: dict[str, Job] = {}
        self._events: list[Event] = []
        self._arrivals = 0

    @classmethod
    def load(
        cls,
        source: Any,
        settings: EngineSettings = DEFAULTS,
        *,
        rows: int | None = None,
        proof: Proof | None = None,
        form: str | None = None,
        rows_form: str | None = None,
        progress: OnProgress = ignore_progress,
    ) -> Engine:
        """An engine for a built-in name, a folder, a repository id, a safetensors file or a ready pipeline.

        `rows` None measures how many rows a merged forward should have. A seed gives the same bytes only
        under the same number (and dtype, device, threads, form). `proof` is what an earlier start
        found of merging; it is made again for other versions. `form` is the compiled form that
        `performance = "max"` must use (`auto`: none); None takes what is ready. `rows_form` is the form under
        which `rows` was measured; None: whichever is in use. Pictures above the model's default
        size are not merged. `progress` is told the stage and its fraction. ModelLoadError says why a model
        cannot load.
        """
        loaded = load(source, settings, form=form, progress=progress)
        if rows_form not in (None, loaded.form):
            rows = None
        progress(MEASURING, None)
        engine = cls(
            loaded.pipe,
            batching=settings.batching,
            max_rows=settings.max_rows,
            max_jobs=settings.max_jobs,
            max_wait_s=settings.max_wait_s,
            adapter_bytes=settings.adapter_bytes,
            text_cache_bytes=settings.text_cache_bytes,
            manifest=loaded.manifest,
            settings=settings,
            controlnets=loaded.controlnets,
        )
        engine.loaded = loaded
        if loaded.forms.used is not None and settings.batching == "exact":
            engine.max_rows = min(engine.max_rows, loaded.forms.used.max_rows)  # more would run as loaded
        try_out(engine, settings, rows, findings_of(proof, loaded.pipe))
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
        for job_id in [*self._active, *(job.job_id for job in self._queue)]:
            self.cancel(job_id)
        for tap in reversed(self.taps):
            tap.close()
        self.taps.clear()
        if self.adapters is not None:
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

    def enable_adapters(self) -> AdapterBank:
        """The LoRA adapters of this pipeline; the first call patches the layers that they may change."""
        if self.adapters is None:
            self.adapters = AdapterBank(self.pipe, byte_budget=self._adapter_bytes)
            self.runner.adapters = self.adapters
        return self.adapters

    def bank_stats(self) -> BankStats:
        """Hits, loads and residency of the adapters; all zero where none was ever added."""
        return self.adapters.stats() if self.adapters is not None else BankStats(0, 0, 0, 0, [])

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
            profile = self.editing.profile(spec)
            spec, unused = self.editing.filled(spec)
            arguments, warnings = profile.call_arguments(spec)
            if spec.adapters:
                bank = self.enable_adapters()
                bank.prefetch(bank.name_of(spec.adapters))
        except MezzotintError as error:
            self._events.append(Failed(job_id, error.code, error.message, error.param))
            return
        width, height = profile.size(spec)
        job = Job(
            job_id=job_id,
            spec=spec,
            seed=secrets.randbelow(2**32) if seed is None else seed,
            pipe=profile.pipe_for(spec),
            width=width,
            height=height,
            arguments=arguments,
            warnings=unused + warnings,
            arrival=self._arrivals,
            submitted=time.perf_counter(),
            priority=priority,
            owner=owner,
            previews_due=tuple(preview_steps(num_previews, spec.num_steps)),
        )
        self._queue.append(job)
        self._events.append(Progress(job_id, 0, spec.num_steps))

    def cancel(self, job_id: str) -> bool:
        """Ends a job now, between two forwards; False if there is no such job (any more)."""
        job = self._active.get(job_id) or next((each for each in self._queue if each.job_id == job_id), None)
        if job is None:
            return False
        if job.run is None:
            self._queue.remove(job)
        self._end(job, Cancelled(job_id))
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
                self._shares.add([job.owner for job in batch], seconds)
            else:
                self._shares.forget()
        events, self._events = self._events, []
        return events

    # ------------------------------------------------------------------ the parts of a step

    def _admit(self) -> None:
        """Starts queued jobs, as far as there is room for them and their adapters are at hand."""
        if self._queue and self._trials_left and not self._active and self.runner.num_rows > 1:
            spec = self._queue[0].spec
            self.find_rules(spec if self.profile.family.edits_only else without_pictures(spec))
        for job in list(self._queue):
            if len(self._active) >= self.max_jobs:
                return
            uses = job.spec.adapters
            try:
                if uses:
                    bank = self.enable_adapters()
                    name = bank.name_of(uses)
                    if self._active and not bank.is_ready(name):
                        continue  # its file is being read in the background, while others run
                    job.lease = bank.acquire(name, uses[0].scale if len(uses) == 1 else None)
                    if job.lease is None:
                        continue
                job.run = PipelineRun(
                    job.pipe,
                    job.arguments,
                    seed=job.seed,
                    lease=job.lease,
                    merges=self._merges(job),
                    before_step=functools.partial(self._before_scheduler_step, job),
                    attention=self.attention,
                )
            except Exception as error:
                self._queue.remove(job)
                self._end(job, self._failed(job, error))
                continue
            self._queue.remove(job)
            self._active[job.job_id] = job
            job.run.start()
            self._report(job)

    def _merges(self, job: Job) -> bool:
        """Whether the job's calls may share forwards: in `exact` mode only up to `max_merge_pixels`."""
        limit = self.max_merge_pixels
        return self.runner.mode == "fast" or limit is None or job.width * job.height <= limit

    def _pick(self) -> list[Job]:
        """The jobs whose parked calls run next, together."""
        now = time.perf_counter()
        leads = self._shares.leads(frozenset(job.owner for job in self._active.values()))
        merges = self.runner.num_rows > 1 and self.merges
        sizes = {(job.width, job.height) for job in self._active.values()}
        forward_s = {size: self.times.estimate(*size) for size in sizes}
        candidates = [
            job.candidate(
                now,
                forward_s=0.0 if merges and self._prepares(job) else forward_s[job.width, job.height],
                owner_lead_s=leads[job.owner],
            )
            for job in self._active.values()
        ]
        picked = pick(candidates, max_rows=self.runner.num_rows, max_wait_s=self.max_wait_s)
        if picked and picked[0].waited_s > self.max_wait_s:  # or it would get one step per wait
            self._active[picked[0].job_id].priority = max(each.priority for each in candidates)
        return [self._active[each.job_id] for each in picked]

    def _prepares(self, job: Job) -> bool:
        """Whether a job has yet to reach the denoiser: where jobs merge it goes first, to fill the batch."""
        return job.num_forwards == 0 and job.call.name != self.profile.denoiser_name

    def _forward(self, batch: Sequence[Job]) -> None:
        """Runs the parked calls of `batch` and takes each job to its next one."""
        calls = [job.call for job in batch]
        outcome = self.runner.run(calls)
        if calls[0].name == self.profile.denoiser_name:
            self._record(batch[0], len(batch), outcome.forwards)
            for job in batch:
                if not job.num_forwards:
                    job.prepared = job.parked
                job.num_forwards += 1
        for job, result in zip(batch, outcome.results, strict=True):
            if isinstance(result, Exception):
                job.started.fail(result)
            else:
                job.started.resume(result)
            self._report(job)

    def _record(self, job: Job, num_jobs: int, forwards: Sequence[Forward]) -> None:
        """Takes note of how long the forwards would have taken for a lone job of this size."""
        if forwards:
            seconds = sum(each.seconds / stretch(self.measured, each.rows) for each in forwards)
            self.times.add(job.width, job.height, seconds / min(num_jobs, len(forwards)))

    def _report(self, job: Job) -> None:
        """Tells how far the job has come, or how it has ended."""
        run, steps = job.started, job.spec.num_steps
        job.parked = time.perf_counter()
        done = min(run.num_steps, steps)
        if done > job.num_reported:
            job.num_reported, job.denoised = done, job.parked
            self._events.append(Progress(job.job_id, done, steps))
        if run.call is not None:
            return
        if run.error is not None:
            self._end(job, self._failed(job, run.error))
            return
        try:
            pictures = pixels(run.result)
        except GenerationError as error:  # only this job fails; others go on
            self._end(job, self._failed(job, error))
            return
        self._end(job, self._done(job, pictures))

    def _failed(self, job: Job, error: Exception) -> Failed:
        size = f"{job.width}x{job.height}"
        return failed_event(job.job_id, error, size=size, refused=job.num_forwards == 0)

    def _done(self, job: Job, pictures: Sequence[Image]) -> Done:
        if job.clean is not None and len(pictures) == 1:
            self._preview.learn(job.clean, torch.from_numpy(on_white(pictures[0])))
        height, width, _ = pictures[0].shape
        return Done(
            job.job_id,
            width,
            height,
            generate_s=time.perf_counter() - job.submitted,
            payload=b"".join(repainted(picture, job.spec).tobytes() for picture in pictures),
            adapter_load_s=0.0 if job.lease is None else job.lease.load_s,
            prepare_s=max(0.0, job.prepared - job.submitted),
            steps_s=max(0.0, job.denoised - job.prepared) if job.prepared else 0.0,
            warnings=job.warnings,
            num_pictures=len(pictures),
        )

    def _end(self, job: Job, event: Done | Failed | Cancelled) -> None:
        self._active.pop(job.job_id, None)
        if job.run is not None:
            with torch.inference_mode():
                job.run.close()
        if job.lease is not None:
            job.lease.release()
        self._events.append(event)

    def _before_scheduler_step(self, job: Job, scheduler: Any, arguments: Mapping[str, Any]) -> None:
        preview = take_preview(self._preview, job, scheduler, arguments)
        if preview is not None:
            self._events.append(preview)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def merges(self) -> bool:
        """Whether a module has a Rule, so that requests may share its forwards."""
        return any(tap.rule is not None for tap in self.taps)

    def find_rules(self, spec: ImageSpec, *, max_forward_s: float | None = None) -> None:
        """Infers and proves the Rules of the pipeline's modules, with requests like `spec`."""
        if self.runner.mode == "off":
            return
        trial = [trial_arguments(self.profile, each) for each in trial_requests(spec)]
        with torch.inference_mode():
            laboratory = Laboratory(self.pipe, self.taps, self.attention, max_forward_s)
            self.take_findings(find_rules(laboratory, trial, written_rules(self.pipe)))

    def take_findings(self, findings: Mapping[str, Finding]) -> None:
        """Merges as these findings say."""
        self.findings = dict(findings)
        self._trials_left = self._trials_left - 1 if ALL in findings else 0
        give_rules(self.taps, findings, self.pipe, self.profile.denoiser_name, self.editing.controlnets)

    def calibrate(self, *, min_gain: float = 1.4, max_stretch: float = 2.5, rows: int | None = None) -> None:
        """Measures forwards of a real job; in `exact` mode sets R to `rows`, or if None to what they show."""
        exact = self.runner.mode == "exact"
        with torch.inference_mode():
            call = first_call(self.profile, self.attention, trial_request(self.profile)).call
            if call is None:
                return
            most = 1 if self.runner.mode == "off" else self.max_rows
            counts = row_counts(call, rows=rows if exact else None, max_rows=most)
            stopwatch = Stopwatch(self.device, self.synchronize)
            self.measured = measure(call, counts, max_stretch=max_stretch, stopwatch=stopwatch)
            if exact:
                self.best_rows = None if rows else find_rows(call, self.measured, min_gain, max_stretch)
                self.runner.num_rows = rows or self.best_rows or 1
        self.times.add(self.profile.width, self.profile.height, self.measured[0].forward_s)

    def measure_again(
        self, interrupted: Callable[[], bool], *, min_gain: float = 1.4, max_stretch: float = 2.5
    ) -> list[Measurement]:
        """Forwards of every row count as they take now, and `best_rows` by them. R stays: bytes are promised.

        For an engine without jobs; Interrupted as soon as `interrupted` says so.
        """
        exact = self.runner.mode == "exact"
        stopwatch = Stopwatch(self.device, self.synchronize, interrupted)
        with torch.inference_mode():
            call = first_call(self.profile, self.attention, trial_request(self.profile)).call
            assert call is not None, "it was measured at load"
            counts = row_counts(call, rows=None, max_rows=self.max_rows if exact else 1)
            measured = measure(call, counts, max_stretch=max_stretch, stopwatch=stopwatch)
            if exact:
                self.best_rows = find_rows(call, measured, min_gain, max_stretch)
        return measured

    def warm_up(self) -> None:
        """Draws a few pictures if that is quick, so that the first request is fast and has previews."""
        if not self.measured or self.measured[0].forward_s <= WARM_STEP_S:
            steps = self.profile.default_steps
            warm_up(lambda spec: self.generate([spec])[0].error is None, self._preview, steps)

    def info(self) -> ModelInfo:
        """What the server must know of this model."""
        return model_info(self)
