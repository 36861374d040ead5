"""Teaches the guidance embedding: `python -m training.distil --data FOLDER --from FOLDER --out FOLDER`.

As in FLUX.1-dev a student learns, for a scale drawn from [1, 8], what the teacher says with classifier-free
guidance, so that one forward per step is enough. The teacher's guided picture keeps some of the contrast of
the unguided one (guidance rescale, Lin et al., 2023), or high scales would burn colours.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from training.captions import Captions
from training.data import load_pictures, read_subjects
from training.device import Setup, set_up
from training.model import Model, load_folder, save_folder
from training.optim import build_optimizers, rate_at, set_rate
from training.pool import Pool
from training.train import UNGUIDED, descend, draw_times, speed_up

LOWEST, HIGHEST = 1.0, 8.0
RESCALE = 0.3


def guided_velocity(
    noisy: torch.Tensor,
    times: torch.Tensor,
    with_prompt: torch.Tensor,
    without: torch.Tensor,
    scales: torch.Tensor,
    rescale: float = RESCALE,
) -> torch.Tensor:
    """The teacher's velocity at those guidance scales, with the contrast of its picture partly kept."""
    t = times[:, None, None]
    plain = noisy - t * with_prompt
    guided = noisy - t * (without + scales[:, None, None] * (with_prompt - without))
    same_contrast = guided * (plain.std(dim=(1, 2), keepdim=True) / guided.std(dim=(1, 2), keepdim=True))
    picture = torch.lerp(guided, same_contrast, rescale)
    return (noisy - picture) / t


def distil_loss(
    student: Model, teacher: Model, wanted: torch.Tensor, captions: list[str], setup: Setup
) -> torch.Tensor:
    """How far the student is from the guided teacher, measured on pictures rather than on velocities."""
    noise = torch.randn_like(wanted)
    times = draw_times(len(wanted), setup.device).clamp_min(0.02)
    noisy = wanted + times[:, None, None] * (noise - wanted)
    scales = torch.empty_like(times).uniform_(LOWEST, HIGHEST)
    unguided = torch.full_like(times, UNGUIDED)
    with setup.autocast():
        with torch.no_grad():
            text = teacher.text(captions, setup.device)
            nothing = teacher.text([""], setup.device)
            empty = (nothing[0].expand_as(text[0]), nothing[1].expand_as(text[1]))
            with_prompt = teacher.denoiser(noisy, times, unguided, text).float()
            without = teacher.denoiser(noisy, times, unguided, empty).float()
        velocity = student.denoiser(noisy, times, scales, text).float()
    goal = guided_velocity(noisy, times, with_prompt, without, scales)
    return functional.mse_loss(velocity, goal)


def distil(
    teacher: Model,
    student: Model,
    pool: Pool,
    minutes: float,
    batch: int,
    lr: float,
    setup: Setup,
    compiled: bool,
) -> Model:
    """Trains the student, which begins with the teacher's weights or where an earlier student stopped."""
    student.denoiser.transformer.requires_grad_(True)
    for model in (teacher, student):
        speed_up(model, compiled)
    optimizers = build_optimizers([student.denoiser.transformer], lr)
    average = student.frozen_copy()
    rng = random.Random(1)
    batches = pool.batches(rng, batch)
    start, step = time.monotonic(), 0
    while (fraction := (time.monotonic() - start) / (60 * minutes)) < 1:
        wanted, captions = next(batches)
        loss = distil_loss(student, teacher, wanted.to(setup.device), captions, setup)
        set_rate(optimizers, lr * rate_at(fraction, step, decay_from=0.4))
        descend(loss, optimizers, [student.denoiser])
        step += 1
        average.follow(student, min(0.98, (1 + step) / (10 + step)))
        if step % 20 == 0:
            print(f"distil {60 * minutes * fraction:.0f} s, step {step}: {loss.item():.4f}", flush=True)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the trained folder")
    parser.add_argument("--pool", type=Path, required=True, help="what training.pool wrote")
    parser.add_argument("--out", type=Path, required=True, help="where the distilled folder goes")
    parser.add_argument("--student", type=Path, help="go on with this distilled folder")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--shift", type=float, default=1.0, help="the scheduler's fixed shift")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true")
    a = parser.parse_args()
    setup = set_up(a.threads)
    pictures = load_pictures(a.data)
    vae = AutoencoderKL.from_pretrained(a.source / "vae")
    pool = Pool(a.pool, Captions(pictures, read_subjects()))
    teacher = load_folder(a.source, setup)
    pupil = load_folder(a.student, setup) if a.student else teacher.frozen_copy()
    student = distil(teacher, pupil, pool, a.minutes, a.batch, a.lr, setup, not a.eager)
    save_folder(student, vae, a.out, a.shift)


if __name__ == "__main__":
    main()
