"""The playground's page for admins: endpoints, queues, rates, adapters and keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, expect

from tests.browser.conftest import PATIENCE_MS, Visit, new_key, open_page
from tests.browser.test_playground import check
from tests.server.hosting import Host, endpoint, hosting, settings_for
from tests.server.work.test_adapters import write


@pytest.fixture(scope="module")
def own_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A server whose endpoints and keys these tests may change."""
    one, still = endpoint("fake"), endpoint("fake:step_s=0.5", id="still", max_jobs=1)
    away = endpoint("fake:node=10.0.0.7", id="away", replicas=2)
    with hosting(settings_for(tmp_path_factory.mktemp("admin"), one, still, away)) as running:
        yield running


@pytest.fixture
def admin(browser: Browser, own_host: Host) -> Iterator[Visit]:
    visit = open_page(browser, own_host, own_host.first_key, bypass_csp=True)
    visit.page.click("#admin-open")
    visit.see("#admin-endpoints tbody tr")
    yield visit
    visit.page.context.close()
    assert visit.complaints == []


def row(visit: Visit, table: str, name: str) -> Locator:
    return visit.page.locator(
        f"#admin-{table} tbody tr", has=visit.page.get_by_role("rowheader", name=name, exact=True)
    )


def shows(found: Locator, *texts: str) -> None:
    for text in texts:
        expect(found).to_contain_text(text, timeout=PATIENCE_MS)


def test_whoever_is_no_admin_is_offered_nothing(visit: Visit) -> None:
    assert not visit.page.locator("#admin-open").is_visible()


def test_endpoints_are_seen_with_their_queues_and_commanded(admin: Visit, own_host: Host) -> None:
    waiting = [own_host.submit(model="still", num_inference_steps=50) for _ in range(3)]
    own_host.wait_until(waiting[0], "running")
    cells = row(admin, "endpoints", "still").locator("td")
    expect(cells.nth(2)).to_have_text("1", timeout=PATIENCE_MS)
    expect(cells.nth(3)).to_have_text("2", timeout=PATIENCE_MS)
    for request_id in waiting:
        own_host.client.delete(f"/dedicated/v1/requests/{request_id}")
    own_host.post(n=8)
    rates = row(admin, "endpoints", "one").locator("td")
    expect(rates.nth(5)).to_have_text(re.compile("[1-9]"), timeout=PATIENCE_MS)  # pictures a minute
    admin.page.get_by_role("button", name="Sleep one").click()
    shows(row(admin, "endpoints", "one"), "SLEEPING", "0/0")
    admin.page.get_by_role("button", name="Wake one").click()
    shows(row(admin, "endpoints", "one"), "RUNNING", "1/1")
    admin.page.click("#admin-open")
    assert admin.page.locator("#prompt").is_visible()
    assert not admin.page.locator("#admin").is_visible()


def test_the_machines_of_workers_are_named(admin: Visit) -> None:
    shows(row(admin, "endpoints", "away"), "2/2 (2 on 10.0.0.7)")


def test_adapters_are_added_and_removed(admin: Visit, own_host: Host, tmp_path: Path) -> None:
    file = write(tmp_path / "ink.safetensors")
    admin.page.fill("#new-route", "ink")
    admin.page.fill("#new-source", str(tmp_path / "missing.safetensors"))
    admin.page.click("#adapter-form button")
    admin.see("#admin-error")
    admin.page.fill("#new-source", str(file))
    admin.page.fill("#new-scale", "0.8")
    admin.page.click("#adapter-form button")
    shows(row(admin, "adapters", "one:ink"), "0.8", "ready")
    assert not admin.page.locator("#admin-error").is_visible()
    admin.page.once("dialog", lambda dialog: dialog.accept())
    admin.page.get_by_role("button", name="Remove one:ink").click()
    expect(row(admin, "adapters", "one:ink")).to_have_count(0, timeout=PATIENCE_MS)


def test_an_adapters_file_is_uploaded(admin: Visit, tmp_path: Path) -> None:
    file = write(tmp_path / "wash.safetensors")
    admin.page.fill("#new-route", "wash")
    admin.page.click("#adapter-form button")
    admin.hear("Name a source, or choose a file.", selector="#admin-error")
    admin.page.set_input_files("#new-file", file)
    admin.page.click("#adapter-form button")
    shows(row(admin, "adapters", "one:wash"), "upload of wash.safetensors", "ready")


def test_keys_are_made_and_revoked(admin: Visit, own_host: Host, browser: Browser) -> None:
    admin.page.fill("#new-key-name", "website")
    admin.page.click("#new-key-form button")
    admin.hear("is shown this once", selector="#new-key")
    secret = admin.text("#new-key").partition(" ")[0]
    open_page(browser, own_host, secret).page.context.close()
    shows(row(admin, "keys", "website"), "every endpoint")
    assert row(admin, "keys", "first").locator("button").count() == 0, "not the key that asks"
    admin.page.once("dialog", lambda dialog: dialog.accept())
    admin.page.get_by_role("button", name="Revoke website").click()
    expect(row(admin, "keys", "website")).to_have_count(0, timeout=PATIENCE_MS)


def test_the_page_has_no_serious_accessibility_fault(admin: Visit, axe_source: str) -> None:
    admin.page.evaluate(axe_source)
    assert check(admin) == []


def test_an_admins_page_asks_for_no_more_than_it_shows(browser: Browser, own_host: Host) -> None:
    visit = open_page(browser, own_host, new_key(own_host))
    visit.make("an owl")
    assert not any("/beta/" in url or url.endswith("/metrics") for url in visit.requests)
    visit.page.context.close()
