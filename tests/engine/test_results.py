"""What counts as a picture of what a pipeline returned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mezzotint.engine.results import pixels, repainted
from mezzotint.errors import GenerationError
from mezzotint.spec import ImageSpec, InputPicture
from tests.attacks import attack


def returned(*shape: int, name: str = "images") -> Any:
    return SimpleNamespace(**{name: np.full(shape, 0.5)})


def test_a_picture_keeps_its_alpha_and_its_layers() -> None:
    assert [each.shape for each in pixels(returned(1, 4, 6, 3))] == [(4, 6, 3)]
    assert [each.shape for each in pixels(returned(1, 4, 6, 4, name="image"))] == [(4, 6, 4)]
    assert [each.shape for each in pixels((np.zeros((1, 4, 6, 3)),))] == [(4, 6, 3)]
    assert [each.shape for each in pixels(returned(1, 2, 4, 6, 4))] == [(4, 6, 4)] * 2
    assert pixels(returned(1, 4, 6, 3))[0].max() == 128


@pytest.mark.parametrize("result", [returned(1, 4, 6, 1), returned(1, 4, 6), returned(0, 4, 6, 3), object()])
def test_what_is_no_colour_picture_is_said(result: Any) -> None:
    with pytest.raises(GenerationError, match="the pipeline returned"):
        pixels(result)


@attack("Weights that make a model paint NaN", outcome="the request fails, instead of a picture of nothing")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_picture_of_no_numbers_is_a_failure(value: float) -> None:
    result = returned(1, 4, 6, 3)
    result.images[0, 1, 2, 0] = value
    with pytest.raises(GenerationError, match="values that are no numbers"):
        pixels(result)


def test_what_the_mask_keeps_is_opaque() -> None:
    given, mask = InputPicture(2, 1, bytes([9] * 6)), InputPicture(2, 1, bytes([255, 0]), channels=1)
    spec = ImageSpec(prompt="a cat", num_inference_steps=1, images=(given,), mask=mask)
    made = np.array([[[1, 2, 3, 40], [1, 2, 3, 40]]], np.uint8)
    assert repainted(made, spec).tolist() == [[[1, 2, 3, 40], [9, 9, 9, 255]]]
