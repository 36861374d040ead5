"""The playground from a visitor's side, in a real browser against a real server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Route

from mezzotint import images
from mezzotint.fake_worker import EXAMPLES
from mezzotint.images import read_parameters
from mezzotint.server.api.playground import FILES
from tests.attacks import attack
from tests.browser.conftest import Visit, new_key, open_page
from tests.server.hosting import Host, client, endpoint, hosting, settings_for

MAX_PAGE_BYTES = 200_000
MAX_LINES = 500
SERIOUS = ("serious", "critical")


# ---------------------------------------------------------------- coming in


def test_the_first_picture_is_two_clicks_away(browser: Browser, host: Host) -> None:
    visit = open_page(browser, host)
    visit.see("#key-dialog")
    visit.page.fill("#key", new_key(host))
    visit.page.click("#key-form button")
    visit.see("#examples button >> nth=0")
    assert visit.page.locator("#examples button").count() == 3
    visit.page.click("#examples button >> nth=0")
    visit.see("#actions")
    assert visit.text("#caption") == visit.page.locator("#prompt").input_value()
    assert read_parameters(visit.shown_bytes()) is not None
    visit.page.context.close()


def test_an_endpoint_that_is_still_loading_shows_its_examples_once_it_has_loaded(
    browser: Browser, tmp_path: Path
) -> None:
    loaded = tmp_path / "loaded"
    slow = endpoint(f"fake:load_until={loaded}", id="slow")
    with hosting(settings_for(tmp_path, slow, auth=False), ready=False) as starting:
        visit = open_page(browser, starting)
        assert not visit.page.locator("#begin").is_visible()
        loaded.touch()
        visit.see("#examples button")
        assert visit.text("#examples").splitlines() == list(EXAMPLES)
        assert visit.page.locator("#steps").input_value() == "8", "the model's own steps"
        visit.page.context.close()


def test_a_server_that_is_away_while_the_page_asks_by_itself_is_no_error_to_show(
    browser: Browser, tmp_path: Path
) -> None:
    mood = "loading"

    def answer(route: Route) -> None:
        if mood == "away":
            return route.abort()
        models = route.fetch().json()
        if mood == "loading":
            models["data"][0]["mezzotint"]["status"] = "starting"
        route.fulfill(json=models)

    with hosting(settings_for(tmp_path, endpoint("fake:size=32"), auth=False)) as running:
        visit = Visit(browser.new_context(base_url=running.url).new_page())
        visit.page.route("**/v1/models", answer)
        visit.page.goto("/")
        visit.see("#prompt")
        mood = "away"
        for _ in range(2):
            with visit.page.expect_event("requestfailed", lambda request: request.url.endswith("/v1/models")):
                pass
        assert visit.text("#error") == ""
        mood = "ready"
        visit.see("#examples button")
        assert visit.text("#error") == ""
        visit.page.context.close()
        assert visit.complaints == []


def test_a_wrong_key_is_told_in_the_servers_words_and_asked_again(browser: Browser, host: Host) -> None:
    visit = open_page(browser, host)
    visit.page.fill("#key", "mz_wrong")
    visit.page.click("#key-form button")
    visit.see("#key-error")
    assert "unknown or has been revoked" in visit.text("#key-error")
    visit.page.fill("#key", new_key(host))
    visit.page.click("#key-form button")
    visit.gone("#key-dialog")
    visit.page.context.close()


def test_the_key_lasts_for_the_session_and_can_be_forgotten(visit: Visit) -> None:
    visit.page.reload()
    visit.see("#forget-key")
    assert not visit.page.locator("#key-dialog").is_visible()
    assert visit.page.evaluate("localStorage.length") == 0
    visit.page.click("#forget-key")
    visit.see("#key-dialog")


def test_a_server_without_keys_asks_for_none(browser: Browser, tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, auth=False)) as open_host:
        visit = open_page(browser, open_host)
        visit.make("a cat")
        assert not visit.page.locator("#forget-key").is_visible()
        visit.page.context.close()


# ---------------------------------------------------------------- making pictures


def test_progress_and_previews_are_seen_before_the_picture(visit: Visit) -> None:
    visit.page.evaluate(
        """() => {
            window.seen = { texts: new Set(), previews: 0 };
            const note = () => seen.texts.add(document.getElementById("progress-text").textContent);
            new MutationObserver(note).observe(document.getElementById("progress-text"), { childList: true });
            const picture = document.getElementById("picture");
            const count = () => (seen.previews += picture.src.startsWith("data:"));
            new MutationObserver(count).observe(picture, { attributeFilter: ["src"] });
        }"""
    )
    visit.make("an owl", endpoint="slow", steps=20)
    texts = visit.page.evaluate("[...seen.texts]")
    assert any(text.startswith("step ") and "of 20" in text and "left" in text for text in texts)
    assert visit.page.evaluate("seen.previews") == 4
    assert visit.page.title() == "Mezzotint"


def test_a_place_in_the_queue_is_seen(visit: Visit, host: Host) -> None:
    before = [host.submit(model="still", num_inference_steps=50) for _ in range(2)]
    host.wait_until(before[0], "running")
    visit.ask("an owl", endpoint="still", steps=50)
    visit.hear("queued, 1 goes first")
    visit.page.click("#cancel")
    visit.gone("#running")
    for request_id in before:
        host.client.delete(f"/dedicated/v1/requests/{request_id}")


def test_cancel_ends_the_request_on_the_server(visit: Visit, host: Host) -> None:
    visit.ask("an owl", endpoint="still", steps=50)
    visit.hear("step")
    request_id = visit.page.evaluate("JSON.parse(sessionStorage.getItem('mezzotint-runs'))[0].id")
    visit.page.click("#cancel")
    visit.gone("#running")
    secret = visit.page.evaluate("sessionStorage.getItem('mezzotint-key')")
    with client(host.url, secret) as http:
        assert http.get(f"/dedicated/v1/requests/{request_id}").json()["status"] == "cancelled"
    assert visit.text("#status") == "Cancelled"
    assert visit.page.locator("#welcome").is_visible()
    assert not visit.page.locator("#error").is_visible()


def test_several_pictures_come_as_a_strip(visit: Visit) -> None:
    visit.make("an owl", count=3, seed=10)
    assert visit.page.locator("#strip button").count() == 3
    visit.page.click("#strip button >> nth=2")
    assert (visit.text("#edition"), visit.text("#signature")) == ("one, 3/3", "seed 12")
    made = read_parameters(visit.shown_bytes())
    assert made is not None
    assert made.spec.seed == 12


def test_the_largest_seed_stays_exact(visit: Visit, host: Host) -> None:
    seed = 2**63 - 1
    visit.make("an owl", seed=seed)
    made = read_parameters(visit.shown_bytes())
    assert made is not None
    assert made.spec.seed == seed
    assert visit.text("#signature") == f"seed {seed}"
    visit.page.reload()
    visit.see("#prints .show")
    assert f"seed {seed}" in visit.text("#prints")


def test_an_adapter_is_chosen_and_restored(visit: Visit) -> None:
    visit.page.select_option("#adapter", "glow")
    visit.page.fill("#prompt", "an owl")
    visit.page.click("#make")
    visit.done()
    made = read_parameters(visit.shown_bytes())
    assert made is not None
    assert made.model == "one:glow"
    visit.page.select_option("#adapter", "")
    visit.page.click("#use")
    assert visit.page.locator("#adapter").input_value() == "glow"
    visit.page.select_option("#endpoint", "slow")
    assert not visit.page.locator("#adapter").is_visible()


def test_a_failure_is_shown_in_the_contracts_words(visit: Visit) -> None:
    visit.ask("an owl !fail@2")
    visit.see("#error")
    assert "the fake job failed at step 2, as its prompt asked" in visit.text("#error")
    assert "generation_failed" in visit.text("#error small")
    visit.make("an owl")
    assert not visit.page.locator("#error").is_visible()


def test_a_refusal_is_shown_in_the_contracts_words(visit: Visit) -> None:
    visit.page.evaluate("document.getElementById('form').noValidate = true")
    visit.ask("an owl", width=33)
    visit.see("#error")
    assert "width must be a multiple of 8 for endpoint one (got 33)" in visit.text("#error")


def test_a_picture_can_be_made_by_keyboard_alone(visit: Visit) -> None:
    for _ in range(6):
        visit.page.keyboard.press("Tab")
        if visit.page.evaluate("document.activeElement.id") == "prompt":
            break
    visit.page.keyboard.type("an owl")
    visit.page.keyboard.press("Control+Enter")
    visit.see("#actions")
    reached = set()
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        reached.add(visit.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {
        "make",
        "endpoint",
        "steps",
        "seed",
        "dice",
        "lock",
        "use",
        "download",
        "show",
        "mark",
        "star",
    } <= reached


# ---------------------------------------------------------------- coming back


def test_the_gallery_is_there_after_a_reload_and_gives_its_settings(visit: Visit) -> None:
    visit.make("an owl", steps=7, guidance=3.5, seed=5)
    before = visit.shown_bytes()
    visit.make("a rocket")
    visit.page.reload()
    visit.see("#prints .show")
    assert visit.page.locator("#prints .show em").all_inner_texts() == ["a rocket", "an owl"]
    visit.page.click("#prints .show >> nth=1")
    visit.page.click("#use")
    values = [
        visit.page.locator(f"#{name}").input_value() for name in ("prompt", "steps", "guidance", "seed")
    ]
    assert values == ["an owl", "7", "3.5", "5"]
    assert visit.page.locator("#lock").get_attribute("aria-pressed") == "true"
    visit.page.click("#make")
    visit.done()
    assert visit.shown_bytes() == before


def test_the_gallery_is_ones_own(visit: Visit, browser: Browser, host: Host) -> None:
    visit.make("an owl")
    other = open_page(browser, host, new_key(host))
    other.see("#empty")
    other.page.context.close()


def test_a_png_gives_its_settings_back(visit: Visit, tmp_path: Path) -> None:
    visit.make('an "owl" – ünïcode', steps=9, seed=2**60 + 1)
    file = tmp_path / "picture.png"
    file.write_bytes(visit.shown_bytes())
    visit.page.fill("#prompt", "something else")
    visit.page.set_input_files("#file", file)
    visit.hear("restored", selector="#status")
    values = [visit.page.locator(f"#{name}").input_value() for name in ("prompt", "steps", "seed")]
    assert values == ['an "owl" – ünïcode', "9", str(2**60 + 1)]


def test_a_png_can_be_dropped_on_the_page(visit: Visit) -> None:
    visit.make("an owl", seed=5)
    visit.page.fill("#prompt", "something else")
    visit.page.evaluate(
        """async () => {
            const answer = await fetch(document.getElementById("picture").src);
            const carried = new DataTransfer();
            carried.items.add(new File([await answer.blob()], "owl.png", { type: "image/png" }));
            for (const type of ["dragover", "drop"]) {
                const place = { clientX: innerWidth - 10, clientY: 10 };  // the half that restores settings
                const options = { dataTransfer: carried, bubbles: true, cancelable: true, ...place };
                document.body.dispatchEvent(new DragEvent(type, options));
            }
        }"""
    )
    visit.hear("restored", selector="#status")
    assert visit.page.locator("#prompt").input_value() == "an owl"


def test_a_file_without_settings_is_told_so(visit: Visit, tmp_path: Path) -> None:
    bare = images.encode("png", bytes(8 * 8 * 3), 8, 8)
    for name, data in (("notes.txt", b"hello"), ("bare.png", bare)):
        file = tmp_path / name
        file.write_bytes(data)
        visit.page.set_input_files("#file", file)
        visit.see("#error")
        assert name in visit.text("#error")


def test_two_pictures_are_compared_side_by_side(visit: Visit) -> None:
    visit.make("an owl", seed=5)
    visit.make("an owl", seed=6)
    for number in (0, 1):
        visit.page.locator("#prints .mark").nth(number).click()
    visit.page.click("#compare")
    visit.see("#compare-dialog")
    assert visit.page.locator("#pair img").count() == 2
    assert visit.page.locator("#differences tr.differs th").all_inner_texts() == ["Seed"]
    visit.page.keyboard.press("Escape")
    visit.gone("#compare-dialog")


def test_a_picture_can_be_deleted(visit: Visit) -> None:
    visit.make("an owl")
    address = visit.page.locator("#picture").get_attribute("src") or ""
    visit.page.on("dialog", lambda dialog: dialog.accept())
    visit.page.click("#delete")
    visit.see("#empty")
    assert visit.page.request.get(address).status == 410


@pytest.mark.parametrize("recipe", ["curl", "python", "openai"])
def test_a_recipe_gives_the_same_picture(visit: Visit, host: Host, tmp_path: Path, recipe: str) -> None:
    visit.make('an owl\'s "hoot"', seed=5, guidance=2.5)
    before = visit.shown_bytes()
    visit.page.click(f"[data-recipe={recipe}]")
    code = visit.text("#recipe")
    assert "mz_" not in code
    environment = os.environ | {"MEZZOTINT_API_KEY": new_key(host), "OMP_NUM_THREADS": "1"}
    command = ["sh", "-c", code] if recipe == "curl" else [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "picture.png").read_bytes() == before


# ---------------------------------------------------------------- when things break


def test_a_reload_in_the_middle_goes_on_watching(visit: Visit) -> None:
    visit.ask("an owl", endpoint="slow", steps=50)
    visit.hear("step")
    visit.page.reload()
    visit.see("#actions")
    assert visit.text("#caption") == "an owl"
    assert visit.page.locator("#prints .show").count() == 1


def test_a_restart_of_the_server_costs_no_picture(browser: Browser, tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.5"))) as first:
        secret = str(first.first_key)
        visit = open_page(browser, first, secret)
        visit.ask("an owl", steps=50)
        visit.hear("step")
        port = int(first.url.rpartition(":")[2])
    visit.hear("away")
    with hosting(settings_for(tmp_path, endpoint("fake"), port=port), key=secret):
        visit.see("#actions")
        assert visit.text("#caption") == "an owl"
        assert read_parameters(visit.shown_bytes()) is not None
        visit.page.context.close()


def test_a_server_that_is_not_there_is_told(visit: Visit) -> None:
    visit.page.route("**/dedicated/**", lambda route: route.abort())
    visit.ask("an owl")
    visit.hear("away")
    visit.page.click("#cancel")
    visit.gone("#running")


# ---------------------------------------------------------------- what the page itself must be


def test_the_page_is_light_and_asks_nobody_else(visit: Visit, host: Host) -> None:
    visit.make("an owl")
    files = {answer.url.removeprefix(host.url): answer for answer in visit.answers}
    sizes = {
        path: len(answer.body())
        for path, answer in files.items()
        if path == "/" or path.startswith("/playground/")
    }
    assert "/playground/style.css" in sizes
    assert sum(sizes.values()) < MAX_PAGE_BYTES
    assert sum(file.stat().st_size for file in page_files()) < MAX_PAGE_BYTES, "all that it may ever load"
    foreign = [url for url in visit.requests if not url.startswith((host.url, "data:", "blob:"))]
    assert foreign == []


def page_files() -> list[Path]:
    """The files of the page, without those of /docs and the font's licence."""
    return [
        file for file in FILES.iterdir() if not file.name.startswith("reference") and file.suffix != ".txt"
    ]


