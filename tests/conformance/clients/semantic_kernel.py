"""Semantic Kernel's OpenAI text to image service."""

from __future__ import annotations

import asyncio
import io
from typing import Any

from openai import AsyncOpenAI
from semantic_kernel.connectors.ai.open_ai import OpenAITextToImage, OpenAITextToImageExecutionSettings

from tests.conformance.clients.target import (
    PROMPT,
    Server,
    check_outside,
    file_of,
    hole,
    picture,
    red_square,
    run,
)


def service(server: Server, model: str = "") -> Any:
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key)
    return OpenAITextToImage(ai_model_id=model or server.model, async_client=client)


def read(server: Server, made: str) -> Any:
    """The service gives a URL where there is one, else base64."""
    return picture(server.fetch(made) if made.startswith("http") else made)


def own_defaults(server: Server) -> None:
    for model in ("", "dall-e-3", "gpt-image-1"):
        [made] = asyncio.run(service(server, model).generate_images(PROMPT))
        assert read(server, made).size == server.image.size
    settings = OpenAITextToImageExecutionSettings(n=2, quality="high", width=1024, height=1024)
    made = asyncio.run(service(server).generate_images(PROMPT, settings=settings))
    assert [read(server, one).size for one in made] == [server.image.size] * 2


def edits(server: Server) -> None:
    def edit(prompt: str, **arguments: Any) -> Any:
        files = [io.BytesIO(file_of(red_square()))]
        files[0].name = "red.png"
        [made] = asyncio.run(service(server).edit_image(prompt, image_files=files, **arguments))
        return read(server, made)

    assert edit(PROMPT).tobytes() != red_square().tobytes()
    mask = io.BytesIO(file_of(hole("RGBA")))
    mask.name = "mask.png"
    check_outside(edit("a cat", mask_file=mask))


if __name__ == "__main__":
    run(
        [
            ("generate_images with its own defaults; `dall-e-3`, `gpt-image-1`", own_defaults),
            ("edit_image: picture, mask; it has no field for strength", edits),
        ]
    )
