"""What the playground's form offers: adapters with their strengths, shapes, and grids of pictures."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect

from mezzotint.images import read_parameters
from mezzotint.spec import AdapterUse, ImageSpec
from tests.browser.conftest import PATIENCE_MS, Visit


def made(visit: Visit) -> ImageSpec:
    parameters = read_parameters(visit.shown_bytes())
    assert parameters is not None
    return parameters.spec


def fill(visit: Visit, **fields: str) -> None:
    for name, value in fields.items():
        visit.page.fill(f"#{name}", value)


def test_several_adapters_have_their_strengths(visit: Visit) -> None:
    assert not visit.page.locator("#adapter-scale").is_visible()
    visit.page.select_option("#adapter", "glow")
    fill(visit, prompt="an owl", steps="2", seed="3")
    visit.page.fill("#adapter-scale", "0.5")
    visit.page.click("#adapter-add")
    visit.page.select_option("[aria-label='Adapter 2']", "ink")
    visit.page.click("#make")
    visit.done()
    assert made(visit).adapters == (AdapterUse("glow", 0.5), AdapterUse("ink"))
    assert visit.text("#edition") == "one:glow 0.5 + ink"

    visit.page.select_option("[aria-label='Adapter 2']", "")
    visit.page.select_option("#adapter", "")
    visit.page.click("#make")
    visit.done()
    assert made(visit).adapters == ()
    visit.page.locator("#prints .show").nth(1).click()
    visit.page.click("#use")
    assert visit.page.locator("#adapter-scale").input_value() == "0.5"
    assert visit.page.locator("[aria-label='Adapter 2']").input_value() == "ink"
    visit.page.reload()
    visit.see("#adapter-scale")
    assert visit.page.locator("[aria-label='Adapter 2']").input_value() == "ink"


def test_shapes_are_chosen_with_one_click(visit: Visit) -> None:
    fill(visit, prompt="an owl", steps="2")
    square = visit.page.locator("#shapes button").first
    assert square.get_attribute("aria-pressed") == "true"
    wide = visit.page.locator("#shapes button").nth(1)
    assert wide.get_attribute("aria-label") == "40 by 24 pixels"
    wide.click()
    assert visit.page.locator("#width").input_value() == "40"
    assert (wide.get_attribute("aria-pressed"), square.get_attribute("aria-pressed")) == ("true", "false")
    visit.page.click("#make")
    visit.done()
    assert (made(visit).width, made(visit).height) == (40, 24)
    square.click()
    assert visit.page.locator("#width").input_value() == "", "the endpoint's own"


def test_a_grid_varies_two_things(visit: Visit, tmp_path: Path) -> None:
    fill(visit, prompt="an owl", seed="5", steps="4")
    visit.page.click("#grid")
    visit.page.fill("#grid-x-values", "2-6 +2")
    visit.page.select_option("#grid-y", "adapter")
    visit.page.fill("#grid-y-values", "none, inc")
    assert visit.text("#grid-note") == "there is no adapter inc"
    assert visit.page.locator("#grid-make").is_disabled()
    visit.page.fill("#grid-y-values", "none, ink")
    assert visit.text("#grid-note") == "3 × 2 = 6 pictures"
    visit.page.click("#grid-make")
    expect(visit.page.locator("#prints .show")).to_have_count(6, timeout=PATIENCE_MS)
    assert visit.text("#axes") == "Columns: steps 2, 4, 6; rows: adapter none, ink"
    visit.page.click("#strip button >> nth=5")
    assert visit.text("#edition") == "steps 6, adapter ink"
    spec = made(visit)
    assert (spec.num_inference_steps, spec.routes, spec.seed) == (6, ("ink",), 5)
    visit.page.click("#strip button >> nth=0")
    assert (made(visit).num_inference_steps, made(visit).routes) == (2, ())
    with visit.page.expect_download() as begun:
        visit.page.click("#grid-sheet")
    begun.value.save_as(tmp_path / "grid.png")
    sheet = Image.open(io.BytesIO((tmp_path / "grid.png").read_bytes()))
    assert sheet.width > 3 * 32
    assert sheet.height > 2 * 32


def test_a_grid_that_runs_is_one_line_of_the_queue_and_is_cancelled_as_one(visit: Visit) -> None:
    visit.page.select_option("#endpoint", "still")
    fill(visit, prompt="an owl", seed="5", steps="50")
    visit.page.click("#make")
    visit.page.click("#grid")
    visit.page.click("#grid-make")
    assert visit.page.locator("#waiting-list li").count() == 1
    assert visit.text("#waiting-list small") == "0 of 9 pictures of the grid"
    visit.page.click("#waiting-list .show")
    assert visit.text("#progress-text") == "0 of 9 pictures of the grid"
    visit.page.click("#cancel")
    visit.gone("#waiting")
    assert visit.text("#caption") == "an owl"
    assert not visit.page.locator("#axes").is_visible()
    visit.page.click("#cancel")
    visit.gone("#running")
