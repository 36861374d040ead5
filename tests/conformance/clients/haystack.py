"""Haystack's image generator, alone and in a pipeline."""

from __future__ import annotations

import asyncio
from typing import Any

from haystack import Pipeline
from haystack.components.builders import PromptBuilder
from haystack.components.generators import OpenAIImageGenerator
from haystack.utils import Secret

from tests.conformance.clients.target import PROMPT, Server, picture, run


def generator(server: Server, **arguments: Any) -> Any:
    key = Secret.from_token(server.key)
    return OpenAIImageGenerator(api_key=key, api_base_url=f"{server.url}/v1", **arguments)


def own_defaults(server: Server) -> None:
    """gpt-image-2 at 1024x1024, which it also names to other servers."""
    made = generator(server).run(PROMPT)
    assert picture(made["images"][0]).size == server.image.size
    made = asyncio.run(generator(server, model=server.model).run_async(PROMPT))
    assert picture(made["images"][0]).size == server.image.size


def pipeline(server: Server) -> None:
    both = Pipeline()
    both.add_component("words", PromptBuilder("a {{thing}} on a teal background", required_variables="*"))
    both.add_component("drawing", generator(server, model=server.model, size="auto", quality="high"))
    both.connect("words", "drawing.prompt")
    made = both.run({"words": {"thing": "red apple"}})
    assert picture(made["drawing"]["images"][0]).size == server.image.size


def errors(server: Server) -> None:
    said = ""
    try:
        generator(server, model="nothing").run(PROMPT)
    except Exception as error:  # it lets OpenAI's client's through
        said = str(error)
    assert "there is no endpoint" in said, said or "accepted"


if __name__ == "__main__":
    run(
        [
            ("its own defaults, sync and async: `gpt-image-2`, 1024x1024", own_defaults),
            ("in a pipeline", pipeline),
            ("errors in the server's words", errors),
        ]
    )
