"""Puts a trained folder and a refined autoencoder together, as a folder to ship."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusers import AutoencoderKL

from training.device import set_up
from training.model import SHIFT, load_folder, save_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="where denoiser and text encoders are")
    parser.add_argument("--vae", type=Path, required=True, help="an autoencoder with the same latents")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shift", type=float, default=SHIFT, help="the scheduler's fixed shift")
    a = parser.parse_args()
    save_folder(load_folder(a.model, set_up(1)), AutoencoderKL.from_pretrained(a.vae), a.out, a.shift)


if __name__ == "__main__":
    main()
