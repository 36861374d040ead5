"""LlamaIndex's tool for OpenAI's images."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from llama_index.tools.openai.image_generation.base import OpenAIImageGenerationToolSpec
from PIL import Image

from tests.conformance.clients.target import PROMPT, Server, picture, run


def tool(server: Server, folder: str | None = None) -> Any:
    """The tool has no argument for the address, but OpenAI's client below it reads this variable."""
    os.environ["OPENAI_BASE_URL"] = f"{server.url}/v1"
    return OpenAIImageGenerationToolSpec(api_key=server.key, cache_dir=folder)


def own_defaults(server: Server) -> None:
    """dall-e-3, 1024x1024, standard, vivid, a URL."""
    url = tool(server).image_generation(PROMPT)
    assert picture(server.fetch(url)).size == server.image.size
    [function] = tool(server).to_tool_list()
    assert picture(server.fetch(function.call(PROMPT).raw_output)).size == server.image.size


def download(server: Server) -> None:
    with tempfile.TemporaryDirectory() as folder:
        [file] = tool(server, folder).image_generation(PROMPT, download=True, size="1792x1024", quality="hd")
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert image.width


if __name__ == "__main__":
    run(
        [
            ("its own defaults: `dall-e-3`, 1024x1024, url", own_defaults),
            ("download to a file", download),
        ]
    )
