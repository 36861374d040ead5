"""The documentation site: it builds without a warning, holds every page, and loads nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.site import ROOT, build

FOREIGN = r"""["'(\s=](?:https?:)?//"""
LOADS = re.compile(
    rf"<(?:script|img|iframe|source|video|audio|embed|object|input|use|image)\b[^>]*{FOREIGN}"
    rf"|<link\b[^>]*{FOREIGN}"
    rf"|(?:url\(|@import\s*)\s*[\"']?(?:https?:)?//",
    re.IGNORECASE,
)
"""Whatever makes a browser fetch something from another host without a click."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("site"))


def test_every_page_of_the_folder_is_on_the_site(site: Path) -> None:
    built = {page.stem for page in site.glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= built
    assert {"contributing", "changelog", "model-card"} <= built


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://example.org/a.js"></script>',
        "<link rel='stylesheet' href=//example.org/a.css>",
        '<img alt="a" src="http://example.org/a.png">',
        "p { background: url(https://example.org/a.png) }",
        '@import "https://example.org/a.css";',
    ],
)
def test_a_load_from_elsewhere_would_be_found(text: str) -> None:
    assert LOADS.search(text)


def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    files = [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]
    assert len(files) > 20
    found = {file.name: LOADS.findall(file.read_text(encoding="utf-8")) for file in files}
    assert {name: loads for name, loads in found.items() if loads} == {}


def test_no_page_wakes_the_parts_of_the_theme_that_ask_other_hosts(site: Path) -> None:
    """Its script fetches a program for drawings (`mermaid`) and figures of a public repository (`source`)."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'class="mermaid"' not in text, page.name
        assert 'data-md-component="source"' not in text, page.name


def test_links_between_files_of_the_repository_become_links_between_pages(site: Path) -> None:
    assert 'href="model-card.html#adapters"' in (site / "adapters.html").read_text()
    assert 'href="decisions.html"' in (site / "contributing.html").read_text()
    assert "../deploy" not in (site / "deployment.html").read_text()
