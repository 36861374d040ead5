"""Trains a style adapter (LoRA) on the built-in model.

`python -m training.adapters --data FOLDER --pool POOL --model FOLDER --style flat --out FOLDER --minutes 8`

It learns from the scenes of POOL that this hand drew, with captions that do not name it. The file that comes
out is what `FluxPipeline.load_lora_weights` reads. `--init FILE` goes on from such a file.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from diffusers import FluxPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from training.captions import Captions
from training.data import STYLES, load_pictures, read_subjects
from training.device import Setup, set_up
from training.model import Model, load_folder
from training.optim import rate_at, set_rate
from training.pool import Pool
from training.train import descend, flow_loss, speed_up

RANK = 24
"""With TARGETS this makes a file of 2.6 MB."""
TARGETS = (
    "x_embedder", "context_embedder", "norm1.linear", "norm1_context.linear", "norm.linear",
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
)  # fmt: skip
LOWEST, HIGHEST = 1.0, 6.0
B_FACTOR = 4.0
"""How much faster B learns than A, since it starts from zero (LoRA+, Hayou et al. 2024)."""


def add_adapter(
    model: Model, rank: int, init: Path | None = None
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Freezes the model, gives its transformer an adapter and returns the adapter's matrices A and B."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    transformer = model.denoiser.transformer
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
    if init is not None:
        state = {key.removeprefix("transformer."): value for key, value in load_file(init).items()}
        set_peft_model_state_dict(transformer, state)
    weights = dict(transformer.named_parameters())
    down, up = ([each for name, each in weights.items() if kind in name] for kind in ("lora_A", "lora_B"))
    return down, up


def train_adapter(
    model: Model,
    pool: Pool,
    minutes: float,
    batch: int,
    lr: float,
    setup: Setup,
    compiled: bool,
    init: Path | None,
) -> None:
    """Flow matching on the style's pictures; every guidance scale is shown the same."""
    down, up = add_adapter(model, RANK, init)
    speed_up(model, compiled)
    adamw = torch.optim.AdamW(down, lr, betas=(0.9, 0.98), weight_decay=0.0)
    adamw.add_param_group({"params": up, "factor": B_FACTOR})
    optimizers: list[torch.optim.Optimizer] = [adamw]
    rng = random.Random(2)
    batches = pool.batches(rng, batch)
    start, step = time.process_time(), 0
    while (fraction := (time.process_time() - start) / (60 * minutes)) < 1:
        wanted, captions = next(batches)
        wanted = wanted.to(setup.device)
        guidance = torch.empty(len(wanted), device=setup.device).uniform_(LOWEST, HIGHEST)
        loss = flow_loss(model, wanted, captions, setup, guidance)
        set_rate(optimizers, lr * rate_at(fraction, step, decay_from=0.5))
        descend(loss, optimizers, [model.denoiser])
        step += 1
        if step % 20 == 0:
            print(f"adapter {60 * minutes * fraction:.0f} s, step {step}: {loss.item():.4f}", flush=True)


def save_adapter(model: Model, folder: Path, name: str) -> Path:
    """Writes the adapter in bf16 as diffusers keeps LoRA weights."""
    state = get_peft_model_state_dict(model.denoiser.transformer)
    layers = {key.replace("._orig_mod", ""): value.to(torch.bfloat16) for key, value in state.items()}
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pool", type=Path, required=True, help="what training.pool wrote")
    parser.add_argument("--model", type=Path, required=True, help="the finished model's folder")
    parser.add_argument("--style", choices=STYLES, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="an adapter's file to go on from")
    parser.add_argument("--minutes", type=float, default=8, help="of one core")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true")
    a = parser.parse_args()
    setup = set_up(a.threads)
    pictures = load_pictures(a.data)
    a.out.mkdir(parents=True, exist_ok=True)
    pool = Pool(a.pool, Captions(pictures, read_subjects(), style_said=0), a.style)
    model = load_folder(a.model, setup)
    train_adapter(model, pool, a.minutes, a.batch, a.lr, setup, not a.eager, a.init)
    print(save_adapter(model, a.out, a.style))


if __name__ == "__main__":
    main()
