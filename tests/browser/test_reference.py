"""The page /docs, and the documentation site, in a real browser."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser.conftest import Visit, open_page
from tests.browser.test_playground import check
from tests.server.hosting import Host
from tests.site import build


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_of_all_addresses_is_reached_read_and_left(
    browser: Browser, host: Host, axe_source: str, scheme: str
) -> None:
    visit = open_page(browser, host, bypass_csp=True, color_scheme=scheme)
    visit.page.goto("/docs")
    visit.see("text=every address, every field")
    visit.page.click('.contents a[href="#post-dedicated-v1-images-edits"]')
    assert visit.page.locator("#post-dedicated-v1-images-edits td >> text=strength").first.is_visible()
    assert visit.page.locator("pre button").count() == visit.page.locator("pre").count()
    visit.page.evaluate(axe_source)
    assert check(visit) == []
    visit.page.click("text=Playground")
    visit.see("#prompt")
    assert [address for address in visit.requests if not address.startswith(host.url)] == []
    assert visit.complaints == []
    visit.page.context.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the documentation site."""
    folder: Path = build(tmp_path_factory.mktemp("site"))
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


def test_the_site_is_searched_without_a_request_to_another_host(browser: Browser, site: str) -> None:
    visit = Visit(browser.new_context(base_url=site).new_page())
    visit.page.goto("/index.html")
    visit.page.click('[data-md-component="search-query"]')
    visit.page.keyboard.type("heartbeat_s")
    visit.page.wait_for_selector('.md-search-result__link[href*="settings.html"]', state="attached")
    visit.page.goto("/addresses.html")
    assert visit.page.locator("text=num_inference_steps").count() > 0
    assert [address for address in visit.requests if not address.startswith((site, "blob:", "data:"))] == []
    assert visit.complaints == []
    visit.page.context.close()
