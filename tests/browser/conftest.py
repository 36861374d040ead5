"""A real headless Chromium and a real server with fake workers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Playwright, Response, expect, sync_playwright

from tests.server.hosting import Host, endpoint, hosting, settings_for

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
AXE = "axe-core@4.14.1"
PATIENCE_MS = 20_000


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Chromium; as root on a Debian without it, it is installed first."""
    found = find_chromium()
    if found is None and os.geteuid() == 0 and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "--yes", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "--quiet", *words], env=environment, capture_output=True, timeout=400)
        found = find_chromium()
    if found is None:
        pytest.fail("the browser tests need Chromium; on Debian and Ubuntu: apt-get install chromium")
    return found


@pytest.fixture(scope="session")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="session")
def browser(playwright: Playwright, chromium: str) -> Iterator[Browser]:
    browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def axe_source(request: pytest.FixtureRequest) -> str:
    """The accessibility checker, from npm on first use."""
    assert request.config.cache is not None
    folder = request.config.cache.mkdir("axe")
    file = folder / "node_modules" / "axe-core" / "axe.min.js"
    if not file.exists():
        npm = shutil.which("npm") or pytest.fail("the accessibility tests need npm, which comes with Node.js")
        command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(folder), AXE]
        subprocess.run(command, check=True, capture_output=True, timeout=200)
    return file.read_text()


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """Endpoint `one` is quick, `slow` can be watched, `still` stands still until it is cancelled.

    `words` makes pictures from words only.
    """
    folder = tmp_path_factory.mktemp("server")
    one = endpoint("fake:step_s=0.002,size=32")
    slow = endpoint("fake:step_s=0.05,size=32", id="slow")
    still = endpoint("fake:step_s=0.5,size=32", id="still", max_jobs=1)
    words = endpoint("fake:size=32,pictures=0", id="words")
    with hosting(settings_for(folder, one, slow, still, words)) as running:
        for route in ("glow", "ink"):
            file = folder / f"{route}.safetensors"
            file.write_bytes(route.encode())
            running.announce("one", route, file)
        yield running


@dataclass
class Visit:
    """One browser tab, and what it did."""

    page: Page
    requests: list[str] = field(default_factory=list)
    answers: list[Response] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    """Errors in the console, except those of answers that are errors."""

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("response", lambda answer: self.answers.append(answer))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: self._heard(said.type, said.text))

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not text.startswith("Failed to load resource"):
            self.complaints.append(text)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def see(self, selector: str) -> None:
        self.page.wait_for_selector(selector, state="visible")

    def gone(self, selector: str) -> None:
        self.page.wait_for_selector(selector, state="hidden")

    def hear(self, words: str, *, selector: str = "#progress-text", patience_ms: int = PATIENCE_MS) -> None:
        """Waits until the page says something with these words in it."""
        expect(self.page.locator(selector)).to_contain_text(words, timeout=patience_ms)

    def ask(self, prompt: str, *, endpoint: str = "one", steps: int = 4, **fields: Any) -> None:
        """Fills the form and presses the button."""
        self.page.select_option("#endpoint", endpoint)
        for name, value in {"prompt": prompt, "steps": steps, **fields}.items():
            self.page.fill(f"#{name}", str(value))
        self.page.click("#make")

    def make(self, prompt: str, **fields: Any) -> str:
        """A finished picture; the name under which the server keeps it."""
        self.ask(prompt, **fields)
        self.done()
        return self.shown_name()

    def done(self, patience_ms: int = PATIENCE_MS) -> None:
        self.hear("Done", selector="#status", patience_ms=patience_ms)

    def shown_name(self) -> str:
        address = self.page.locator("#picture").get_attribute("src") or ""
        return address.partition("?")[0].rpartition("/")[2]

    def shown_bytes(self) -> bytes:
        """The file that is on show, as the browser would fetch it again."""
        address = self.page.locator("#picture").get_attribute("src") or ""
        return self.page.request.get(address).body()


def open_page(browser: Browser, host: Host, key: str | None = None, **options: Any) -> Visit:
    """A fresh visit; with a key it is in already."""
    context = browser.new_context(base_url=host.url, **options)
    visit = Visit(context.new_page())
    visit.page.goto("/")
    if key is not None:
        visit.page.fill("#key", key)
        visit.page.click("#key-form button")
        visit.gone("#key-dialog")
        visit.see("#forget-key")
    return visit


def new_key(host: Host) -> str:
    with host.new_client() as http:
        return http.headers["authorization"].removeprefix("Bearer ")


@pytest.fixture
def visit(browser: Browser, host: Host) -> Iterator[Visit]:
    """A tab with a key of its own, so with an empty gallery."""
    visit = open_page(browser, host, new_key(host))
    yield visit
    visit.page.context.close()
    assert visit.complaints == []
