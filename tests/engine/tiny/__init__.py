"""Small pipelines with random weights: a few hundred kB, millisecond forwards, tokenizers made on the spot.

`build("flux")` gives a pipeline, `save("flux", folder)` one that `from_pretrained` loads, `call("flux")` the
arguments that keep its run short (size, text length). The same name always gives the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.engine.tiny import families, others


@dataclass(frozen=True, slots=True)
class Tiny:
    """One small pipeline."""

    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of every call, on top of width and height."""
    size: int = 32


TEXT = {"max_sequence_length": 32}
KLEIN = {**TEXT, "text_encoder_out_layers": (1, 2)}
UNBINNED = {"use_resolution_binning": False}
SANA = {**TEXT, **UNBINNED, "complex_human_instruction": None}

FAMILIES: dict[str, Tiny] = {
    "flux": Tiny(families.flux, TEXT, 64),
    "flux-schnell": Tiny(families.flux_schnell, TEXT, 64),
    "flux2-klein": Tiny(families.flux2_klein, KLEIN),
    "stable-diffusion": Tiny(families.stable_diffusion),
    "stable-diffusion-xl": Tiny(families.stable_diffusion_xl),
    "stable-diffusion-3": Tiny(families.stable_diffusion_3, TEXT),
    "pixart-sigma": Tiny(families.pixart_sigma, {**TEXT, **UNBINNED}),
    "sana": Tiny(families.sana, SANA),
    "qwen-image": Tiny(families.qwen_image),
    "z-image": Tiny(families.z_image, {"max_sequence_length": 64}, 64),
}
"""Pipelines whose denoiser has a rule."""

OTHERS: dict[str, Tiny] = {
    "latent-consistency": Tiny(others.latent_consistency),
    "pixart-alpha": Tiny(others.pixart_alpha, {**TEXT, **UNBINNED}),
    "lumina2": Tiny(others.lumina2, {"max_sequence_length": 256}, 64),
    "aura-flow": Tiny(others.aura_flow, TEXT),
    "cogview3-plus": Tiny(others.cogview3_plus, TEXT),
    "cogview4": Tiny(others.cogview4, TEXT),
    "hunyuan-dit": Tiny(others.hunyuan_dit, UNBINNED, 64),
    "chroma": Tiny(others.chroma, TEXT),
    "kandinsky3": Tiny(others.kandinsky3, size=64),
    "ovis-image": Tiny(others.ovis_image, {"max_sequence_length": 64}),
}
"""Pipelines without a tested rule."""

EDITORS: dict[str, Tiny] = {"stable-diffusion-3-wide": Tiny(families.stable_diffusion_3_wide, TEXT)}
"""Pipelines for the tests with pictures alone."""

ALL = {**FAMILIES, **OTHERS, **EDITORS}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh pipeline, ready to call; seeded, so two builds are equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = ALL[name].make()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                _randomise(part)
                part.requires_grad_(False).eval()
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The pipeline as a diffusers folder with safetensors weights."""
    build(name, dtype).save_pretrained(folder, safe_serialization=True)
    return folder


def call(name: str) -> dict[str, Any]:
    """Arguments of a pipeline call that keep it short."""
    tiny = ALL[name]
    return {"width": tiny.size, "height": tiny.size, **tiny.call}


def _randomise(module: torch.nn.Module) -> None:
    """Leaves nothing at zero, so that prompt, guidance and time all reach the picture."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        else:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
