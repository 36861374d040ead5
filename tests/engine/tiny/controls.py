"""Small ControlNets with random weights, made for the pipelines of the same name."""

from __future__ import annotations

from typing import Any

import diffusers as d
import torch

from tests.engine import tiny

_JOINT = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}


def _of_unet(pipe: Any) -> Any:
    return d.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8, 16))


def _flux(pipe: Any) -> Any:
    return d.FluxControlNetModel.from_transformer(pipe.transformer, **_JOINT, num_single_layers=1)


def _sd3(pipe: Any) -> Any:
    return d.SD3ControlNetModel.from_config(
        dict(pipe.transformer.config) | {"num_layers": 1, "extra_conditioning_channels": 0}
    )


def _qwen(pipe: Any) -> Any:
    return d.QwenImageControlNetModel.from_transformer(pipe.transformer, **_JOINT)


CONTROLS = {
    "flux": _flux,
    "stable-diffusion": _of_unet,
    "stable-diffusion-xl": _of_unet,
    "stable-diffusion-3": _sd3,
    "qwen-image": _qwen,
}


def control(name: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """A ControlNet for `tiny.build(name, dtype)`; what training would make of its zeros is drawn."""
    made = CONTROLS[name](tiny.build(name, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if not parameter.abs().sum():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return made.to(dtype).requires_grad_(False).eval()
