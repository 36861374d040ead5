"""The requests with which a model is tried at load: of its endpoint's own size, steps and arguments."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mezzotint.engine.arguments import PipelineProfile
from mezzotint.engine.calibration import SLOW_FORWARD_S
from mezzotint.engine.steps.batching import Call
from mezzotint.engine.steps.inference import ALL, Finding
from mezzotint.engine.steps.pipeline_run import PipelineRun
from mezzotint.engine.steps.runner import is_out_of_memory
from mezzotint.engine.steps.shared_state import AttentionState
from mezzotint.errors import ModelLoadError
from mezzotint.spec import EngineSettings, ImageSpec, InputPicture

if TYPE_CHECKING:
    from mezzotint.engine.engine import Engine

PRIOR_STEPS = "prior_num_inference_steps"
"""A pipeline argument: steps before the denoiser runs at all, few of which are enough to see it."""
_PROMPTS = (
    "a red apple on a blue table",
    "a blue table on a red apple",
    "two boats at dawn on a quiet river",
)
"""Two of one length in words and letters, and one of another."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """The first denoiser call of a real run; `width` and `height` are what the pipeline then draws."""

    call: Call | None
    width: object
    height: object


def trial_request(profile: PipelineProfile) -> ImageSpec:
    """What the endpoint draws for a prompt alone, or of a grey picture where it needs one."""
    grey = InputPicture(profile.width, profile.height, bytes([128]) * profile.width * profile.height * 3)
    images = (grey,) if profile.family.edits_only else ()
    return ImageSpec(prompt=_PROMPTS[0], num_inference_steps=profile.default_steps, images=images)


def without_pictures(spec: ImageSpec) -> ImageSpec:
    """The request for words alone that is most like `spec`."""
    return replace(spec, images=(), mask=None, strength=None, control_images=(), controlnet_weights=())


def trial_requests(spec: ImageSpec) -> list[ImageSpec]:
    """Three like `spec`: two of one length with other words, and one of another length and guidance."""
    guidance = None if spec.guidance_scale is None else spec.guidance_scale + 1.5
    return [
        replace(spec, prompt=_PROMPTS[0]),
        replace(spec, prompt=_PROMPTS[1]),
        replace(spec, prompt=_PROMPTS[2], guidance_scale=guidance),
    ]


def trial_arguments(profile: PipelineProfile, spec: ImageSpec) -> dict[str, Any]:
    """The arguments of the pipeline's call, with as few steps beforehand as can be."""
    arguments, _ = profile.call_arguments(spec)
    return arguments | ({PRIOR_STEPS: 2} if PRIOR_STEPS in profile.parameters else {})


def first_call(
    profile: PipelineProfile, attention: AttentionState, spec: ImageSpec, *, sized: bool = True
) -> Seen:
    """Runs `spec` up to its first denoiser call, and raises what the pipeline raises on the way.

    Not `sized`: without width and height, so that the pipeline shows the size that is its own.
    """
    arguments: Mapping[str, Any] = trial_arguments(profile, spec)
    if not sized:
        arguments = {name: value for name, value in arguments.items() if name not in ("width", "height")}
    run = PipelineRun(profile.pipe_for(spec), arguments, seed=0, attention=attention)
    try:
        run.start()
        while run.call is not None and run.call.name != profile.denoiser_name:
            run.resume(run.call.alone())
        if run.error is not None:
            raise run.error
        return Seen(run.call, run.local("width"), run.local("height"))
    finally:
        run.close()


def try_out(
    engine: Engine, settings: EngineSettings, rows: int | None, known: Mapping[str, Finding] | None
) -> None:
    """What the endpoint's own request shows: size, what merges, speed. One that fails is noted.

    `rows` and `known` are what an earlier start measured and found.
    """
    profile = engine.profile
    try:
        if profile.size_is_guessed:
            _learn_size(engine)
        engine.max_merge_pixels = profile.width * profile.height
        if known is not None:
            engine.take_findings(known)
        else:
            slow_s = SLOW_FORWARD_S if settings.batching == "exact" else None
            engine.find_rules(trial_request(profile), max_forward_s=slow_s)
        engine.calibrate(min_gain=settings.min_batch_gain, max_stretch=settings.max_batch_stretch, rows=rows)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        _log.warning("the model's first picture failed; it is served unmerged", exc_info=error)
        reason = f"the first picture failed: {type(error).__name__}: {error}"
        engine.take_findings({ALL: Finding(reason=reason)})
        return
    with torch.inference_mode():
        _try_controlnets(engine)
    engine.warm_up()


def _learn_size(engine: Engine) -> None:
    """Sees what the pipeline draws when it is told no size; one that must be told keeps the guess."""
    profile = engine.profile
    try:
        with torch.inference_mode():
            seen = first_call(profile, engine.attention, trial_request(profile), sized=False)
    except (TypeError, ValueError, AttributeError) as error:
        _log.info("the pipeline draws nothing without a size", exc_info=error)
    else:
        profile.learn_size(seen.width, seen.height)


def _try_controlnets(engine: Engine) -> None:
    """Runs one step with the first ControlNet, with two and so on; ModelLoadError if that fails."""
    grey = InputPicture(8, 8, bytes([128]) * 192)
    for index, route in enumerate(engine.editing.controlnets):
        spec = replace(trial_request(engine.profile), control_images=(grey,) * (index + 1))
        try:
            call = first_call(engine.editing.profile(spec), engine.attention, spec).call
            assert call is not None, "a pipeline with a ControlNet has a denoiser"
            call.alone()
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            raise ModelLoadError(
                f"ControlNet {route} does not fit this model: {reason}; use one that was made for it",
                code="unsupported_class",
            ) from error
