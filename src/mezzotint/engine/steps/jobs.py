"""A job: one image on its way, from its request to the pipeline run that draws it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mezzotint.engine.lora.bank import Lease
from mezzotint.engine.steps.batching import Call
from mezzotint.engine.steps.pipeline_run import PipelineRun
from mezzotint.engine.steps.scheduler import Candidate
from mezzotint.spec import ImageSpec


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """Belongs to one Engine, which makes it at `submit` and forgets it when its last event is told."""

    job_id: str
    spec: ImageSpec
    seed: int
    pipe: Any = field(repr=False)
    """The pipeline that draws it."""
    width: int
    height: int
    arguments: dict[str, Any]
    """Those of the pipeline's `__call__`."""
    warnings: list[str]
    arrival: int
    """Running number; settles ties between equally urgent jobs."""
    submitted: float
    """Clock reading, seconds."""
    priority: int
    """The engine raises it once for a job that was overdue."""
    owner: str
    previews_due: tuple[int, ...]
    """Steps after which a preview is drawn."""

    # Filled when the engine starts the job.
    run: PipelineRun | None = None
    lease: Lease | None = None

    # Filled by the engine after each forward of the job.
    parked: float = 0.0
    """Clock reading when its latest call was parked; the scheduler sees how long ago that was."""
    num_forwards: int = 0
    """Denoiser forwards so far; several a step with true classifier-free guidance."""
    num_reported: int = 0
    """Steps that the latest Progress told of."""
    prepared: float = 0.0
    """Clock reading when its first denoiser call was parked."""
    denoised: float = 0.0
    """Clock reading after the latest step that Progress told of."""
    clean: Tensor | None = field(default=None, repr=False)
    """Latents after the last step, kept from there to the finished picture for the preview to learn from."""

    @property
    def started(self) -> PipelineRun:
        """The run of a job that has one."""
        assert self.run is not None, "the job has started"
        return self.run

    @property
    def call(self) -> Call:
        """The parked call of a running job."""
        assert self.started.call is not None, "a running job is parked"
        return self.started.call

    def candidate(self, now: float, *, forward_s: float, owner_lead_s: float) -> Candidate:
        """Its parked call for the scheduler, at `forward_s` seconds for each forward that it has left."""
        run, call = self.started, self.call
        done = run.num_steps
        forwards_per_step = max(1.0, self.num_forwards / done) if done else 1.0
        steps_left = max(0, self.spec.num_steps - done)
        return Candidate(
            job_id=self.job_id,
            key=call.key,
            rows=call.rows,
            remaining_s=steps_left * forwards_per_step * forward_s,
            waited_s=now - self.parked,
            owner=self.owner,
            owner_lead_s=owner_lead_s,
            priority=self.priority,
            arrival=self.arrival,
        )
