"""pydantic-ai's image generation."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic_ai import BinaryImage
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.images.openai import OpenAIImageGenerationModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.conformance.clients.target import (
    LITTLE,
    PROMPT,
    SEED,
    STEPS,
    Server,
    check_nearly_red,
    file_of,
    picture,
    red_square,
    run,
)


def made(server: Server, name: str = "", **arguments: Any) -> list[Any]:
    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key=server.key)
    model = OpenAIImageGenerationModel(name or server.model, provider=provider)
    return [image.content for image in asyncio.run(model.generate(PROMPT, **arguments)).images]


def generate(server: Server) -> None:
    extra = {"num_inference_steps": STEPS, "seed": SEED}
    [image] = made(server, settings={"extra_body": extra})
    assert image.data == server.png
    assert image.media_type == "image/png"


def own_defaults(server: Server) -> None:
    for name in ("", "gpt-image-2"):
        [image] = made(server, name)
        assert picture(image.data).size == server.image.size
    settings = {"openai_n": 2, "openai_size": "1024x1536", "openai_output_format": "webp"}
    images = made(server, "gpt-image-1", settings=settings | {"openai_quality": "high"})
    assert [image.media_type for image in images] == ["image/webp"] * 2


def errors(server: Server) -> None:
    said = ""
    try:
        made(server, settings={"openai_size": "big"})
    except ModelHTTPError as error:
        said = str(error)
    assert "WIDTHxHEIGHT" in said, said or "accepted"


def edits(server: Server) -> None:
    red = BinaryImage(file_of(red_square()), media_type="image/png")
    [image] = made(server, images=[red])
    assert picture(image.data).tobytes() != red_square().tobytes()
    [image] = made(server, images=[red], settings={"extra_body": {"strength": LITTLE}})
    check_nearly_red(picture(image.data))


if __name__ == "__main__":
    run(
        [
            ("generate", generate),
            ("its own defaults; `gpt-image-2`, webp", own_defaults),
            ("errors in the server's words", errors),
            ("edits: `images`, strength", edits),
        ]
    )
