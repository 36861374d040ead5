"""Packed latents are FLUX's packed latents."""

from __future__ import annotations

import torch
from diffusers import FluxPipeline

from training.data import composite
from training.latents import image_ids, pack, unpack


def test_packing_is_what_the_pipeline_does_and_unpacking_inverts_it() -> None:
    latents = torch.randn(2, 32, 8, 8)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 32, 8, 8))
    assert torch.equal(unpack(pack(latents)), latents)


def test_positions_are_numbered_as_the_pipeline_numbers_them() -> None:
    theirs = FluxPipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(), theirs)


def test_a_transparent_picture_shows_its_background_and_an_opaque_one_hides_it() -> None:
    clear = torch.zeros(1, 128, 128, 4, dtype=torch.uint8).numpy()
    solid = torch.full((1, 128, 128, 4), 255, dtype=torch.uint8).numpy()
    red = torch.tensor([[255.0, 0.0, 0.0]])
    assert composite(clear, red)[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]
    assert composite(solid, red)[0, :, 0, 0].tolist() == [1.0, 1.0, 1.0]
