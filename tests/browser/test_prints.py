"""The prints in the playground: found, kept, taken away, and looked at closely."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.browser.conftest import PATIENCE_MS, Visit, new_key, open_page
from tests.server.hosting import Host


def shows(visit: Visit, *prompts: str) -> None:
    """Waits until these are the prompts of the prints, newest first."""
    expect(visit.page.locator("#prints .show em")).to_have_text(list(prompts), timeout=PATIENCE_MS)


def make_three(visit: Visit) -> None:
    for seed, prompt in enumerate(("an owl", "a cat", "an owl at night"), 1):
        visit.make(prompt, seed=seed)
    shows(visit, "an owl at night", "a cat", "an owl")


def test_a_print_says_what_it_was_made_with(visit: Visit) -> None:
    visit.page.select_option("#adapter", "glow")
    for name, value in {"prompt": "an owl", "seed": "7", "steps": "3", "width": "48"}.items():
        visit.page.fill(f"#{name}", value)
    visit.page.click("#make")
    shows(visit, "an owl")
    assert visit.page.locator("#prints small").all_inner_texts() == ["one:glow, 48 × 32", "3 steps, seed 7"]


def test_prints_are_searched(visit: Visit) -> None:
    make_three(visit)
    visit.page.fill("#search", "OWL")
    shows(visit, "an owl at night", "an owl")
    visit.page.fill("#search", "dog")
    visit.see("#empty")
    assert visit.text("#empty") == "Nothing like that among your prints."
    visit.page.fill("#search", "")
    shows(visit, "an owl at night", "a cat", "an owl")


def test_stars_are_kept(visit: Visit, host: Host) -> None:
    make_three(visit)
    visit.page.locator("#prints li").nth(1).hover()
    visit.page.locator("#prints .star").nth(1).click()
    visit.hear("Starred", selector="#status")
    visit.page.reload()
    visit.see("#prints .show")
    visit.page.click("#starred")
    shows(visit, "a cat")
    assert visit.page.locator("#prints .star").get_attribute("aria-pressed") == "true"
    visit.page.click("#prints .show")
    visit.page.keyboard.press("s")
    visit.hear("No longer starred", selector="#status")


def test_picked_prints_are_downloaded_together_and_deleted(visit: Visit, tmp_path: Path) -> None:
    make_three(visit)
    first = visit.shown_bytes()
    for number in (0, 1):
        visit.page.locator("#prints .mark").nth(number).click()
    assert visit.text("#picked") == "2 picked"
    with visit.page.expect_download() as begun:
        visit.page.click("#pick-zip")
    begun.value.save_as(tmp_path / "prints.zip")
    with zipfile.ZipFile(tmp_path / "prints.zip") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["an-owl-at-night-3.png", "a-cat-2.png"]
        assert archive.read("an-owl-at-night-3.png") == first
    visit.page.once("dialog", lambda dialog: dialog.accept())
    visit.page.click("#pick-delete")
    shows(visit, "an owl")
    assert visit.page.locator("#welcome").is_visible(), "what is deleted leaves the sheet"
    assert not visit.page.locator("#picks").is_visible()


def test_the_full_view_zooms_and_goes_from_print_to_print(visit: Visit) -> None:
    make_three(visit)
    visit.page.click("#picture")
    visit.see("#full")
    assert (visit.text("#full-caption"), visit.text("#full-count")) == ("an owl at night", "1 of 3")
    visit.page.keyboard.press("ArrowRight")
    assert (visit.text("#full-caption"), visit.text("#full-count")) == ("a cat", "2 of 3")
    visit.page.keyboard.press("End")
    visit.page.keyboard.press("ArrowRight")
    assert visit.text("#full-caption") == "an owl"
    visit.page.keyboard.press("+")
    assert visit.text("#full-zoom") == "125 %"
    scale = "new DOMMatrix(getComputedStyle(document.getElementById('full-picture')).transform).a"
    assert visit.page.evaluate(scale) == 1.25
    visit.page.keyboard.press("0")
    assert visit.page.evaluate(scale) == 1
    visit.page.mouse.move(300, 300)
    visit.page.mouse.wheel(0, -400)
    expect(visit.page.locator("#full-zoom")).not_to_have_text("100 %")
    visit.page.keyboard.press("Escape")
    visit.gone("#full")
    assert visit.text("#caption") == "an owl", "the sheet went along"
    visit.page.keyboard.press("ArrowLeft")
    assert visit.text("#caption") == "a cat"


def test_earlier_prompts_come_back(visit: Visit) -> None:
    make_three(visit)
    prompt = visit.page.locator("#prompt")
    prompt.fill("a draft")
    prompt.press("Home")
    prompt.press("ArrowUp")
    assert prompt.input_value() == "an owl at night"
    prompt.press("ArrowUp")
    assert prompt.input_value() == "a cat"
    for _ in range(2):
        prompt.press("End")
        prompt.press("ArrowDown")
    assert prompt.input_value() == "a draft"
    visit.page.evaluate("sessionStorage.removeItem('mezzotint-prompts')")  # as in another session
    visit.page.click("#history")
    assert visit.page.locator("#history-list button").all_inner_texts() == [
        "an owl at night",
        "a cat",
        "an owl",
    ]
    visit.page.click("#history-list button >> nth=2")
    assert prompt.input_value() == "an owl"


def test_keys_are_listed_and_do_what_the_list_says(visit: Visit) -> None:
    visit.make("an owl")
    visit.page.locator("#make").focus()
    visit.page.keyboard.press("?")
    visit.see("#keyboard-dialog")
    assert re.search(r"V\s+variations", visit.text("#keyboard-list"))
    visit.page.keyboard.press("Escape")
    visit.page.keyboard.press("p")
    visit.page.keyboard.type("s? /")
    assert visit.page.locator("#prompt").input_value().endswith("s? /"), "whoever writes gets letters"
    visit.page.locator("#make").focus()
    visit.page.keyboard.press("/")
    assert visit.page.evaluate("document.activeElement.id") == "search"


def test_variations_are_the_neighbouring_seeds(visit: Visit) -> None:
    visit.make("an owl", seed=2**62, steps=3, width=48)
    visit.page.click("#vary")
    expect(visit.page.locator("#prints .show")).to_have_count(5, timeout=PATIENCE_MS)
    facts = visit.page.locator("#prints small").all_inner_texts()
    assert [text.partition("seed ")[2] for text in facts[1::2]] == [str(2**62 + by) for by in (4, 3, 2, 1, 0)]
    assert set(facts[::2]) == {"one, 48 × 32"}


def test_a_wide_screen_has_the_prints_beside_the_sheet(browser: Browser, host: Host) -> None:
    visit = open_page(browser, host, new_key(host), viewport={"width": 1920, "height": 1080})
    visit.make("an owl")
    visit.see("#prints .show")
    stage = visit.page.locator(".stage").bounding_box()
    drawer = visit.page.locator(".drawer").bounding_box()
    assert stage is not None
    assert drawer is not None
    assert drawer["x"] >= stage["x"] + stage["width"]
    assert drawer["y"] < 200
    visit.page.context.close()
