"""The measures measure: a right picture counts, a wrong one does not."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw

from training.evaluate import Known, border, num_blobs, percent, small
from training.sheets import sheet


def disc(colour: str, background: str = "white") -> Image.Image:
    picture = Image.new("RGB", (128, 128), background)
    ImageDraw.Draw(picture).ellipse((24, 24, 104, 104), fill=colour)
    return picture


def test_a_picture_is_named_by_the_nearest_original() -> None:
    known = Known(small([disc("red"), disc("green"), disc("blue")]), ["apple", "leaf", "sea"])
    assert known.nearest([disc("#e01010"), disc("blue")]) == [["apple"], ["sea"]]


def test_shares_are_percentages() -> None:
    assert percent([True, False, True, True]) == 75.0


def test_separate_things_are_counted() -> None:
    two = disc("white")
    draw = ImageDraw.Draw(two)
    draw.ellipse((5, 40, 55, 90), fill="red")
    draw.ellipse((70, 40, 120, 90), fill="blue")
    assert [num_blobs(picture) for picture in (disc("white"), disc("red"), two)] == [0, 1, 2]


def test_the_border_is_the_background_and_not_the_subject() -> None:
    assert torch.equal(border(disc("red", "#102030")), torch.tensor([16.0, 32.0, 48.0]))


def test_a_sheet_has_a_cell_for_every_picture() -> None:
    assert sheet([disc("red")] * 5, ["red"] * 5, columns=3).size == (3 * 132, 2 * 148)
