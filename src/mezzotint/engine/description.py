"""What the server is told of a loaded model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers

from mezzotint import __version__
from mezzotint.engine.steps.batching import Rule
from mezzotint.engine.steps.inference import ALL, Finding
from mezzotint.engine.steps.padding import Text
from mezzotint.messages import MergeFinding, ModelInfo, Proof

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
        form=loaded.form,
        form_text=loaded.forms.text,
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
        min_pictures=engine.editing.min_pictures,
        masks=engine.editing.masks,
        strength=engine.editing.strength,
        takes_size=engine.profile.takes_size,
        best_rows=engine.best_rows,
        calibration=[each.facts() for each in engine.measured],
        step_s=engine.measured[0].forward_s if engine.measured else 0.0,
        sizes=list(engine.profile.manifest.sizes),
        about=engine.profile.manifest.about,
        license=engine.profile.manifest.license,
        examples=list(engine.profile.manifest.examples),
        merging={name: finding.words for name, finding in engine.findings.items()},
        proof=_proof(engine),
    )


def made_with(pipe: Any) -> str:
    """The versions and classes on which a proof rests."""
    versions = {"mezzotint": __version__}
    versions |= {library.__name__: library.__version__ for library in (torch, diffusers, transformers)}
    classes = {name: type(part).__name__ for name, part in pipe.components.items()}
    return ", ".join(f"{name} {value}" for name, value in (*versions.items(), *sorted(classes.items())))


def _proof(engine: Engine) -> Proof | None:
    if not engine.findings or ALL in engine.findings:
        return None
    found = {}
    for name, finding in engine.findings.items():
        rule, text = finding.rule, finding.rule.text if finding.rule else None
        found[name] = MergeFinding(
            finding.reason,
            None if rule is None else rule.arguments,
            {} if rule is None else rule.dimensions,
            {} if rule is None else rule.multiples,
            None if text is None else text.dimensions,
            None if text is None else text.mask,
            {} if rule is None else rule.objects,
        )
    return Proof(made_with(engine.pipe), found)


def findings_of(proof: Proof | None, pipe: Any) -> dict[str, Finding] | None:
    """The findings that an earlier start made of this pipeline; None where they hold no longer."""
    if proof is None or proof.made_with != made_with(pipe):
        return None
    return {name: Finding(_rule(kept), kept.reason) for name, kept in proof.findings.items()}


def _rule(kept: MergeFinding) -> Rule | None:
    if kept.arguments is None:
        return None
    kinds: Any = kept.arguments
    text = None if kept.text is None else Text(kept.text, kept.mask)
    return Rule(kinds, multiples=kept.multiples, dimensions=kept.dimensions, text=text, objects=kept.objects)
