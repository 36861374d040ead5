"""LiteLLM, which many programs ask for pictures through."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from litellm import aimage_edit, aimage_generation, image_edit, image_generation

from tests.conformance.clients.target import (
    LITTLE,
    PROMPT,
    SEED,
    STEPS,
    Server,
    check_nearly_red,
    check_outside,
    file_of,
    hole,
    picture,
    red_square,
    run,
)


def where(server: Server, model: str = "") -> dict[str, Any]:
    """How LiteLLM names a server that speaks OpenAI's language."""
    return {
        "model": f"openai/{model or server.model}",
        "api_base": f"{server.url}/v1",
        "api_key": server.key,
    }


def generate(server: Server) -> None:
    extra = {"num_inference_steps": STEPS, "seed": SEED}
    made = image_generation(prompt=PROMPT, extra_body=extra, **where(server))
    assert base64.b64decode(made.data[0].b64_json) == server.png


def own_defaults(server: Server) -> None:
    made = image_generation(prompt=PROMPT, **where(server))
    assert picture(server.fetch(made.data[0].url)).size == server.image.size
    made = image_generation(prompt=PROMPT, size="1024x1024", quality="hd", n=2, **where(server, "dall-e-3"))
    assert len(made.data) == 2
    made = asyncio.run(aimage_generation(prompt=PROMPT, quality="high", **where(server, "gpt-image-1")))
    assert picture(made.data[0].b64_json).size == server.image.size


def errors(server: Server) -> None:
    said = ""
    try:
        image_generation(prompt=PROMPT, n=11, **where(server))
    except Exception as error:  # LiteLLM has classes of its own
        said = str(error)
    assert "between 1 and 10" in said, said or "accepted"


def edits(server: Server) -> None:
    red = file_of(red_square())
    plain = image_edit(image=red, prompt=PROMPT, **where(server))
    assert picture(plain.data[0].b64_json).tobytes() != red_square().tobytes()
    little = image_edit(image=[red], prompt=PROMPT, extra_body={"strength": LITTLE}, **where(server))
    check_nearly_red(picture(little.data[0].b64_json))
    masked = image_edit(image=red, mask=file_of(hole("RGBA")), prompt="a cat", **where(server))
    check_outside(picture(masked.data[0].b64_json))
    made = asyncio.run(aimage_edit(image=red, prompt=PROMPT, size="1024x1024", **where(server)))
    assert picture(made.data[0].b64_json).size == server.image.size


if __name__ == "__main__":
    run(
        [
            ("image_generation", generate),
            ("its own defaults, sync and async; `dall-e-3`, `gpt-image-1`", own_defaults),
            ("errors in the server's words", errors),
            ("image_edit: picture, strength, mask, async", edits),
        ]
    )
