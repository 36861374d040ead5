"""Pictures go in through the playground: what a picture begins from, and the mask that is painted on it."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Request

from mezzotint.images import read_parameters
from tests.browser.conftest import Visit, new_key
from tests.server.hosting import Host

EDITS = "/dedicated/v1/images/edits"


@pytest.fixture
def bodies(visit: Visit) -> list[dict[str, Any]]:
    """The bodies of the edits that the page sends."""
    sent: list[dict[str, Any]] = []

    def note(request: Request) -> None:
        if request.url.endswith(EDITS):
            sent.append(json.loads(request.post_data or ""))

    visit.page.on("request", note)
    return sent


def opened(entry: dict[str, str]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(entry["image"].partition(",")[2])))


def choose(visit: Visit, width: int = 64, height: int = 64, name: str = "red.png") -> bytes:
    """Begins from a red picture."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    visit.page.set_input_files(
        "#from-file", {"name": name, "mimeType": "image/png", "buffer": file.getvalue()}
    )
    visit.see("#from-pictures li img")
    return file.getvalue()


def carry(visit: Visit, kinds: tuple[str, ...], transfer: str, x: str = "10") -> None:
    """Drops or pastes the picture on show as a file."""
    visit.page.evaluate(
        f"""async () => {{
            const answer = await fetch(document.getElementById("picture").src);
            const carried = new DataTransfer();
            carried.items.add(new File([await answer.blob()], "owl.png", {{ type: "image/png" }}));
            for (const type of {json.dumps(kinds)}) {{
                const options = {{ {transfer}: carried, bubbles: true, cancelable: true, clientX: {x} }};
                const kind = type === "paste" ? ClipboardEvent : DragEvent;
                document.body.dispatchEvent(new kind(type, options));
            }}
        }}"""
    )


def paint_across(visit: Visit) -> None:
    """A stroke from left to right through the middle."""
    box = visit.page.locator("#mask").bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    visit.page.mouse.move(box["x"] + 2, middle)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] - 2, middle, steps=4)
    visit.page.mouse.up()


def test_a_print_begins_another_one_and_both_are_compared(visit: Visit, bodies: list[dict[str, Any]]) -> None:
    visit.make("an owl", seed=5)
    first = visit.shown_bytes()
    visit.page.click("#begin-from")
    visit.see("#from-pictures li img")
    visit.page.fill("#strength", "0.5")
    visit.make("an owl at night", seed=6)
    sent = bodies[0]
    assert base64.b64decode(sent["image"][0]["image"].partition(",")[2]) == first
    assert (sent["strength"], sent["seed"], "mask" in sent) == (0.5, 6, False)
    made = read_parameters(visit.shown_bytes())
    assert made is not None
    assert (made.spec.prompt, made.spec.strength) == ("an owl at night", 0.5)

    assert not visit.page.locator("#before").is_visible()
    visit.page.click("#before-after")
    visit.see("#before")
    visit.page.locator("#cut").press("Home")
    clip = "getComputedStyle(document.getElementById('before')).clipPath"
    assert visit.page.evaluate(clip) == "inset(0px 100% 0px 0px)", "only after"
    visit.page.locator("#cut").press("End")
    assert visit.page.evaluate(clip) == "inset(0px 0% 0px 0px)", "only before"

    visit.page.locator("#prints .show").nth(1).click()
    assert not visit.page.locator("#before").is_visible(), "the first one began from nothing"
    visit.page.locator("#prints .show").nth(0).click()
    visit.see("#before")
    visit.page.click("#from-pictures button")
    visit.page.click("#use")
    visit.see("#from-pictures li img")
    assert visit.page.locator("#strength").input_value() == "0.5"


def test_pictures_are_dropped_and_pasted(visit: Visit, bodies: list[dict[str, Any]]) -> None:
    visit.make("an owl")
    carry(visit, ("dragover", "drop"), "dataTransfer")
    visit.hear("Begins from owl.png", selector="#status")
    carry(visit, ("paste",), "clipboardData")
    visit.hear("Begins from the pasted picture", selector="#status")
    assert visit.page.locator("#from-pictures img").count() == 2
    carry(visit, ("paste",), "clipboardData")
    visit.see("#error")
    assert visit.text("#error") == "This endpoint begins from 2 pictures at most; remove one first."
    visit.make("two owls")
    assert len(bodies[0]["image"]) == 2
    visit.page.locator("#from-pictures button").first.click()
    visit.page.locator("#from-pictures button").first.click()
    visit.make("no owls")
    assert len(bodies) == 1, "words alone again"


