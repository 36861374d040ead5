"""Together's client."""

from __future__ import annotations

import base64
from typing import Any

from together import Together

from tests.conformance.clients.target import PROMPT, SEED, STEPS, TIMEOUT_S, Server, picture, run


def client(server: Server) -> Any:
    return Together(api_key=server.key, base_url=server.url, timeout=TIMEOUT_S)


def generate(server: Server) -> None:
    width, height = server.image.size
    made = client(server).images.generate(
        model=server.model,
        prompt=PROMPT,
        steps=STEPS,
        seed=SEED,
        width=width,
        height=height,
        response_format="base64",
        output_format="png",
    )
    assert base64.b64decode(made.data[0].b64_json) == server.png
    linked = client(server).images.generate(
        model=server.model, prompt=PROMPT, steps=STEPS, seed=SEED, response_format="url"
    )
    assert server.fetch(linked.data[0].url) == server.png


def own_defaults(server: Server) -> None:
    made = client(server).images.generate(model=server.model, prompt=PROMPT)
    assert picture(server.fetch(made.data[0].url)).size == server.image.size


def documented_fields(server: Server) -> None:
    """What its document names besides, as far as it is a value that needs no other model."""
    made = client(server).images.generate(
        model=server.model,
        prompt=PROMPT,
        n=1,
        guidance_scale=4.0,
        negative_prompt="text",
        disable_safety_checker=True,
        output_format="jpeg",
        response_format="base64",
    )
    assert picture(made.data[0].b64_json).size == server.image.size


if __name__ == "__main__":
    run(
        [
            ("width, height, steps, seed; base64 and url", generate),
            ("its own defaults", own_defaults),
            ("its documented fields", documented_fields),
        ]
    )
