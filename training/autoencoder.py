"""Trains the autoencoder: `python -m training.autoencoder --data FOLDER --out FOLDER --minutes 20`."""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.data import STYLES, Pictures, composite, load_pictures, random_colours, read_subjects, shuffled
from training.device import Setup, set_up
from training.optim import build_optimizers, rate_at, set_rate
from training.palette import BACKGROUNDS
from training.scenes import draw_scene, render, scenes_as_batch

WIDTHS = (16, 32, 64, 96, 192)
LATENT_CHANNELS = 32
KL_WEIGHT = 1e-3


def build_autoencoder() -> AutoencoderKL:
    """Factor 16: a 128x128 picture becomes 32 x 8 x 8."""
    levels = len(WIDTHS)
    model = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        sample_size=128,
    )
    for name, parameter in model.named_parameters():
        if name.endswith("conv2.weight"):
            torch.nn.init.zeros_(parameter)  # every residual block begins as the identity: a fast start
    return model


def loss_between(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1, L1 of the horizontal and vertical differences, and MSE."""
    error = made - wanted
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + edges + error.square().mean()


def crop(pictures: torch.Tensor, size: int, rng: random.Random) -> torch.Tensor:
    """One random window of each picture."""
    if size == pictures.shape[-1]:
        return pictures
    free = pictures.shape[-1] - size + 1
    corners = [(rng.randrange(free), rng.randrange(free)) for _ in pictures]
    windows = [p[:, y : y + size, x : x + size] for p, (y, x) in zip(pictures, corners, strict=True)]
    return torch.stack(windows)


def train_loss(model: AutoencoderKL, pictures: torch.Tensor, setup: Setup, encode: bool) -> torch.Tensor:
    """The loss of one batch; `encode` is False when only the decoder is being refined."""
    with setup.autocast():
        with torch.set_grad_enabled(encode):
            mean, log_variance = model.encoder(pictures).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        noise = torch.randn_like(mean)
        latents = mean + (0.5 * log_variance).exp() * noise
        made = model.decoder(latents)
    loss = loss_between(made.float(), pictures)
    if encode:
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = loss + KL_WEIGHT * divergence
    return loss


@torch.no_grad()
def whole_picture_psnr(model: AutoencoderKL, pictures: Pictures, rows: list[int], setup: Setup) -> float:
    """Mean PSNR in dB over the whole pictures of those rows, each on a background of its own."""
    rng = random.Random(7)
    values: list[float] = []
    for start in range(0, len(rows), 16):
        part = rows[start : start + 16]
        wanted = composite(pictures.pixels[part], random_colours(rng, len(part), list(BACKGROUNDS.values())))
        wanted = wanted.to(setup.device)
        with setup.autocast():
            mean = model.encoder(wanted).float().chunk(2, dim=1)[0]
            made = model.decoder(mean).float().clamp(-1, 1)
        error = (made - wanted).square().mean(dim=(1, 2, 3)) / 4
        values.extend((-10 * error.log10()).tolist())
    return sum(values) / len(values)


def set_latent_statistics(model: AutoencoderKL, pictures: Pictures, rows: list[int], setup: Setup) -> None:
    """Measures mean and deviation of the latents and keeps them as shift and scaling factor."""
    colours = random_colours(random.Random(8), len(rows), list(BACKGROUNDS.values()))
    means = []
    for start in range(0, len(rows), 16):
        wanted = composite(pictures.pixels[rows[start : start + 16]], colours[start : start + 16])
        with torch.no_grad(), setup.autocast():
            means.append(model.encoder(wanted.to(setup.device)).float().chunk(2, dim=1)[0])
    latents = torch.cat(means)
    model.register_to_config(
        shift_factor=round(float(latents.mean()), 4), scaling_factor=round(float(1 / latents.std()), 4)
    )


def train(data: Path, out: Path, minutes: float, setup: Setup, decoder_only: bool, lr: float) -> None:
    """Trains for that long; with `decoder_only` it refines the decoder in `out` and leaves latents alone."""
    pictures = load_pictures(data)
    subjects = read_subjects()
    listed = {subject.name for subject in subjects}
    solid = list(pictures.rows["3d"].values())
    drawn = [row for style in STYLES[1:] for row in pictures.rows[style].values()]
    checked = [row for name, row in pictures.rows["3d"].items() if name in listed][::10]
    model = AutoencoderKL.from_pretrained(out) if decoder_only else build_autoencoder()
    model = model.to(setup.device, memory_format=torch.channels_last)
    if decoder_only:
        model.encoder.requires_grad_(False)
    optimizers = build_optimizers([model], lr)
    rng = random.Random(int(time.time()))
    palette = list(BACKGROUNDS.values())
    batches_solid, batches_drawn = shuffled(rng, solid, 1), shuffled(rng, drawn, 1)
    start = time.monotonic()
    step, last_report = 0, start
    while (fraction := (time.monotonic() - start) / (60 * minutes)) < 1:
        if decoder_only:  # at the end: what the model draws
            scenes = [draw_scene(rng, pictures, subjects) for _ in range(6)]
            batch = scenes_as_batch([render(scene, pictures) for scene in scenes])
        else:
            size, count = (64, 16) if fraction < 0.6 else (128, 6)
            rows = [next(batches_drawn if rng.random() < 0.35 else batches_solid)[0] for _ in range(count)]
            batch = crop(composite(pictures.pixels[rows], random_colours(rng, count, palette)), size, rng)
        batch = batch.to(setup.device, memory_format=torch.channels_last)
        set_rate(optimizers, lr * rate_at(fraction, step, decay_from=0.3))
        loss = train_loss(model, batch, setup, encode=not decoder_only)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if time.monotonic() - last_report > 60:
            last_report = time.monotonic()
            psnr = whole_picture_psnr(model, pictures, checked[:32], setup)
            seconds = last_report - start
            print(f"{seconds:.0f} s, step {step}: loss {loss.item():.4f}, {psnr:.2f} dB", flush=True)
            model.save_pretrained(out)
    print(f"end, step {step}: {whole_picture_psnr(model, pictures, checked, setup):.2f} dB", flush=True)
    if not decoder_only:
        set_latent_statistics(model, pictures, checked, setup)
    model.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the autoencoder")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--decoder-only", action="store_true", help="refine the decoder; latents stay")
    a = parser.parse_args()
    train(a.data, a.out, a.minutes, set_up(a.threads), a.decoder_only, a.lr)


if __name__ == "__main__":
    main()
