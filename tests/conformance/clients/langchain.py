"""LangChain's wrapper of OpenAI's images, and its tool."""

from __future__ import annotations

from typing import Any

from langchain_community.tools.openai_dalle_image_generation import OpenAIDALLEImageGenerationTool
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

from tests.conformance.clients.target import PROMPT, Server, picture, run


def wrapper(server: Server, **arguments: Any) -> Any:
    return DallEAPIWrapper(base_url=f"{server.url}/v1", api_key=server.key, **arguments)


def own_defaults(server: Server) -> None:
    """dall-e-2 at 1024x1024; it reads the URL."""
    assert picture(server.fetch(wrapper(server).run(PROMPT))).size == server.image.size
    several = wrapper(server, n=2, model="dall-e-3", quality="hd").run(PROMPT).split("\n")
    assert len([picture(server.fetch(url)) for url in several]) == 2


def named(server: Server) -> None:
    tool = OpenAIDALLEImageGenerationTool(api_wrapper=wrapper(server, model=server.model, size="auto"))
    assert picture(server.fetch(tool.invoke(PROMPT))).size == server.image.size


def errors(server: Server) -> None:
    said = ""
    try:
        wrapper(server, model="nothing").run(PROMPT)
    except Exception as error:  # it lets OpenAI's client's through
        said = str(error)
    assert "there is no endpoint" in said, said or "accepted"


if __name__ == "__main__":
    run(
        [
            ("its own defaults: `dall-e-2`, 1024x1024, url", own_defaults),
            ("as an agent's tool", named),
            ("errors in the server's words", errors),
        ]
    )