def test_a_mask_is_painted_erased_and_undone(visit: Visit, bodies: list[dict[str, Any]]) -> None:
    choose(visit, 96, 64)
    visit.page.click("#mask-paint")
    visit.see("#masking")
    paint_across(visit)
    visit.page.click("#brush-done")
    visit.gone("#masking")
    visit.make("an owl")
    mask = opened(bodies[0]["mask"])
    assert mask.size == (96, 64)
    assert (mask.getpixel((48, 32)), mask.getpixel((48, 2))) == ((255,) * 3 + (255,), (0,) * 3 + (255,))

    visit.page.click("#mask-paint")
    visit.page.click("#brush-invert")
    visit.page.click("#brush-done")
    visit.make("an owl")
    mask = opened(bodies[1]["mask"]).convert("L")
    assert (mask.getpixel((48, 32)), mask.getpixel((48, 2))) == (0, 255), "the other way round"

    visit.page.click("#mask-paint")
    visit.page.click("#brush-undo")
    visit.page.click("#brush-erase")
    paint_across(visit)
    visit.page.click("#brush-done")
    visit.make("an owl")
    assert opened(bodies[2]["mask"]).convert("L").getpixel((48, 32)) == 0, "erased"

    visit.page.click("#mask-paint")
    visit.page.click("#brush-undo")
    visit.page.click("#brush-undo")
    visit.page.click("#brush-redo")
    visit.page.click("#brush-clear")
    visit.page.click("#brush-done")
    visit.make("an owl")
    assert "mask" not in bodies[3]


def test_a_mask_is_painted_by_keyboard_alone(visit: Visit, bodies: list[dict[str, Any]]) -> None:
    choose(visit)
    visit.page.focus("#mask-paint")
    for name in ("Enter", "]", "]", " ", "ArrowRight", "ArrowRight", " ", "Shift+ArrowUp", " ", " ", "z"):
        visit.page.keyboard.press(name)
    assert visit.page.evaluate("document.activeElement.id") == "mask"
    visit.page.keyboard.press("Escape")
    visit.gone("#masking")
    assert visit.page.evaluate("document.activeElement.id") == "mask-paint"
    visit.make("an owl")
    mask = opened(bodies[0]["mask"]).convert("L")
    assert (mask.getpixel((32, 32)), mask.getpixel((2, 2))) == (255, 0)


def test_a_model_of_words_offers_no_beginning(visit: Visit) -> None:
    choose(visit)
    visit.page.select_option("#endpoint", "words")
    assert not visit.page.locator("#from").is_visible()
    visit.make("an owl", endpoint="words")
    assert not visit.page.locator("#begin-from").is_visible()
    carry(visit, ("paste",), "clipboardData")
    visit.see("#error")
    assert visit.text("#error") == "words makes pictures from words only; choose another endpoint."
    visit.page.select_option("#endpoint", "one")
    visit.see("#from-pictures img")


@pytest.mark.parametrize("recipe", ["curl", "python", "openai"])
def test_a_recipe_gives_the_same_edit(visit: Visit, host: Host, tmp_path: Path, recipe: str) -> None:
    choose(visit)
    visit.page.fill("#strength", "0.5")
    visit.make('an owl\'s "hoot" for $5', seed=5)
    before = visit.shown_bytes()
    visit.page.click(f"[data-recipe={recipe}]")
    code = visit.text("#recipe")
    with visit.page.expect_download() as begun:
        visit.page.click("#recipe-files a")
    begun.value.save_as(tmp_path / begun.value.suggested_filename)
    environment = os.environ | {"MEZZOTINT_API_KEY": new_key(host), "OMP_NUM_THREADS": "1"}
    command = ["sh", "-c", code] if recipe == "curl" else [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "picture.png").read_bytes() == before


def test_settings_of_an_edit_say_that_its_picture_is_gone(visit: Visit) -> None:
    choose(visit)
    visit.page.fill("#strength", "0.5")
    visit.make("an owl")
    visit.page.reload()
    visit.page.click("#prints .show")
    visit.page.click("#use")
    assert visit.text("#warnings") == "The picture that it began from is not kept; choose it again."
    visit.page.click("#vary")
    visit.hear("there are no variations of it", selector="#error")


def test_what_is_no_picture_is_told_so(visit: Visit) -> None:
    visit.page.set_input_files("#from-file", {"name": "no.png", "mimeType": "image/png", "buffer": b"hello"})
    visit.see("#error")
    assert visit.text("#error") == "no.png is not a picture that this browser can read."
