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
            "controlnet_block_samples": "rows",
            "controlnet_single_block_samples": "rows",
        }
    ),
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
            "down_block_additional_residuals": "rows",
            "mid_block_additional_residual": "row",
        }
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
    "SD3Transformer2DModel": Rule(
        {
            "hidden_states": "row",
            "encoder_hidden_states": "row",
            "pooled_projections": "row",
            "timestep": "row",
            "block_controlnet_hidden_states": "rows",
        }
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
            "controlnet_block_samples": "rows",
        }
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
    "ZImageTransformer2DModel": Rule(
        {"x": "list", "t": "row", "cap_feats": "list"},
        multiples={"cap_feats": 32},  # SEQ_MULTI_OF
    ),
}


def tap_all(pipe: Any, denoiser_name: str, controlnets: Mapping[str, Any], *, merges: bool) -> list[Tap]:
    """Taps on everything that computes: VAEs by `encode` and `decode`, all else by `forward`.

    With `merges` the denoiser and the ControlNets (by route) have the Rule of their class.
    """
    rules = RULES if merges else {}
    taps = [
        Tap(f"controlnet {route}", each, "forward", rules.get(type(each).__name__))
        for route, each in controlnets.items()
    ]
    for name, component in pipe.components.items():
        if not isinstance(component, torch.nn.Module):
            continue
        rule = rules.get(type(component).__name__) if name == denoiser_name else None
        found = [each for each in ("encode", "decode") if hasattr(component, each)] or ["forward"]
        found += ["generate"] * hasattr(component, "generate")
        taps += [Tap(name, component, each, rule) for each in found]
    return taps
