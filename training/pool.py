"""A pool of scenes as latents: `python -m training.pool --data DATA --vae FOLDER --out FOLDER --shards N`.

To encode a picture costs as much as a third of a training step on it, so scenes are encoded once and drawn
many times, each time with other words. Shards are whole files; the training takes up new ones as they come.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from training.captions import Captions
from training.data import Pictures, Subject, load_pictures, read_subjects
from training.device import Setup, set_up
from training.latents import encode
from training.scenes import Item, Scene, draw_scene, render, scenes_as_batch

SHARD = 2048
CHUNK = 32
RESCAN = 400
"""Batches between two looks for new shards."""


def write_shard(
    path: Path,
    seed: int,
    pictures: Pictures,
    subjects: list[Subject],
    vae: AutoencoderKL,
    setup: Setup,
) -> None:
    """SHARD scenes by chance and their packed latents (SHARD, tokens, channels) in fp16."""
    rng = random.Random(seed)
    scenes = [draw_scene(rng, pictures, subjects) for _ in range(SHARD)]
    latents = []
    for start in range(0, SHARD, CHUNK):
        batch = scenes_as_batch([render(scene, pictures) for scene in scenes[start : start + CHUNK]])
        latents.append(encode(vae, batch, setup).half().cpu())
    part = path.with_suffix(".part")
    torch.save({"scenes": [asdict(scene) for scene in scenes], "latents": torch.cat(latents)}, part)
    part.replace(path)


def read_shard(path: Path) -> tuple[list[Scene], torch.Tensor]:
    """The scenes of a shard and their latents."""
    kept = torch.load(path, weights_only=True)
    scenes = [
        Scene(**{**values, "items": tuple(Item(**item) for item in values["items"])})
        for values in kept["scenes"]
    ]
    return scenes, kept["latents"]


class Pool:
    """All shards of a folder, read as they appear; of their scenes all, or those that one hand drew."""

    def __init__(self, folder: Path, captions: Captions, style: str | None = None) -> None:
        self._folder, self._captions, self._style = folder, captions, style
        self._seen: set[Path] = set()
        self.scenes: list[Scene] = []
        self.latents = torch.empty(0)
        self.rescan()
        if not self.scenes:
            raise FileNotFoundError(f"{folder} has no shard; run python -m training.pool first")

    def rescan(self) -> None:
        parts = [self.latents] if len(self.scenes) else []
        for path in sorted(set(self._folder.glob("*.pt")) - self._seen):
            self._seen.add(path)
            scenes, latents = read_shard(path)
            rows = [i for i, each in enumerate(scenes) if self._style in (None, each.items[0].style)]
            self.scenes += [scenes[row] for row in rows]
            parts.append(latents[rows])
        self.latents = torch.cat(parts) if parts else self.latents

    def batches(self, rng: random.Random, count: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
        """Endless batches of latents (count, tokens, channels) and captions."""
        left: list[int] = []
        for number in range(1, 10**9):
            if number % RESCAN == 0:
                self.rescan()
            if len(left) < count:
                left = list(range(len(self.scenes)))
                rng.shuffle(left)
            rows, left = left[:count], left[count:]
            yield self.latents[rows].float(), [self._captions(rng, self.scenes[row]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    setup = set_up(a.threads)
    pictures, subjects = load_pictures(a.data), read_subjects()
    vae = AutoencoderKL.from_pretrained(a.vae).to(setup.device, memory_format=torch.channels_last)
    a.out.mkdir(parents=True, exist_ok=True)
    for number in range(a.shards):
        path = a.out / f"{number:03}.pt"
        if not path.exists():
            write_shard(path, number, pictures, subjects, vae, setup)
            print(path, flush=True)


if __name__ == "__main__":
    main()
