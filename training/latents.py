"""Pictures as the denoiser sees them: normalised, packed latents, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.data import Pictures, Subject, composite
from training.device import Setup
from training.palette import BACKGROUNDS

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


@dataclass(frozen=True, slots=True)
class LatentTable:
    """Packed latents of every subject on every background: (subjects, backgrounds, tokens, channels)."""

    subjects: list[Subject]
    latents: torch.Tensor

    def batch(self, rows: list[int], colours: list[int]) -> torch.Tensor:
        return self.latents[torch.tensor(rows), torch.tensor(colours)]


def encode(vae: AutoencoderKL, pictures: torch.Tensor, setup: Setup) -> torch.Tensor:
    """Pictures (n, 3, 128, 128) in -1..1 as packed latents with zero mean and unit deviation."""
    pictures = pictures.to(setup.device, memory_format=torch.channels_last)
    with torch.no_grad(), setup.autocast():
        mean = vae.encoder(pictures).float().chunk(2, dim=1)[0]
    return pack((mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor)


def build_table(
    vae: AutoencoderKL, pictures: Pictures, subjects: list[Subject], style: str, setup: Setup
) -> LatentTable:
    """Encodes the subjects that the style has a picture of."""
    present = [subject for subject in subjects if pictures.row(style, subject.name) is not None]
    palette = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)
    vae = vae.to(setup.device, memory_format=torch.channels_last)
    rows = []
    for subject in present:
        rgba = pictures.pixels[[pictures.rows[style][subject.name]] * len(palette)]
        rows.append(encode(vae, composite(rgba, palette), setup).half())
    return LatentTable(present, torch.stack(rows))


def load_table(
    vae_folder: Path, pictures: Pictures, subjects: list[Subject], style: str, setup: Setup, cache: Path
) -> LatentTable:
    """The table from the cache file, built and kept there when it is missing."""
    if cache.exists():
        kept = torch.load(cache, weights_only=True)
        by_name = {subject.name: subject for subject in subjects}
        if set(kept["names"]) <= set(by_name):
            return LatentTable([by_name[name] for name in kept["names"]], kept["latents"])
    table = build_table(AutoencoderKL.from_pretrained(vae_folder), pictures, subjects, style, setup)
    torch.save({"names": [subject.name for subject in table.subjects], "latents": table.latents}, cache)
    return table
