"""Pictures as the SDK hands them back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mezzotint.client import GeneratedImage, Generation, Progress
from mezzotint.images import encode
from mezzotint.schemas import ImageItem
from tests.client.scripted import PIXELS, item


def generation(*items: dict[str, Any]) -> Generation:
    return Generation([GeneratedImage(ImageItem.model_validate(item)) for item in items])


@pytest.mark.parametrize(
    ("form", "name", "written", "as_it_came"),
    [
        ("png", "cat.png", "cat.png", True),
        ("png", "cat.PNG", "cat.PNG", True),
        ("png", "cat", "cat.png", True),
        ("png", "cat.jpeg", "cat.jpeg", False),
        ("jpg", "cat.jpg", "cat.jpg", True),
        ("jpeg", "cat.jpeg", "cat.jpeg", True),
        ("jpeg", "cat", "cat.jpg", True),
        ("jpeg", "cat.webp", "cat.webp", False),
        ("raw", "cat", "cat.png", False),
        ("raw", "cat.rgb", "cat.rgb", True),
        ("raw", "cat.png", "cat.png", False),
    ],
)
def test_save_keeps_the_bytes_where_it_can(
    tmp_path: Path, form: str, name: str, written: str, as_it_came: bool
) -> None:
    result = generation(item(form))
    assert result.save(tmp_path / name) == [tmp_path / written]
    data = (tmp_path / written).read_bytes()
    assert (data == encode(form, PIXELS, 8, 4)) == as_it_came
    if not written.endswith(".rgb"):
        assert Image.open(io.BytesIO(data)).size == (8, 4)


def test_several_pictures_are_saved_with_their_numbers(tmp_path: Path) -> None:
    result = generation(item(), item(seed=6), item(seed=7))
    assert result.save(str(tmp_path / "cat.png")) == [tmp_path / f"cat-{index}.png" for index in range(3)]
    assert [picture.seed for picture in result.data] == [5, 6, 7]


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress("queued", loading="loading the model", loading_fraction=0.404), "loading the model (40 %)"),
        (Progress("queued", 2, loading="starting a worker"), "starting a worker"),
        (Progress("queued", 0), "queued, next in line"),
        (Progress("queued", 1), "queued, 1 goes first"),
        (Progress("queued", 2), "queued, 2 go first"),
        (
            Progress(
                "running", picture=3, num_pictures=8, picture_step=12, num_picture_steps=50, num_steps=400
            ),
            "picture 3 of 8, step 12 of 50",
        ),
        (
            Progress("running", None, 2, 4, picture=1, num_pictures=1, picture_step=2, num_picture_steps=4),
            "step 2 of 4",
        ),
        (Progress("running", step=2, num_steps=4), "step 2 of 4"),
        (Progress("running"), "running"),
    ],
)
def test_progress_is_told_as_people_count(progress: Progress, text: str) -> None:
    assert progress.text == text
