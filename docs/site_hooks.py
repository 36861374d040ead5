"""Hooks of the documentation site: pages that lie outside docs/, and links between them.

The Markdown files link to each other as they lie in the repository, so that they can be read there too.
A link to a file that is no page of the site becomes plain text here. A link to nothing stops the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

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
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files from elsewhere."""
    for source, place in ELSEWHERE.items():
        if source != "README.md":
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


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
