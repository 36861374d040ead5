"""Previews: the model's current estimate of the finished picture, at a cost far below one step.

The estimate of the clean latents follows from what the scheduler is given at each step; a linear map,
learned from pictures this pipeline has finished, turns them into pixels. Latents are a grid of feature
vectors: [1, channels, rows, columns], or [1, tokens, channels] in reading order. A pipeline that packs blocks
of 2x2 into a token (as Flux does: channels outermost) has them unpacked first, for four times the examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mezzotint.engine.steps.jobs import Job
from mezzotint.messages import Preview

MAX_SUBPIXELS = 4
"""Most pixels per side that the map draws for one feature vector."""
_RIDGE = 1e-3
_ENOUGH = 4
"""Feature vectors per unknown before the map is used ..."""
_PLENTY = 16
"""... and before it stops learning."""


def preview_steps(num_previews: int, num_steps: int) -> list[int]:
    """The steps after which evenly spaced previews are due, none at the last step: (2, 9) gives [3, 6]."""
    steps = {index * num_steps // (num_previews + 1) for index in range(1, num_previews + 1)}
    return sorted(steps - {0, num_steps})


def estimate_clean(scheduler: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor | None:
    """The finished latents as the model sees them now, from what `scheduler.step` is given; None if unknown.

    With z the sample, v or e the model's output: flow matching z - sigma v; e-prediction (z - b e) / a and
    v-prediction a z - b v with a, b = sqrt(alphas_cumprod), sqrt(1 - alphas_cumprod); with samples in sigma
    space (Euler and its kin) z is first brought to unit variance: z / sqrt(sigma^2 + 1).
    """
    sample, output = sample.float(), model_output.float()
    if output.shape != sample.shape:  # learned variance comes along in further channels
        output = output[:, : sample.shape[1]]
    config = scheduler.config
    kind = config.get("prediction_type", "epsilon")
    name = type(scheduler).__name__
    if name.startswith("FlowMatch") or kind == "flow_prediction":
        return sample - _sigma(scheduler, timestep) * output
    if kind == "sample":
        return output
    if not hasattr(scheduler, "alphas_cumprod"):
        return None
    if any(word in name for word in _IN_SIGMA_SPACE):
        sigma = _sigma(scheduler, timestep)
        a, b = 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5
        sample = sample * a
    else:
        cumulative = float(scheduler.alphas_cumprod[int(timestep)])
        a, b = cumulative**0.5, (1 - cumulative) ** 0.5
    formula = _FORMULAS.get(kind)
    return None if formula is None else formula(sample, output, a, b)


_IN_SIGMA_SPACE = ("Euler", "Heun", "KDPM2", "LMS")
_FORMULAS: Mapping[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda z, e, a, b: (z - b * e) / a,
    "v_prediction": lambda z, v, a, b: a * z - b * v,
}


def _sigma(scheduler: Any, timestep: Any) -> float:
    index = scheduler.step_index
    if index is None:  # before the first step
        matches = (scheduler.timesteps == timestep).nonzero()
        index = int(matches[0]) if len(matches) else 0
    return float(scheduler.sigmas[index])


class LatentPreview:
    """A linear map from the scheduler's latents to pixels, learned from finished pictures."""

    def __init__(self, *, packed: bool = False) -> None:
        """`packed`: a token of the latents is a block of 2x2."""
        self._packed = packed
        self._gram: Tensor | None = None
        self._moment: Tensor | None = None
        self._num_vectors = 0
        self._map: Tensor | None = None

    @property
    def ready(self) -> bool:
        """Whether enough has been seen to draw."""
        return self._gram is not None and self._num_vectors >= _ENOUGH * len(self._gram)

    @property
    def learned(self) -> bool:
        """Whether more pictures would change little."""
        return self._gram is not None and self._num_vectors >= _PLENTY * len(self._gram)

    def learn(self, latents: Tensor, pixels: Tensor) -> None:
        """Takes one finished picture (uint8, height x width x 3) and the latents after its last step."""
        height, width = pixels.shape[:2]
        features = _features(latents, width, height, self._packed)
        if features is None or self.learned:
            return
        targets = _targets(pixels, *features.shape[:2])
        if self._gram is not None and len(self._gram) != features.shape[2]:
            return
        flat, target = features.flatten(0, 1), targets.flatten(0, 1)
        gram, moment = flat.T @ flat, flat.T @ target
        if self._gram is None or self._moment is None or self._moment.shape != moment.shape:
            self._gram, self._moment, self._num_vectors = gram, moment, 0
        else:
            self._gram, self._moment = self._gram + gram, self._moment + moment
        self._num_vectors += len(flat)
        self._map = None

    def draw(self, latents: Tensor, width: int, height: int) -> Tensor | None:
        """uint8 pixels of a picture of this shape, at half its size; None before enough was seen."""
        features = _features(latents, width, height, self._packed)
        if not self.ready or features is None or self._gram is None or self._moment is None:
            return None
        if len(self._gram) != features.shape[2]:
            return None
        if self._map is None:
            ridge = _RIDGE * self._num_vectors * torch.eye(len(self._gram))
            self._map = torch.linalg.solve(self._gram + ridge, self._moment)
        drawn = features @ self._map
        rows, columns = drawn.shape[:2]
        side = math.isqrt(drawn.shape[2] // 3)
        blocks = drawn.view(rows, columns, side, side, 3).permute(4, 0, 2, 1, 3)
        planes = blocks.reshape(1, 3, rows * side, columns * side)
        size = (height // 2, width // 2)
        smooth = functional.interpolate(planes, size, mode="bilinear", antialias=False)[0]
        return (smooth.permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()


def _features(latents: Tensor, width: int, height: int, packed: bool) -> Tensor | None:
    """[rows, columns, channels + 1] on the CPU, the last feature being 1; None where there is no grid."""
    latents = latents.detach().float().cpu()[0]
    if latents.ndim == 4 and 1 in latents.shape[:2]:  # one frame, before or after the channels
        latents = latents.flatten(0, 1)
    if latents.ndim == 3:
        grid = latents.permute(1, 2, 0)
    elif latents.ndim == 2:
        rows = round(math.sqrt(len(latents) * height / width))
        if rows == 0 or len(latents) % rows:
            return None
        grid = latents.view(rows, len(latents) // rows, -1)
        grid = _unpack(grid) if packed else grid
    else:
        return None
    if height % grid.shape[0] or width % grid.shape[1] or not bool(grid.isfinite().all()):
        return None
    return torch.cat([grid, torch.ones(*grid.shape[:2], 1)], dim=2)


def _unpack(tokens: Tensor) -> Tensor:
    """[rows, columns, 4 * channels] as [2 * rows, 2 * columns, channels]."""
    rows, columns, size = tokens.shape
    blocks = tokens.view(rows, columns, size // 4, 2, 2).permute(0, 3, 1, 4, 2)
    return blocks.reshape(2 * rows, 2 * columns, size // 4)


def _targets(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns, side * side * 3]: the pixels that each feature vector stands for, made smaller."""
    side = max(1, min(MAX_SUBPIXELS, len(pixels) // rows // 2))
    planes = (pixels.float() / 255).permute(2, 0, 1)
    small = functional.adaptive_avg_pool2d(planes, (rows * side, columns * side))
    blocks = small.view(3, rows, side, columns, side).permute(1, 3, 2, 4, 0)
    return blocks.reshape(rows, columns, side * side * 3)


def take_preview(
    latents: LatentPreview, job: Job, scheduler: Any, arguments: Mapping[str, Any]
) -> Preview | None:
    """Before a scheduler step: where a preview is due, or one can be learned from, estimates the picture.

    `arguments` are those of the step. The last estimate is kept in the job, to learn from.
    """
    step = job.started.num_steps + 1
    last = step == len(scheduler.timesteps)
    if not (step in job.previews_due or (last and not latents.learned)):
        return None
    clean = estimate_clean(scheduler, arguments["model_output"], arguments["timestep"], arguments["sample"])
    if last or clean is None:
        job.clean = clean
        return None
    drawn = latents.draw(clean, job.width, job.height)
    if drawn is None:
        return None
    height, width = drawn.shape[:2]
    index = job.previews_due.index(step)
    return Preview(job.job_id, index, step, width, height, drawn.numpy().tobytes())
