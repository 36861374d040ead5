"""Friendli's client: the dedicated and the container form, generations and edits."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from friendli import AsyncFriendli, SyncFriendli
from friendli.core.models import DedicatedImageGenerateSuccess
from PIL import Image

from tests.conformance.clients.target import (
    LITTLE,
    PROMPT,
    SEED,
    STEPS,
    TIMEOUT_S,
    Server,
    check_nearly_red,
    near,
    picture,
    red_square,
    run,
    text_of,
)

FORMATS = ("url", "png", "jpeg", "jpg", "raw")
PATIENT: dict[str, Any] = {"timeout_ms": TIMEOUT_S * 1000}


def client(server: Server) -> Any:
    return SyncFriendli(token=server.key, server_url=server.url)


def dedicated(server: Server) -> None:
    with client(server) as friendli:
        for form in FORMATS:
            made = friendli.dedicated.image.generate(
                model=server.model,
                prompt=PROMPT,
                num_inference_steps=STEPS,
                seed=SEED,
                response_format=form,
                **PATIENT,
            )
            assert isinstance(made, DedicatedImageGenerateSuccess)
            item = made.data[0]
            assert (item.seed, item.response_format) == (SEED, form)
            check_format(server, form, item)
        drawn = friendli.dedicated.image.generate(
            model=server.model, prompt=PROMPT, num_inference_steps=1, seed=None, **PATIENT
        )
        assert isinstance(drawn.data[0].seed, int)


def check_format(server: Server, form: str, item: Any) -> None:
    data = server.fetch(item.url) if form == "url" else base64.b64decode(item.b64_json)
    if form in ("url", "png"):
        assert data == server.png
    elif form == "raw":
        assert data == server.image.tobytes()
    else:
        assert near(picture(data), server.image)


def own_defaults(server: Server) -> None:
    """No steps, no format and no patience: the client gives up after 5 s and asks again by itself."""
    with client(server) as friendli:
        made = friendli.dedicated.image.generate(model=server.model, prompt=PROMPT)
        assert picture(server.fetch(made.data[0].url)).size == server.image.size

    async def main() -> Any:
        async with AsyncFriendli(token=server.key, server_url=server.url) as friendli:
            return await friendli.dedicated.image.generate(model=server.model, prompt=PROMPT)

    assert picture(server.fetch(asyncio.run(main()).data[0].url)).size == server.image.size


def container(server: Server) -> None:
    with client(server) as friendli:
        for form in ("raw", "jpeg"):
            made = friendli.container.image.generate(
                prompt=PROMPT,
                num_inference_steps=STEPS,
                guidance_scale=4.0,
                seed=SEED,
                response_format=form,
                server_url=server.url,
                **PATIENT,
            )
            data, size = base64.b64decode(made.image), server.image.size
            image = Image.frombytes("RGB", size, data) if form == "raw" else picture(data)
            assert image.size == size
        made = friendli.container.image.generate(prompt=PROMPT, server_url=server.url, **PATIENT)
        assert picture(base64.b64decode(made.image)).size == server.image.size


def edits(server: Server) -> None:
    data = text_of(red_square())
    arguments: dict[str, Any] = {
        "model": server.model,
        "prompt": PROMPT,
        "image": {"image": data},
        **PATIENT,
    }
    with client(server) as friendli:
        made = friendli.dedicated.image.edit(**arguments)  # with the client's own defaults: 20 steps, url
        assert isinstance(made, DedicatedImageGenerateSuccess)
        drawn = picture(server.fetch(made.data[0].url))
        assert drawn.tobytes() != red_square().tobytes()
        again = friendli.dedicated.image.edit(**arguments, seed=made.data[0].seed, response_format="raw")
        assert base64.b64decode(again.data[0].b64_json) == drawn.tobytes()

    async def main() -> Any:
        async with AsyncFriendli(token=server.key, server_url=server.url) as friendli:
            listed = arguments | {"image": [{"image": f"data:image/png;base64,{data}"}]}
            return await friendli.dedicated.image.edit(
                **listed, seed=made.data[0].seed, response_format="png"
            )

    assert picture(base64.b64decode(asyncio.run(main()).data[0].b64_json)).tobytes() == drawn.tobytes()


def little_strength(server: Server) -> None:
    """The client has no field for it, so the body that it would send has one more."""
    body: dict[str, Any] = {"model": server.model, "prompt": PROMPT}
    body |= {"image": {"image": text_of(red_square())}}
    body |= {"num_inference_steps": 20, "strength": LITTLE, "response_format": "png", "seed": SEED}
    made = server.post("/dedicated/v1/images/edits", body)
    check_nearly_red(picture(made["data"][0]["b64_json"]))


def container_edits(server: Server) -> None:
    with client(server) as friendli:
        made = friendli.container.image.edit(
            prompt=PROMPT, image={"image": text_of(red_square())}, server_url=server.url, **PATIENT
        )
        assert picture(base64.b64decode(made.image)).size == (128, 128)


def control_images(server: Server) -> None:
    """An endpoint without ControlNets says so."""
    said = ""
    with client(server) as friendli:
        try:
            friendli.dedicated.image.generate(
                model=server.model,
                prompt=PROMPT,
                control_images=[{"image": text_of(red_square())}],
                controlnet_weights=[0.5],
                **PATIENT,
            )
        except Exception as error:  # which class it is belongs to the client
            said = f"{error} {getattr(error, 'body', '')}"
    assert "not_supported" in said, said or "accepted"
    assert "control_images" in said


if __name__ == "__main__":
    run(
        [
            ("dedicated: url, png, jpeg, jpg, raw; null seed", dedicated),
            ("dedicated with its own defaults, sync and async", own_defaults),
            ("container: raw, jpeg, its own defaults", container),
            ("dedicated edits, sync and async", edits),
            ("a little strength leaves a red square red", little_strength),
            ("container edits", container_edits),
            ("`control_images` without a ControlNet are refused in words", control_images),
        ]
    )
