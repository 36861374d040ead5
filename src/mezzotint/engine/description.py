"""What the server is told of a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mezzotint.messages import ModelInfo

if TYPE_CHECKING:
    from mezzotint.engine.engine import Engine


def model_info(engine: Engine) -> ModelInfo:
    """The abilities and the speed of the model of a worker's engine."""
    loaded = engine.loaded
    assert loaded is not None, "only a worker's engine, which `load` made, is asked"
    return ModelInfo(
        pipeline_class=type(engine.pipe).__name__,
        model_class=type(engine.profile.denoiser).__name__,
        dtype=loaded.dtype,
        device=loaded.device,
        num_threads=loaded.num_threads,
        batching=engine.runner.mode,
        performance=loaded.performance,
        rows=engine.runner.num_rows if engine.runner.mode == "exact" else 1,
        mergeable=engine.merges,
        width=engine.profile.width,
        height=engine.profile.height,
        size_multiple=engine.profile.size_multiple,
        default_steps=engine.profile.default_steps,
        default_guidance=engine.profile.default_guidance,
        guidance_effective=engine.profile.guidance_effective,
        supports_negative_prompt=engine.profile.supports_negative_prompt,
        max_prompt_tokens=engine.profile.max_prompt_tokens,
        num_parameters=loaded.num_parameters,
        max_pictures=engine.editing.max_pictures,
        masks=engine.editing.masks,
        strength=engine.editing.strength,
        best_rows=engine.best_rows,
        calibration=[each.facts() for each in engine.measured],
        step_s=engine.measured[0].forward_s if engine.measured else 0.0,
        sizes=list(engine.profile.manifest.sizes),
        examples=list(engine.profile.manifest.examples),
        merging={name: finding.words for name, finding in engine.findings.items()},
    )
