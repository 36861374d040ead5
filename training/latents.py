"""Pictures as the denoiser sees them: normalised, packed latents."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from training.device import Setup

SIDE = 8


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(n, c, h, w) to FLUX's tokens (n, h/2 * w/2, 4c)."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack(tokens: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """The inverse of `pack` for square latents of that side."""
    n, _, width = tokens.shape
    c, half = width // 4, side // 2
    return tokens.view(n, half, half, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c, side, side)


def image_ids(side: int = SIDE) -> torch.Tensor:
    """The positions of the packed tokens, as FluxPipeline numbers them: (tokens, 3)."""
    half = side // 2
    ids = torch.zeros(half, half, 3)
    ids[..., 1] = torch.arange(half)[:, None]
    ids[..., 2] = torch.arange(half)[None, :]
    return ids.view(half * half, 3)


def encode(vae: AutoencoderKL, pictures: torch.Tensor, setup: Setup) -> torch.Tensor:
    """Pictures (n, 3, 128, 128) in -1..1 as packed latents with zero mean and unit deviation."""
    pictures = pictures.to(setup.device, memory_format=torch.channels_last)
    with torch.no_grad(), setup.autocast():
        mean = vae.encoder(pictures).float().chunk(2, dim=1)[0]
    return pack((mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)
