"""Previews: when they are due, what the clean latents are estimated to be, and how those become pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from mezzotint.engine.previews import LatentPreview, estimate_clean, preview_steps


@pytest.mark.parametrize(
    ("num_previews", "num_steps", "expected"),
    [(0, 8, []), (1, 8, [4]), (2, 9, [3, 6]), (3, 8, [2, 4, 6]), (3, 3, [1, 2]), (5, 1, []), (1, 1, [])],
)
def test_previews_are_evenly_spaced_and_never_at_the_end(
    num_previews: int, num_steps: int, expected: list[int]
) -> None:
    assert preview_steps(num_previews, num_steps) == expected


CLEAN = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def run(scheduler: Any, start: Tensor, predict: Any) -> list[Tensor]:
    """All estimates on the way of a model that knows the clean latents."""
    sample = start
    found = []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
        output = predict(sample, scaled, t)
        estimate = estimate_clean(scheduler, output, t, sample)
        assert estimate is not None
        found.append(estimate)
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
    return found


def test_flow_matching_estimates_the_clean_latents_from_every_step() -> None:
    scheduler = flow(shift=3.0)
    scheduler.set_timesteps(6)
    for estimate in run(scheduler, NOISE, lambda sample, scaled, t: NOISE - CLEAN):
        torch.testing.assert_close(estimate, CLEAN, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler"])
def test_variance_preserving_schedulers_too(name: str, kind: str) -> None:
    scheduler = getattr(diffusers, name)(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(5)

    def predict(sample: Tensor, scaled: Tensor, t: Tensor) -> Any:
        signal = scheduler.alphas_cumprod[t] ** 0.5
        noise = (1 - scheduler.alphas_cumprod[t]) ** 0.5
        hidden = (sample - signal * CLEAN) / noise
        return {"epsilon": hidden, "v_prediction": signal * hidden - noise * CLEAN, "sample": CLEAN}[kind]

    for estimate in run(scheduler, NOISE, predict):
        torch.testing.assert_close(estimate, CLEAN, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_schedulers_in_sigma_space_too(name: str, kind: str) -> None:
    scheduler = getattr(diffusers, name)(prediction_type=kind)
    scheduler.set_timesteps(5)

    def predict(sample: Tensor, scaled: Tensor, t: Tensor) -> Any:
        index = (scheduler.timesteps == t).nonzero()[0]
        sigma = scheduler.sigmas[index]
        hidden = (sample - CLEAN) / sigma
        if kind == "epsilon":
            return hidden
        return (hidden - sigma * CLEAN) / (sigma**2 + 1) ** 0.5

    start = CLEAN + NOISE * scheduler.init_noise_sigma
    for estimate in run(scheduler, start, predict):
        torch.testing.assert_close(estimate, CLEAN, atol=1e-3, rtol=1e-3)


def test_learned_variance_in_further_channels_is_left_out() -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type="sample")
    scheduler.set_timesteps(5)
    output = torch.cat([CLEAN, NOISE], dim=1)
    estimate = estimate_clean(scheduler, output, scheduler.timesteps[0], NOISE)
    assert estimate is not None
    assert torch.equal(estimate, CLEAN)


def test_a_scheduler_nobody_knows_gives_no_estimate() -> None:
    class Unknown:
        def __init__(self) -> None:
            self.config: dict[str, Any] = {}

    assert estimate_clean(Unknown(), CLEAN, 1, NOISE) is None


def taught(latents: list[Tensor], pictures: list[Tensor], *, packed: bool = False) -> LatentPreview:
    preview = LatentPreview(packed=packed)
    for latent, picture in zip(latents, pictures, strict=True):
        preview.learn(latent, picture)
    return preview


def linear_picture(latents: Tensor) -> Tensor:
    """What a VAE would make that maps channel 0 to 2 to red, green and blue, eight pixels to the latent."""
    colours = latents[0, :3].clamp(0, 1).permute(1, 2, 0)
    return (colours * 255).round().to(torch.uint8).repeat_interleave(8, 0).repeat_interleave(8, 1)


def as_they_are(latents: Tensor) -> Tensor:
    return latents


def in_reading_order(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


def in_blocks(latents: Tensor) -> Tensor:
    _, channels, height, width = latents.shape
    packed: Tensor = diffusers.FluxPipeline._pack_latents(latents, 1, channels, height, width)
    return packed


@pytest.mark.parametrize("seen", [as_they_are, in_reading_order, in_blocks])
def test_the_map_learns_what_the_decoder_does(seen: Callable[[Tensor], Tensor]) -> None:

    latents = [torch.rand(1, 4, 6, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    pictures = [linear_picture(each) for each in latents]
    preview = taught([seen(each) for each in latents], pictures, packed=seen is in_blocks)
    assert preview.ready
    drawn = preview.draw(seen(latents[0]), 32, 48)
    assert drawn is not None
    assert drawn.shape == (24, 16, 3)
    wanted = linear_picture(latents[0])[::2, ::2]
    assert float((drawn.float() - wanted.float()).abs().mean()) < 3


def test_nothing_is_drawn_before_enough_was_seen() -> None:
    preview = LatentPreview()
    assert preview.draw(torch.rand(1, 4, 2, 2), 16, 16) is None
    preview.learn(torch.rand(1, 4, 2, 2), torch.zeros(16, 16, 3, dtype=torch.uint8))
    assert not preview.ready
    assert preview.draw(torch.rand(1, 4, 2, 2), 16, 16) is None


def test_latents_of_another_kind_are_left_alone() -> None:
    latents = [torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    preview = taught(latents, [linear_picture(each) for each in latents])
    assert preview.draw(torch.rand(1, 5, 8, 8), 64, 64) is None
    assert preview.draw(torch.rand(1, 7), 64, 64) is None
    assert preview.draw(torch.full((1, 4, 8, 8), float("nan")), 64, 64) is None


def test_learning_ends_when_there_is_plenty() -> None:
    latents = [torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    preview = taught(latents, [linear_picture(each) for each in latents])
    assert preview.learned
    before = preview.draw(latents[0], 64, 64)
    preview.learn(latents[0], torch.zeros(64, 64, 3, dtype=torch.uint8))
    after = preview.draw(latents[0], 64, 64)
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
