"""The playground on the real engine and the built-in model: words become the right picture."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from PIL import Image
from playwright.sync_api import Browser

import mezzotint
from mezzotint.config import BUILT_IN_MODEL
from mezzotint.server.workers.process import ENGINE_WORKER
from tests.browser.conftest import PATIENCE_MS, Visit, open_page
from tests.server.hosting import endpoint, hosting, settings_for

WEIGHTS = Path(mezzotint.__file__).parent / "models" / BUILT_IN_MODEL / "model_index.json"
LOADING_MS = 240_000
"""Importing torch and loading the model, on a machine that has much else to do."""


pytestmark = pytest.mark.skipif(
    not WEIGHTS.exists(), reason="this checkout has no weights of the built-in model"
)


def test_words_become_the_right_picture_and_stay(browser: Browser, tmp_path: Path) -> None:
    emoji = endpoint(BUILT_IN_MODEL, id="emoji", num_threads=1)
    with hosting(settings_for(tmp_path, emoji), worker=ENGINE_WORKER, ready=False) as host:
        visit = open_page(browser, host, host.first_key)
        visit.page.click("#examples button >> text=teal", timeout=LOADING_MS)
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


def test_a_server_that_is_killed_and_started_again_owes_nobody_a_picture(
    browser: Browser, tmp_path: Path
) -> None:
    with serve_command(tmp_path, 0) as (process, url, key):
        visit = Visit(browser.new_context(base_url=url).new_page())
        visit.page.goto("/")
        visit.page.fill("#key", key)
        visit.page.click("#key-form button")
        visit.see("#forget-key")
        visit.ask("a rocket", endpoint="emoji", steps=50, count=8, seed=5)
        visit.hear("step", patience_ms=LOADING_MS)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        visit.hear("the server is away; trying again")
        assert visit.text("#status") == "the server is away; trying again"
        assert psutil.wait_procs(workers, timeout=PATIENCE_MS / 1000)[1] == [], "its workers end with it"

    with serve_command(tmp_path, int(url.rpartition(":")[2])):
        visit.done(LOADING_MS)
        assert visit.text("#error") == ""
        assert visit.page.locator("#strip button").count() == 8
        picture = visit.shown_bytes()
        visit.page.reload()
        visit.see("#prints .show")
        assert visit.page.locator("#prints .show").count() == 8, "made once, not twice"
        visit.make("a rocket", endpoint="emoji", steps=50, count=1, seed=5)
        assert visit.shown_bytes() == picture, "the seed's own bytes"
        visit.page.context.close()
        assert visit.complaints == []


@contextlib.contextmanager
def serve_command(folder: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """`mezzotint serve` as a process: its address, and the key if this is its first start."""
    command = [sys.executable, "-m", "mezzotint", "serve", "--data-dir", str(folder), "--port", str(port)]
    with (folder / "log").open("w+") as log:
        environment = os.environ | {"MEZZOTINT_LOG_LEVEL": "error", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        try:
            said = ""
            while "Playground" not in said:
                line = process.stdout.readline()
                assert line, f"the server did not start: {(folder / 'log').read_text()}"
                said += line
            url, key = re.search(r"listens on (\S+)", said), re.search(r"API key.*: (\S+)", said)
            assert url is not None
            yield process, url[1], key[1] if key else ""
        finally:
            process.terminate()
            process.wait(PATIENCE_MS / 1000)
            process.stdout.close()


def corner(data: bytes) -> tuple[int, int, int]:
    """The colour near the picture's upper left corner, away from its very edge."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    colour = image.crop((6, 6, 16, 16)).resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(colour, tuple)
    return int(colour[0]), int(colour[1]), int(colour[2])
