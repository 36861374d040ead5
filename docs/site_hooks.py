"""Hooks of the documentation site: pages that lie outside docs/, and links between them.

The Markdown files link to each other as they lie in the repository, so that they can be read there too.
A link to a file that is no page of the site becomes plain text here. A link to nothing stops the build.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mezzotint.config import Settings
from mezzotint.server.api.reference import operations
from mezzotint.server.app import create_app

ROOT = Path(__file__).parents[1]
_PLAYGROUND = "src/mezzotint/server/api/playground/page"
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "src/mezzotint/models/emoji/README.md": "model-card.md",
    "src/mezzotint/models/emoji/sheet.png": "images/sheet.png",
    f"{_PLAYGROUND}/icon.svg": "assets/icon.svg",
    f"{_PLAYGROUND}/garamond.woff2": "assets/garamond.woff2",
    f"{_PLAYGROUND}/garamond-italic.woff2": "assets/garamond-italic.woff2",
}
"""Path in the repository -> path in the site."""
_ADDRESSES = """---
hide: [navigation]
---

# Every address and field

This page has what `/docs` shows on a running server, where the examples name that server. `/openapi.json`
has the same for programs. [The HTTP interface](http.md) says how the addresses are used. The examples take
the key from `MEZZOTINT_API_KEY` and ask the endpoint `emoji`."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files from elsewhere, and the page of all addresses."""
    for source, place in ELSEWHERE.items():
        if source != "README.md":
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "addresses.md", content=addresses()))
    return files


def addresses() -> str:
    """The parts of the page `/docs`, under headings of Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        made = create_app(Settings(data_dir=Path(folder))).openapi()
    parts, tag = [_ADDRESSES], ""
    for one in operations(made, "http://127.0.0.1:8000"):
        if one.tag != tag:
            tag = one.tag
            parts.append(f"## {tag}")
        parts.append(f"### {one.method} {one.path} {{#{one.anchor}}}")
        parts.append(f"{one.summary}.")
        parts.append(f'<div class="reference">{one.body}</div>')
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    source = page.file.abs_src_path
    if source is None or not source.startswith(str(ROOT)):
        return markdown
    folder = os.path.dirname(os.path.relpath(source, ROOT))

    def turned(found: re.Match[str]) -> str:
        picture, text, target, anchor = found.groups()
        if "://" in target:
            return found.group()
        there = os.path.normpath(os.path.join(folder, target))
        place = ELSEWHERE.get(there) or (there.removeprefix("docs/") if there.startswith("docs/") else None)
        if place:
            here = os.path.dirname(page.file.src_uri)
            return f"{picture}[{text}]({os.path.relpath(place, here or '.')}{anchor or ''})"
        if not (ROOT / there).exists():
            raise PluginError(f"{page.file.src_uri}: {target} leads to nothing")
        return text

    return _LINK.sub(turned, markdown)
