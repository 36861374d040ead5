"""Scenes: one or several drawings on a background, as data, and as pixels.

A scene says what was done (which drawing, whose hand, recoloured, how large, where), so that a caption can
say it too (captions.py). Some pairs of subject and colour are never drawn: the evaluation asks for them.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from training.data import SIZE, Pictures, Subject
from training.palette import BACKGROUNDS, COLOURS

STYLE_SHARES = {"3d": 0.43, "flat": 0.2, "noto": 0.17, "twemoji": 0.15, "mono": 0.05}
"""How often each hand draws; `mono` only where the caption asks for it."""
OBJECT_COLOURS = {name: COLOURS[name] for name in COLOURS if name != "light blue"} | {
    "white": (245, 245, 245),
    "golden": (235, 185, 50),
}
KINDS = {"single": 0.38, "coloured": 0.17, "count": 0.12, "pair": 0.25, "placed": 0.08}
SHARED_SIZE = 0.5
"""A drawing that does not fill the picture has this size and stands on quarters of it.

Its latents then fall on the denoiser's tokens (32 pixels), the same wherever it stands.
"""
RELATIONS = ("and", "next to", "on", "under")
PLACES = {
    "at the top left": (0.25, 0.25),
    "at the top": (0.5, 0.25),
    "at the top right": (0.75, 0.25),
    "on the left": (0.25, 0.5),
    "in the middle": (0.5, 0.5),
    "on the right": (0.75, 0.5),
    "at the bottom left": (0.25, 0.75),
    "at the bottom": (0.5, 0.75),
    "at the bottom right": (0.75, 0.75),
}
PATTERNS = ("striped", "dotted", "checked")
ONE_SIDED = ("left", "right", "arrow", "hand", "clock", "letter", "number", "sign", "button", "calendar")
"""Drawings of these are not mirrored: it would mean something."""
HELD_OUT = 0.08


@dataclass(frozen=True, slots=True)
class Item:
    """One drawing in a scene: `size` and the centre are shares of the picture's side."""

    name: str
    style: str
    colour: str | None = None
    size: float = 1.0
    x: float = 0.5
    y: float = 0.5
    mirrored: bool = False


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn: `relation` joins two different items; several equal ones are a count."""

    kind: str
    items: tuple[Item, ...]
    background: str = "white"
    pattern: str | None = None
    relation: str = "and"
    place: str | None = None


def held_out(name: str, colour: str) -> bool:
    """Whether this pair of subject and colour stays out of the training."""
    return zlib.crc32(f"{name}/{colour}".encode()) % 1000 < 1000 * HELD_OUT


def draw_scene(rng: random.Random, pictures: Pictures, subjects: list[Subject]) -> Scene:
    """A scene by chance."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    style = rng.choices(list(STYLE_SHARES), list(STYLE_SHARES.values()))[0]
    present = [subject.name for subject in subjects if subject.name in pictures.rows[style]]
    name = rng.choice(present)
    background = "white" if rng.random() < 0.5 else rng.choice(list(BACKGROUNDS))
    pattern = rng.choice(PATTERNS) if background != "white" and rng.random() < 0.12 else None
    mirrored = rng.random() < 0.3 and not any(word in name for word in ONE_SIDED)
    if kind == "single":
        return Scene(kind, (Item(name, style, mirrored=mirrored),), background, pattern)
    if kind == "coloured":
        allowed = [colour for colour in OBJECT_COLOURS if not held_out(name, colour) and colour != background]
        colour = None if style == "mono" else rng.choice(allowed)
        return Scene(kind, (Item(name, style, colour, mirrored=mirrored),), background)
    if kind == "count":
        return Scene(kind, _in_a_row(rng, name, style, rng.choice((2, 2, 2, 3, 3, 4))), background)
    if kind == "placed":
        place, (x, y) = rng.choice(list(PLACES.items()))
        item = Item(name, style, None, SHARED_SIZE, x, y, mirrored)
        return Scene(kind, (item,), background, None, "and", place)
    other = rng.choice([each for each in present if each != name])
    relation = rng.choices(RELATIONS, (0.5, 0.25, 0.15, 0.1))[0]
    return Scene(kind, _pair(name, other, style, relation), background, None, relation)


