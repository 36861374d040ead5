"""Every text-to-image class of diffusers: alone it has the bytes of plain diffusers, among others its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from benchmarks import families
from tests.engine import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, at classes of which we change nothing

NEEDS_VISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="its processor needs torchvision"
)
LONG = {"hidream": "it draws 512x512 at least", "hunyuan-image": "its prompt has 1000 tokens"}
"""Classes whose smallest picture takes many seconds."""
FOUND = Path(__file__).parents[2] / "docs" / "families.json"
UNLOADABLE = {
    "Cosmos2TextToImagePipeline",
    "StableCascadeCombinedPipeline",
    "WuerstchenCombinedPipeline",
}
"""diffusers 0.42 moved a class of two to where its loading does not find it; one needs another package."""


def cases() -> list[ParameterSet]:
    found = []
    for name in {**tiny.OTHERS, **tiny.WIDER, **tiny.VISION}:
        marks = [pytest.mark.slow] if name in LONG else []
        found.append(pytest.param(name, marks=[*marks, NEEDS_VISION] if name in tiny.VISION else marks))
    return found


@pytest.mark.parametrize("name", cases())
def test_a_class_is_right_alone_and_among_others(name: str) -> None:
    row = families.measure(name, "fp32", num_requests=2)
    assert row.alone, row.reason
    assert row.exact, row.reason
    assert row.loads or row.pipeline in UNLOADABLE, row.reason


def test_every_class_that_diffusers_has_was_measured() -> None:
    rows = json.loads(FOUND.read_text(encoding="utf-8"))
    assert set(families.classes()) == {row["pipeline"] for row in rows if row["kind"] == "text"}
