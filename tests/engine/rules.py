"""What inference must find of the denoisers that it does not need a Rule by hand for."""

from __future__ import annotations

from collections.abc import Mapping

from mezzotint.engine.steps import rules
from mezzotint.engine.steps.batching import Rule

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
    **rules.RULES,
}