def _in_a_row(rng: random.Random, name: str, style: str, count: int) -> tuple[Item, ...]:
    """Equal drawings: two side by side, three as a triangle, four as a square."""
    spots = {
        2: [(0.25, 0.5), (0.75, 0.5)],
        3: [(0.25, 0.75), (0.75, 0.75), (0.5, 0.25)],
        4: [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)],
    }[count]
    return tuple(Item(name, style, None, SHARED_SIZE, x, y) for x, y in spots)


def _pair(name: str, other: str, style: str, relation: str) -> tuple[Item, ...]:
    """Two subjects: side by side in the order of their names, or one above the other.

    Which stands where follows from the words alone: what is left to chance, a small model blurs.
    """
    first, second = (0.75, 0.25) if relation == "under" else (0.25, 0.75)
    stacked = relation in ("on", "under")
    spots = [(0.5, share) if stacked else (share, 0.5) for share in (first, second)]
    return tuple(
        Item(each, style, None, SHARED_SIZE, x, y) for each, (x, y) in zip((name, other), spots, strict=True)
    )


# ---------------------------------------------------------------- pixels


def render(scene: Scene, pictures: Pictures) -> NDArray[np.uint8]:
    """The scene as uint8 RGB (SIZE, SIZE, 3)."""
    drawings = Image.new("RGBA", (SIZE, SIZE))
    for item in scene.items:
        row = pictures.rows[item.style][item.name]
        pixels = np.asarray(pictures.pixels[row])
        if item.colour is not None:
            pixels = recolour(pixels, OBJECT_COLOURS[item.colour])
        drawing = Image.fromarray(pixels)
        if item.mirrored:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = max(8, round(item.size * SIZE))
        if side != SIZE:
            drawing = drawing.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
        layer = Image.new("RGBA", (SIZE, SIZE))
        layer.paste(drawing, (round(item.x * SIZE - side / 2), round(item.y * SIZE - side / 2)))
        drawings.alpha_composite(layer)
    canvas = _background(scene)
    canvas.paste(drawings, (0, 0), drawings)
    return np.asarray(canvas)


def scenes_as_batch(pixels: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
    """Rendered scenes as (n, 3, SIZE, SIZE) in -1..1."""
    return (torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1).permute(0, 3, 1, 2)


def _background(scene: Scene) -> Image.Image:
    base = BACKGROUNDS[scene.background]
    canvas = Image.new("RGB", (SIZE, SIZE), base)
    if scene.pattern is None:
        return canvas
    lighter = np.array(tuple(min(255, channel + 45) for channel in base), np.uint8)
    pixels = np.array(canvas)
    y, x = np.mgrid[:SIZE, :SIZE]
    mask = {
        "striped": (x + y) // 12 % 2 == 0,
        "dotted": (x % 20 - 10) ** 2 + (y % 20 - 10) ** 2 < 30,
        "checked": (x // 16 + y // 16) % 2 == 0,
    }[scene.pattern]
    pixels[mask] = lighter
    return Image.fromarray(pixels)


def recolour(rgba: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """What is coloured in the drawing (n, n, 4) takes the new colour and keeps its light and shade."""
    rgb = rgba[..., :3].astype(np.float32)
    high, low = rgb.max(-1), rgb.min(-1)
    saturation = (high - low) / np.maximum(high, 1)
    weight = np.clip((saturation - 0.12) / 0.25, 0, 1) * (rgba[..., 3] > 0)
    if weight.sum() < 0.15 * (rgba[..., 3] > 0).sum():  # a grey drawing takes the colour as a whole
        weight = (rgba[..., 3] > 0) * np.clip(high / 128, 0, 1)
    light = rgb @ np.array((0.3, 0.59, 0.11), np.float32)
    typical = float((light * weight).sum() / max(float(weight.sum()), 1.0))
    shade = (light / max(typical, 1.0))[..., None]
    target = np.array(colour, np.float32)
    painted = np.where(shade <= 1, target * shade, target + (255 - target) * np.clip(shade - 1, 0, 1) * 0.7)
    mixed = rgb + weight[..., None] * (painted - rgb)
    result: NDArray[Any] = np.concatenate([mixed.clip(0, 255), rgba[..., 3:]], -1).astype(np.uint8)
    return result
