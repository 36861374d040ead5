"""families.py and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mezzotint.families import DEFAULT, FAMILIES, family

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_shows_every_family_with_its_defaults(name: str) -> None:
    known = FAMILIES[name]
    row = next(
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{name}` |")
    )
    cells = [cell.strip() for cell in row.split("|")]
    distilled = "" if known.distilled_steps is None else f" ({known.distilled_steps})"
    assert cells[2] == f"{known.default_steps}{distilled}"
    assert cells[3] == str(known.default_guidance)
    assert f"`{known.guidance_argument}`" in cells[4]
    assert (cells[5] == "yes") == known.negative_prompt


def test_an_unknown_class_is_never_merged() -> None:
    assert family("SomebodysPipeline") is DEFAULT
    assert not DEFAULT.merges
