"""The playground on the real engine and the built-in model: words become the right picture."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser

import mezzotint
from mezzotint.config import BUILT_IN_MODEL
from mezzotint.server.supervisor import ENGINE_WORKER
from tests.browser.conftest import open_page
from tests.server.hosting import endpoint, hosting, settings_for

WEIGHTS = Path(mezzotint.__file__).parent / "models" / BUILT_IN_MODEL / "model_index.json"
LOADING_MS = 240_000
"""Importing torch and loading the model, on a machine that has much else to do."""


@pytest.mark.skipif(not WEIGHTS.exists(), reason="this checkout has no weights of the built-in model")
def test_words_become_the_right_picture_and_stay(browser: Browser, tmp_path: Path) -> None:
    emoji = endpoint(BUILT_IN_MODEL, id="emoji", num_threads=1)
    with hosting(settings_for(tmp_path, emoji), worker=ENGINE_WORKER, ready=False) as host:
        visit = open_page(browser, host, host.service.first_key)
        visit.page.click("#examples button >> text=teal")
        visit.done(LOADING_MS)
        picture = visit.shown_bytes()
        red, green, blue = corner(picture)
        assert min(green, blue) > red + 40, f"the background should be teal (got {red}, {green}, {blue})"

        visit.page.reload()
        visit.page.click("#prints .show")
        visit.page.click("#use")
        visit.page.click("#make")
        visit.done()
        assert visit.shown_bytes() == picture, "the same settings, the same bytes"

        visit.ask("a rocket", endpoint="emoji", steps=50, count=8)
        visit.see("#picture[src^='data:']")
        visit.page.click("#cancel")
        visit.gone("#running")
        assert visit.text("#status") == "Cancelled"
        visit.page.context.close()
        assert visit.complaints == []


def corner(data: bytes) -> tuple[int, int, int]:
    """The colour near the picture's upper left corner, away from its very edge."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    colour = image.crop((6, 6, 16, 16)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(colour, tuple)
    return int(colour[0]), int(colour[1]), int(colour[2])
