"""Trains the denoiser with its text encoders: `python -m training.train --data DATA --out FOLDER --hours H`.

`--out` keeps the checkpoint; `--resume` goes on from it, `--init FOLDER` starts from shipped weights.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from training.captions import Captions
from training.data import Pictures, load_pictures, read_subjects
from training.device import Setup, set_up
from training.model import Denoiser, Model, build_transformer, load_folder, save_folder
from training.optim import build_optimizers, rate_at, set_rate
from training.pool import Pool
from training.text import PictureHeads, build_text_side, carry_over

TIME_MEAN, TIME_DEVIATION = 0.6, 1.0
EMA = 0.998
UNGUIDED = 1.0


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers besides weights."""

    step: int = 0
    seconds: float = 0.0


def draw_times(count: int, device: torch.device) -> torch.Tensor:
    """Logit-normal times, tilted towards noise, where the picture is decided."""
    return torch.sigmoid(torch.randn(count, device=device) * TIME_DEVIATION + TIME_MEAN)


def flow_loss(
    model: Model,
    wanted: torch.Tensor,
    captions: list[str],
    setup: Setup,
    guidance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Flow matching on packed latents: the velocity from picture to noise."""
    noise = torch.randn_like(wanted)
    times = draw_times(len(wanted), setup.device)
    noisy = wanted + times[:, None, None] * (noise - wanted)
    with setup.autocast():
        text = model.text(captions, setup.device)
        scales = torch.full_like(times, UNGUIDED) if guidance is None else guidance
        velocity = model.denoiser(noisy, times, scales, text)
    return functional.mse_loss(velocity.float(), noise - wanted)


def train_text(model: Model, pool: Pool, setup: Setup, minutes: float, batch: int) -> None:
    """Teaches the text encoders to name the picture, before the denoiser listens to them."""
    _, tokens, channels = pool.latents.shape
    heads = PictureHeads(tokens, channels).to(setup.device)
    modules = [model.text.t5, model.text.clip]
    optimizers = build_optimizers(modules, 2e-3, words_factor=5.0)  # each word is in few batches
    optimizers.append(torch.optim.AdamW(heads.parameters(), 2e-3, weight_decay=0.0))
    batches = pool.batches(random.Random(0), batch)
    start, step = time.monotonic(), 0
    while (fraction := (time.monotonic() - start) / (60 * minutes)) < 1:
        wanted, captions = next(batches)
        wanted = wanted.to(setup.device)
        with setup.autocast():
            states, pooled = model.text(captions, setup.device)
        loss = heads(states.float(), pooled.float(), wanted)
        set_rate(optimizers, 2e-3 * rate_at(fraction, step))
        descend(loss, optimizers, modules=[*modules, heads])
        step += 1
        if step % 100 == 0:
            print(f"text {60 * minutes * fraction:.0f} s, step {step}: {loss.item():.4f}", flush=True)


def descend(
    loss: torch.Tensor, optimizers: list[torch.optim.Optimizer], modules: list[torch.nn.Module]
) -> None:
    """One step of all optimizers, with the gradient's length bounded."""
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def save_checkpoint(
    path: Path, model: Model, average: Model, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Writes everything that `--resume` needs, whole or not at all."""
    state = {
        "model": {name: module.state_dict() for name, module in model.modules().items()},
        "average": {name: module.state_dict() for name, module in average.modules().items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "step": progress.step,
        "seconds": progress.seconds,
    }
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(
    path: Path, model: Model, average: Model, optimizers: list[torch.optim.Optimizer]
) -> Progress:
    state = torch.load(path, weights_only=True, map_location="cpu")
    for kept, part in (("model", model), ("average", average)):
        for name, module in part.modules().items():
            module.load_state_dict(state[kept][name])
    for optimizer, kept_state in zip(optimizers, state["optimizers"], strict=True):
        sizes = [len(group["params"]) for group in kept_state["param_groups"]]
        if sizes == [len(group["params"]) for group in optimizer.param_groups]:
            optimizer.load_state_dict(kept_state)
    return Progress(state["step"], state["seconds"])


def speed_up(model: Model, compiled: bool) -> None:
    """Compiled blocks with plain matrix attention, whose backward is far faster on short sequences."""
    if compiled:
        model.denoiser.transformer.set_attention_backend("_native_math")
        model.denoiser.transformer.compile_repeated_blocks(dynamic=False)


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of one run."""

    hours: float
    batch: int
    lr: float
    text_minutes: float
    save_minutes: float
    compiled: bool
    decay: bool
    freeze_text: bool


def build_model(pictures: Pictures, channels: int, setup: Setup, init: Path | None) -> Model:
    """A fresh model, or the one in `init` with today's vocabulary."""
    torch.manual_seed(0)
    subjects = read_subjects()
    if init is None:
        return Model(Denoiser(build_transformer(channels)), build_text_side(pictures, subjects)).to(
            setup.device
        )
    model = load_folder(init, setup)
    return Model(model.denoiser, carry_over(model.text, pictures, subjects)).to(setup.device)


def train(
    pool: Pool,
    pictures: Pictures,
    vae: AutoencoderKL,
    out: Path,
    plan: Plan,
    setup: Setup,
    resume: bool,
    init: Path | None,
) -> Progress:
    """Trains for the plan's hours and leaves a checkpoint and a loadable folder in `out`."""
    if resume:  # with the vocabulary that it began with
        model = load_folder(out / "export", setup)
    else:
        model = build_model(pictures, pool.latents.shape[-1], setup, init)
    if not resume and init is None and plan.text_minutes > 0:
        train_text(model, pool, setup, plan.text_minutes, plan.batch)
    average = model.frozen_copy()
    trained = list(model.modules().values())
    if plan.freeze_text:
        trained = [model.denoiser.transformer]
        model.text.t5.requires_grad_(False)
        model.text.clip.requires_grad_(False)
    optimizers = build_optimizers(trained, plan.lr)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "state.pt"
    progress = load_checkpoint(checkpoint, model, average, optimizers) if resume else Progress()
    speed_up(model, plan.compiled)
    rng = random.Random(progress.step)
    batches = pool.batches(rng, plan.batch)
    start = last_save = time.monotonic()
    before, first_step, losses = progress.seconds, progress.step, 0.0
    while (fraction := (time.monotonic() - start) / (3600 * plan.hours)) < 1:
        wanted, captions = next(batches)
        wanted = wanted.to(setup.device)
        loss = flow_loss(model, wanted, captions, setup)
        warm = progress.step - first_step
        set_rate(optimizers, plan.lr * rate_at(fraction if plan.decay else 0.0, warm))
        descend(loss, optimizers, trained)
        progress.step += 1
        progress.seconds = before + time.monotonic() - start
        average.follow(model, min(EMA, (1 + progress.step) / (10 + progress.step)))
        losses = loss.item() if not losses else losses + 0.02 * (loss.item() - losses)
        if progress.step % 50 == 0:
            print(f"{progress.seconds:.0f} s, step {progress.step}: {losses:.4f}", flush=True)
        if time.monotonic() - last_save > 60 * plan.save_minutes:
            save_checkpoint(checkpoint, model, average, optimizers, progress)
            save_folder(average, vae, out / "export")
            last_save = time.monotonic()
        if not math.isfinite(losses):
            raise ArithmeticError(f"the loss is {losses} at step {progress.step}; resume with a lower --lr")
    save_checkpoint(checkpoint, model, average, optimizers, progress)
    save_folder(average, vae, out / "export")
    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="the autoencoder's folder (OUT/vae)")
    parser.add_argument("--pool", type=Path, help="the pool's folder (OUT/pool)")
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--text-minutes", type=float, default=5)
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    parser.add_argument("--init", type=Path, help="start from a diffusers folder")
    parser.add_argument("--freeze-text", action="store_true", help="train the transformer alone")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--keep-rate", action="store_true", help="do not lower the learning rate at the end")
    a = parser.parse_args()
    setup = set_up(a.threads)
    pictures = load_pictures(a.data)
    vae_folder = a.vae or a.out / "vae"
    pool = Pool(a.pool or a.out / "pool", Captions(pictures, read_subjects()))
    vae = AutoencoderKL.from_pretrained(vae_folder)
    plan = Plan(
        a.hours, a.batch, a.lr, a.text_minutes, a.save_minutes, not a.eager, not a.keep_rate, a.freeze_text
    )
    train(pool, pictures, vae, a.out, plan, setup, a.resume, a.init)


if __name__ == "__main__":
    main()
