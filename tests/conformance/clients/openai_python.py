"""OpenAI's Python client."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import openai

from tests.conformance.clients.target import (
    LITTLE,
    PROMPT,
    SEED,
    STEPS,
    TIMEOUT_S,
    Server,
    check_nearly_red,
    check_outside,
    file_of,
    hole,
    picture,
    red_square,
    run,
)


def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, timeout=TIMEOUT_S, max_retries=0)


def generate(server: Server) -> None:
    extra = {"seed": SEED, "num_inference_steps": STEPS}
    made = client(server).images.generate(
        model=server.model, prompt=PROMPT, response_format="b64_json", extra_body=extra
    )
    assert base64.b64decode(made.data[0].b64_json) == server.png
    linked = client(server).images.generate(model=server.model, prompt=PROMPT, n=2, extra_body=extra)
    assert server.fetch(linked.data[0].url) == server.png
    assert [item.seed for item in linked.data] == [SEED, SEED + 1]
    assert server.model in [model.id for model in client(server).models.list()]


def own_defaults(server: Server) -> None:
    """A prompt alone, and then what OpenAI's own examples send."""
    made = client(server).images.generate(model=server.model, prompt=PROMPT)
    assert picture(made.data[0].b64_json).size == server.image.size
    example = client(server).images.generate(
        model="gpt-image-1",
        prompt=PROMPT,
        size="1024x1024",
        quality="high",
        background="auto",
        output_format="webp",
        output_compression=50,
        moderation="low",
        n=2,
    )
    assert [picture(item.b64_json).mode for item in example.data] == ["RGB", "RGB"]


def generate_async(server: Server) -> None:
    async def main() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key) as ai:
            extra = {"seed": SEED, "steps": STEPS}
            return await ai.images.generate(
                model=server.model, prompt=PROMPT, response_format="b64_json", extra_body=extra
            )

    assert base64.b64decode(asyncio.run(main()).data[0].b64_json) == server.png


def stream(server: Server) -> None:
    extra = {"seed": SEED, "steps": STEPS}
    events = list(
        client(server).images.generate(
            model=server.model, prompt=PROMPT, stream=True, partial_images=2, extra_body=extra
        )
    )
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"], kinds
    for event in events:
        width, height = picture(event.b64_json).size
        assert width * server.image.height == height * server.image.width  # previews may be smaller
    assert base64.b64decode(events[-1].b64_json) == server.png
    assert events[-1].usage.output_tokens == STEPS


def errors(server: Server) -> None:
    for wrong, kind, words in (
        ({"model": server.model[:-1]}, openai.NotFoundError, "did you mean"),
        ({"model": server.model, "n": 11}, openai.BadRequestError, "between 1 and 10"),
        ({"model": server.model, "size": "big"}, openai.BadRequestError, "WIDTHxHEIGHT"),
    ):
        said = ""
        try:
            client(server).images.generate(prompt=PROMPT, **wrong)
        except kind as error:
            said = str(error)
        assert words in said, f"{wrong}: {said or 'accepted'}"


def edits(server: Server) -> None:
    ai, red = client(server), file_of(red_square())
    plain = ai.images.edit(model=server.model, image=red, prompt=PROMPT)
    assert picture(plain.data[0].b64_json).tobytes() != red_square().tobytes()
    little = ai.images.edit(
        model="gpt-image-1",
        image=red,
        prompt=PROMPT,
        size="1024x1024",
        quality="high",
        input_fidelity="high",
        extra_body={"strength": LITTLE},
    )
    check_nearly_red(picture(little.data[0].b64_json))
    little = ai.images.edit(model=server.model, image=red, prompt=PROMPT, extra_body={"strength": LITTLE})
    check_nearly_red(picture(little.data[0].b64_json))
    masked = ai.images.edit(model=server.model, image=red, mask=file_of(hole("RGBA")), prompt="a cat")
    check_outside(picture(masked.data[0].b64_json))
    streamed = ai.images.edit(model=server.model, image=[red], prompt=PROMPT, stream=True, partial_images=1)
    assert [event.type for event in streamed][-1] == "image_edit.completed"


def variation(server: Server) -> None:
    code = ""
    try:
        client(server).images.create_variation(image=file_of(red_square()))
    except openai.BadRequestError as error:
        code = str(error.code)
    assert code == "not_supported"


if __name__ == "__main__":
    run(
        [
            ("base64, url, n, models", generate),
            ("its own defaults: only a prompt; `gpt-image-1`, 1024x1024, webp", own_defaults),
            ("async", generate_async),
            ("stream with partial images", stream),
            ("errors in the server's words", errors),
            ("edits: picture, strength, mask, stream", edits),
            ("a variation is refused in words", variation),
        ]
    )
