"""Rules by hand, for what inference cannot find.

Those of a pipeline's own modules are proven like any other (proof.py). Those that have to do with
ControlNets are not tried at load, because only a request with a picture reaches them: they merge only beside
a proven denoiser, and each of their shapes is checked before it merges (exactness.py), like every shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from mezzotint.engine.steps.batching import Kind, Rule
from mezzotint.engine.steps.inference import Finding
from mezzotint.engine.steps.pipeline_run import Tap

RULES: Mapping[str, Rule] = {
    # The model itself pads each text to a multiple of 32 tokens (SEQ_MULTI_OF), so texts of different length
    # merge without a mask. Lists of rows are never padded by us.
    "ZImageTransformer2DModel": Rule(
        {"x": "list", "t": "row", "cap_feats": "list"}, multiples={"cap_feats": 32}
    ),
}
"""By class of a pipeline's module."""

CONTROLNETS: Mapping[str, Rule] = {
    "FluxControlNetModel": Rule(
        {
            "hidden_states": "row",
            "controlnet_cond": "row",
            "encoder_hidden_states": "row",
            "pooled_projections": "row",
            "timestep": "row",
            "guidance": "row",
            "img_ids": "shared",
            "txt_ids": "shared",
        },
        results="rows",
    ),
    "ControlNetModel": Rule(  # of Stable Diffusion 1.x and XL
        {
            "sample": "row",
            "timestep": "scalar",
            "encoder_hidden_states": "row",
            "controlnet_cond": "row",
            "timestep_cond": "row",
            "added_cond_kwargs.text_embeds": "row",
            "added_cond_kwargs.time_ids": "row",
        },
        results="rows",
    ),
    "SD3ControlNetModel": Rule(
        {
            "hidden_states": "row",
            "controlnet_cond": "row",
            "encoder_hidden_states": "row",
            "pooled_projections": "row",
            "timestep": "row",
        },
        results="rows",
    ),
    "QwenImageControlNetModel": Rule(
        {
            "hidden_states": "row",
            "controlnet_cond": "row",
            "encoder_hidden_states": "row",
            "encoder_hidden_states_mask": "row",
            "timestep": "row",
            "img_shapes": "list",
        },
        results="rows",
    ),
}
"""By class of a ControlNet."""

RESIDUALS: Mapping[str, Mapping[str, Kind]] = {
    "FluxTransformer2DModel": {
        "controlnet_block_samples": "rows",
        "controlnet_single_block_samples": "rows",
    },
    "UNet2DConditionModel": {
        "down_block_additional_residuals": "rows",
        "mid_block_additional_residual": "row",
    },
    "SD3Transformer2DModel": {"block_controlnet_hidden_states": "rows"},
    "QwenImageTransformer2DModel": {"controlnet_block_samples": "rows"},
}
"""By class of a denoiser, the arguments that ControlNets add to it."""


def tap_all(pipe: Any, controlnets: Mapping[str, Any]) -> list[Tap]:
    """Taps on everything that computes: VAEs by `encode` and `decode`, all else by `forward`."""
    taps = [Tap(f"controlnet {route}", each, "forward") for route, each in controlnets.items()]
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        found = [each for each in ("encode", "decode") if hasattr(component, each)] or ["forward"]
        found += ["generate"] * hasattr(component, "generate")
        taps += [Tap(name, component, each) for each in found]
    return taps


def written_rules(pipe: Any) -> dict[str, Rule]:
    """The Rules by hand of a pipeline's modules, by the modules' names."""
    classes = {name: type(component).__name__ for name, component in pipe.components.items()}
    return {name: RULES[known] for name, known in classes.items() if known in RULES}


def give_rules(
    taps: Sequence[Tap],
    findings: Mapping[str, Finding],
    pipe: Any,
    denoiser_name: str,
    controlnets: Mapping[str, Any],
) -> None:
    """Lets each tap merge by the Rule that was found of it or not at all; ControlNets with the denoiser."""
    given = {name: finding.rule for name, finding in findings.items() if finding.rule is not None}
    if own := given.get(denoiser_name):
        added = RESIDUALS.get(type(pipe.components[denoiser_name]).__name__, {})
        given[denoiser_name] = replace(own, arguments={**own.arguments, **added})
        for route, net in controlnets.items():
            if beside := CONTROLNETS.get(type(net).__name__):
                given[f"controlnet {route}"] = beside
    for tap in taps:
        if tap.parks:
            tap.rule = given.get(tap.name)
