"""The Rule of each model class that may be merged; every one of them has a parity test in tests/engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mezzotint.engine.steps.batching import Rule
from mezzotint.engine.steps.pipeline_run import Tap

RULES: Mapping[str, Rule] = {
    "FluxTransformer2DModel": Rule(
        {
            "hidden_states": "row",
            "encoder_hidden_states": "row",
            "pooled_projections": "row",
            "timestep": "row",
            "guidance": "row",
            "img_ids": "shared",
            "txt_ids": "shared",
        }
    ),
    "Flux2Transformer2DModel": Rule(  # the ids have a batch dimension, but only row 0 is read
        {
            "hidden_states": "row",
            "encoder_hidden_states": "row",
            "timestep": "row",
            "guidance": "row",
            "img_ids": "shared",
            "txt_ids": "shared",
        }
    ),
    "UNet2DConditionModel": Rule(  # Stable Diffusion 1.x and XL; the timestep comes as a 0-d tensor
        {
            "sample": "row",
            "timestep": "scalar",
            "encoder_hidden_states": "row",
            "timestep_cond": "row",
            "added_cond_kwargs.text_embeds": "row",
            "added_cond_kwargs.time_ids": "row",
        }
    ),
    "SD3Transformer2DModel": Rule(
        {
            "hidden_states": "row",
            "encoder_hidden_states": "row",
            "pooled_projections": "row",
            "timestep": "row",
        }
    ),
    "PixArtTransformer2DModel": Rule(
        {
            "hidden_states": "row",
            "encoder_hidden_states": "row",
            "encoder_attention_mask": "row",
            "timestep": "row",
            "added_cond_kwargs.resolution": "row",
            "added_cond_kwargs.aspect_ratio": "row",
        }
    ),
    "SanaTransformer2DModel": Rule(
        {
            "hidden_states": "row",
            "encoder_hidden_states": "row",
            "encoder_attention_mask": "row",
            "timestep": "row",
            "guidance": "row",
        }
    ),
    "QwenImageTransformer2DModel": Rule(  # prompts of different length differ in shape and do not merge
        {
            "hidden_states": "row",
            "encoder_hidden_states": "row",
            "encoder_hidden_states_mask": "row",
            "timestep": "row",
            "guidance": "row",
            "img_shapes": "list",
        }
    ),
    "ZImageTransformer2DModel": Rule(
        {"x": "list", "t": "row", "cap_feats": "list"},
        multiples={"cap_feats": 32},  # SEQ_MULTI_OF
    ),
}


def tap_all(pipe: Any, denoiser_name: str, *, by_rule: bool) -> list[Tap]:
    """Taps on everything that computes: VAEs by `encode` and `decode`, all else by `forward`.

    `by_rule`: the denoiser merges by the Rule of its class.
    """
    taps = []
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        rule = RULES.get(type(component).__name__) if by_rule and name == denoiser_name else None
        found = [each for each in ("encode", "decode") if hasattr(component, each)] or ["forward"]
        found += ["generate"] * hasattr(component, "generate")
        taps += [Tap(name, component, each, rule) for each in found]
    return taps
