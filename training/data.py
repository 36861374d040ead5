"""The prepared pictures and the subjects: what every other step reads."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZE = 128
STYLES = ("3d", "flat", "mono", "noto", "twemoji")
SUBJECTS_FILE = Path(__file__).with_name("subjects.txt")


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing the model can draw: its Unicode name and the other names that people type for it."""

    name: str
    aliases: tuple[str, ...]


def read_subjects(path: Path = SUBJECTS_FILE) -> list[Subject]:
    """The listed subjects, in the file's order."""
    subjects = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        name, _, others = line.partition("=")
        aliases = tuple(other.strip() for other in others.split(",") if other.strip())
        subjects.append(Subject(name.strip(), aliases))
    return subjects


@dataclass(frozen=True, slots=True)
class Pictures:
    """All prepared pictures: `pixels` is uint8 RGBA (count, 128, 128, 4), mapped from disk."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    rows: dict[str, dict[str, int]]
    keywords: dict[str, list[str]]
    translations: dict[str, dict[str, list[str]]]
    """Names in another language by language and English name, the most usual first."""

    def row(self, style: str, name: str) -> int | None:
        """The row of a subject in a style, or None where that style has no such picture."""
        return self.rows[style].get(name)


def load_pictures(folder: Path) -> Pictures:
    """Opens what `python -m training.prepare` wrote."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    pixels = np.load(folder / "pictures.npy", mmap_mode="r")
    return Pictures(pixels, index["rows"], index["keywords"], index["translations"])


def composite(rgba: np.ndarray[Any, np.dtype[np.uint8]], colours: torch.Tensor) -> torch.Tensor:
    """RGBA pictures (n, 128, 128, 4) over colours (n, 3) in 0..255, as RGB (n, 3, 128, 128) in -1..1."""
    pictures = torch.from_numpy(np.ascontiguousarray(rgba)).float()
    alpha = pictures[..., 3:] / 255
    mixed = pictures[..., :3] * alpha + colours[:, None, None, :] * (1 - alpha)
    return (mixed / 127.5 - 1).permute(0, 3, 1, 2)


def random_colours(rng: random.Random, count: int, palette: list[tuple[int, int, int]]) -> torch.Tensor:
    """Backgrounds (count, 3): mostly from the palette, a third of them anything."""
    rows = [
        rng.choice(palette) if rng.random() < 0.67 else tuple(rng.randrange(256) for _ in range(3))
        for _ in range(count)
    ]
    return torch.tensor(rows, dtype=torch.float32)


def shuffled(rng: random.Random, items: list[int], batch: int) -> Iterator[list[int]]:
    """Endless batches; every item comes once before any comes twice."""
    left: list[int] = []
    while True:
        while len(left) < batch:
            again = list(items)
            rng.shuffle(again)
            left.extend(again)
        yield left[:batch]
        left = left[batch:]