def test_each_script_is_short() -> None:
    lengths = {file.name: file.read_text().count("\n") for file in page_files() if file.suffix == ".js"}
    assert len(lengths) > 20
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


@attack("A script injected into the playground", outcome="the browser refuses it")
def test_scripts_and_styles_in_the_page_itself_are_refused(visit: Visit) -> None:
    with pytest.raises(Error, match="Content Security Policy"):
        visit.page.add_script_tag(content="window.inlineRan = true")
    assert visit.page.evaluate("window.inlineRan") is None
    visit.complaints.clear()  # the browser's own note of the refusal


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_no_serious_accessibility_fault(
    browser: Browser, host: Host, axe_source: str, scheme: str, width: int
) -> None:
    options: dict[str, Any] = {
        "color_scheme": scheme,
        "viewport": {"width": width, "height": 900},
        "bypass_csp": True,
    }
    visit = open_page(browser, host, **options)
    visit.page.evaluate(axe_source)
    visit.see("#key-dialog")
    faults = check(visit)
    visit.page.fill("#key", new_key(host))
    visit.page.click("#key-form button")
    visit.gone("#key-dialog")
    faults += check(visit)
    for seed in (1, 2):
        visit.make("an owl", seed=seed)
    visit.page.set_input_files("#file", {"name": "no.png", "mimeType": "image/png", "buffer": b"no"})
    visit.see("#error")
    faults += check(visit)
    for number in (0, 1):
        visit.page.locator("#prints .mark").nth(number).click()
    visit.page.click("#compare")
    faults += check(visit)
    assert faults == []
    assert visit.page.evaluate("document.scrollingElement.scrollWidth") <= width, (
        "nothing sticks out sideways"
    )
    visit.page.context.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_no_serious_accessibility_fault_at_work(
    browser: Browser, host: Host, axe_source: str, scheme: Any, width: int
) -> None:
    visit = open_page(
        browser,
        host,
        new_key(host),
        color_scheme=scheme,
        viewport={"width": width, "height": 900},
        bypass_csp=True,
    )
    visit.page.evaluate(axe_source)
    visit.make("an owl", seed=1)
    visit.page.click("#card summary")
    visit.page.locator("#prints .mark").first.click()
    visit.page.click("#begin-from")
    visit.see("#from-pictures img")
    faults = check(visit)
    for opener, dialog in (
        ("#history", "#history-dialog"),
        ("#keyboard", "#keyboard-dialog"),
        ("#grid", "#grid-dialog"),
        ("#full-view", "#full"),
    ):
        visit.page.click(opener)
        visit.see(dialog)
        faults += check(visit)
        visit.page.keyboard.press("Escape")
        visit.gone(dialog)
    visit.page.click("#mask-paint")
    faults += check(visit)
    assert faults == []
    assert visit.page.evaluate("document.scrollingElement.scrollWidth") <= width
    visit.page.context.close()


def check(visit: Visit) -> list[str]:
    """The serious faults that axe-core finds in what is on the screen."""
    found = visit.page.evaluate("axe.run()")
    return [
        f"{fault['id']}: {node['html']} {node['failureSummary']}"
        for fault in found["violations"]
        if fault["impact"] in SERIOUS
        for node in fault["nodes"]
    ]
