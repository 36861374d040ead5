"""Scenes: what is drawn, where it stands, and what is never drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from training.data import SIZE, STYLES, Pictures, Subject
from training.palette import BACKGROUNDS
from training.scenes import (
    KINDS,
    OBJECT_COLOURS,
    SHARED_SIZE,
    Item,
    Scene,
    draw_scene,
    held_out,
    recolour,
    render,
)

NAMES = ("red apple", "rocket", "dog face", "cat face")
SUBJECTS = [Subject(name, ()) for name in NAMES]


def disc(colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    inside = np.hypot(x, y) < SIZE / 3
    pixels = np.zeros((SIZE, SIZE, 4), np.uint8)
    pixels[inside] = (*colour, 255)
    return pixels


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    colours = [(200, 30, 30), (40, 60, 200), (180, 130, 60), (250, 200, 40)]
    rows = {style: {name: row for row, name in enumerate(NAMES)} for style in STYLES}
    return Pictures(np.stack([disc(c) for c in colours]), rows, {name: [] for name in NAMES}, {})


def test_every_kind_of_scene_comes_and_the_same_seed_gives_the_same_scenes(pictures: Pictures) -> None:
    first, second = (
        [draw_scene(rng, pictures, SUBJECTS) for _ in range(300)]
        for rng in (random.Random(1), random.Random(1))
    )
    assert first == second
    assert {scene.kind for scene in first} == set(KINDS)


def test_a_pair_that_is_held_out_is_never_drawn(pictures: Pictures) -> None:
    rng = random.Random(2)
    items = [item for _ in range(3000) for item in draw_scene(rng, pictures, SUBJECTS).items if item.colour]
    assert items
    assert not any(held_out(item.name, item.colour) for item in items if item.colour)
    every = [held_out(name, colour) for name in map(str, range(200)) for colour in OBJECT_COLOURS]
    assert 0.04 < sum(every) / len(every) < 0.12


def test_a_drawing_stands_where_its_item_says_and_on_its_background(pictures: Pictures) -> None:
    pixels = render(Scene("placed", (Item("rocket", "3d", None, 0.4, 0.75, 0.25),), "yellow"), pictures)
    assert tuple(pixels[SIZE // 4, 3 * SIZE // 4]) == (40, 60, 200)
    assert tuple(pixels[3 * SIZE // 4, SIZE // 4]) == BACKGROUNDS["yellow"]


@pytest.mark.parametrize("name", OBJECT_COLOURS)
def test_an_object_in_another_colour_has_that_colour(name: str) -> None:
    painted = recolour(disc((200, 30, 30)), OBJECT_COLOURS[name])
    middle = painted[SIZE // 2, SIZE // 2, :3].astype(int)
    distances = {other: np.abs(middle - OBJECT_COLOURS[other]).sum() for other in OBJECT_COLOURS}
    assert min(distances, key=lambda other: distances[other]) == name


def test_what_shares_a_picture_stands_on_quarters_of_it(pictures: Pictures) -> None:
    rng = random.Random(4)
    for scene in (draw_scene(rng, pictures, SUBJECTS) for _ in range(500)):
        alone = scene.kind in ("single", "coloured")
        assert {item.size for item in scene.items} == {1.0 if alone else SHARED_SIZE}
        assert {share for item in scene.items for share in (item.x, item.y)} <= {0.25, 0.5, 0.75}
