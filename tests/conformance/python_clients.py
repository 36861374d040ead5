"""Real Python clients against a running server; prints one JSON line for each check.

python python_clients.py URL KEY MODEL       (run by scripts/conformance in an environment of its own)
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import httpx
import openai
import webuiapi
from friendli import AsyncFriendli, SyncFriendli
from friendli.core.models import DedicatedImageGenerateSuccess
from PIL import Image
from together import Together

PROMPT = "a red apple on a teal background"
STEPS = 4
SEED = 7
TIMEOUT_S = 120
FORMATS = ("url", "png", "jpeg", "jpg", "raw")


class Server:
    """Where the server is, and the picture that PROMPT, STEPS and SEED must give."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self.url, self.key, self.model = url, key, model
        self.http = httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=TIMEOUT_S)
        body = {"model": model, "prompt": PROMPT, "num_inference_steps": STEPS, "seed": SEED}
        answer = self.http.post("/dedicated/v1/images/generations", json=body | {"response_format": "png"})
        answer.raise_for_status()
        self.png = base64.b64decode(answer.json()["data"][0]["b64_json"])
        self.image = picture(self.png)

    def fetch(self, url: str) -> bytes:
        answer = httpx.get(url)
        answer.raise_for_status()
        return bytes(answer.content)

    def openai(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, timeout=TIMEOUT_S, max_retries=0)


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def near(one: Image.Image, other: Image.Image) -> bool:
    """The same picture but for what JPEG loses."""
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return one.size == other.size and sum(abs(a - b) for a, b in pairs) / len(one.tobytes()) < 12


# ---------------------------------------------------------------- openai


def openai_sync(server: Server) -> None:
    client = server.openai()
    extra = {"seed": SEED, "num_inference_steps": STEPS}
    made = client.images.generate(
        model=server.model, prompt=PROMPT, response_format="b64_json", extra_body=extra
    )
    assert base64.b64decode(made.data[0].b64_json) == server.png
    linked = client.images.generate(model=server.model, prompt=PROMPT, n=2, extra_body=extra)
    assert server.fetch(linked.data[0].url) == server.png
    assert [item.seed for item in linked.data] == [SEED, SEED + 1]
    assert server.model in [model.id for model in client.models.list()]


def openai_async(server: Server) -> None:
    async def main() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=server.key) as client:
            extra = {"seed": SEED, "steps": STEPS}
            return await client.images.generate(
                model=server.model, prompt=PROMPT, response_format="b64_json", extra_body=extra
            )

    assert base64.b64decode(asyncio.run(main()).data[0].b64_json) == server.png


def openai_stream(server: Server) -> None:
    events = list(
        server.openai().images.generate(
            model=server.model,
            prompt=PROMPT,
            stream=True,
            partial_images=2,
            extra_body={"seed": SEED, "steps": STEPS},
        )
    )
    kinds = [event.type.rpartition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"], kinds
    for event in events:
        width, height = picture(base64.b64decode(event.b64_json)).size
        assert width * server.image.height == height * server.image.width  # previews may be smaller
    assert base64.b64decode(events[-1].b64_json) == server.png
    assert events[-1].usage.output_tokens == STEPS


def openai_errors(server: Server) -> None:
    client = server.openai()
    for wrong, kind, words in (
        ({"model": server.model[:-1]}, openai.NotFoundError, "did you mean"),
        (
            {"model": server.model, "extra_body": {"steps": 99}},
            openai.UnprocessableEntityError,
            "between 1 and 50",
        ),
    ):
        said = ""
        try:
            client.images.generate(prompt=PROMPT, **wrong)
        except kind as error:
            said = str(error)
        assert words in said, f"{wrong}: {said or 'accepted'}"


# ---------------------------------------------------------------- friendli and together


def friendli_dedicated(server: Server) -> None:
    with SyncFriendli(token=server.key, server_url=server.url) as client:
        for form in FORMATS:
            made = client.dedicated.image.generate(
                model=server.model,
                prompt=PROMPT,
                num_inference_steps=STEPS,
                seed=SEED,
                response_format=form,
                timeout_ms=TIMEOUT_S * 1000,
            )
            assert isinstance(made, DedicatedImageGenerateSuccess)
            item = made.data[0]
            assert (item.seed, item.response_format) == (SEED, form)
            check_format(server, form, item)
        drawn = client.dedicated.image.generate(
            model=server.model, prompt=PROMPT, num_inference_steps=1, seed=None, timeout_ms=TIMEOUT_S * 1000
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


def friendli_container(server: Server) -> None:
    with SyncFriendli(token=server.key, server_url=server.url) as client:
        for form in ("raw", "jpeg"):
            made = client.container.image.generate(
                prompt=PROMPT,
                num_inference_steps=STEPS,
                guidance_scale=4.0,
                seed=SEED,
                response_format=form,
                server_url=server.url,
                timeout_ms=TIMEOUT_S * 1000,
            )
            data = base64.b64decode(made.image)
            size = server.image.size
            image = Image.frombytes("RGB", size, data) if form == "raw" else picture(data)
            assert image.size == size


def together_images(server: Server) -> None:
    client = Together(api_key=server.key, base_url=server.url, timeout=TIMEOUT_S)
    width, height = server.image.size
    made = client.images.generate(
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
    linked = client.images.generate(
        model=server.model, prompt=PROMPT, steps=STEPS, seed=SEED, response_format="url"
    )
    assert server.fetch(linked.data[0].url) == server.png


# ---------------------------------------------------------------- web user interfaces


def web_ui_api(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    api = webuiapi.WebUIApi(host=host, port=int(port), username="anyone", password=server.key)
    width, height = server.image.size
    api.util_set_model(server.model)
    assert api.util_get_current_model() == server.model
    made = api.txt2img(prompt=PROMPT, steps=STEPS, seed=SEED, cfg_scale=4, width=width, height=height)
    assert made.image.size == server.image.size
    assert made.info["seed"] == SEED
    assert made.info["infotexts"][0].startswith(PROMPT)
    again = api.txt2img(prompt=PROMPT, steps=STEPS, seed=SEED, cfg_scale=4, width=width, height=height)
    assert again.image.tobytes() == made.image.tobytes()
    assert api.get_progress()["state"]["job_count"] == 0
    assert api.interrupt() == {}
    assert api.get_loras() is not None
    assert api.util_get_sampler_names()
    assert api.util_get_scheduler_names()
    assert PROMPT in api.png_info(made.image).info


def open_web_ui(server: Server) -> None:
    """The requests of Open WebUI's two engines, sent as it sends them."""
    body = {"model": server.model, "prompt": PROMPT, "n": 1, "size": size_of(server)}
    made = server.http.post("/v1/images/generations", json=body | {"response_format": "b64_json"})
    assert picture(base64.b64decode(made.json()["data"][0]["b64_json"])).size == server.image.size
    basic = httpx.Client(base_url=server.url, auth=("anyone", server.key), timeout=TIMEOUT_S)
    assert server.model in [model["title"] for model in basic.get("/sdapi/v1/sd-models").json()]
    options = basic.get("/sdapi/v1/options").json() | {"sd_model_checkpoint": server.model}
    assert basic.post("/sdapi/v1/options", json=options).status_code == 200
    width, height = server.image.size
    data = {"prompt": PROMPT, "batch_size": 1, "width": width, "height": height, "steps": STEPS}
    answer = basic.post("/sdapi/v1/txt2img", json=data).json()
    assert picture(base64.b64decode(answer["images"][0])).size == server.image.size
    json.loads(answer["info"])


def silly_tavern(server: Server) -> None:
    """The requests of SillyTavern's image extension, sent as it sends them."""
    http = httpx.Client(base_url=f"{server.url}/sdapi/v1", auth=("anyone", server.key), timeout=TIMEOUT_S)
    for name in (
        "options",
        "samplers",
        "schedulers",
        "sd-models",
        "upscalers",
        "latent-upscale-modes",
        "sd-vae",
    ):
        assert http.get(f"/{name}").status_code == 200, name
    assert http.post("/options", json={"sd_model_checkpoint": server.model}).status_code == 200
    assert http.get("/progress").json()["progress"] == 0.0
    width, height = server.image.size
    body = {
        "prompt": PROMPT, "negative_prompt": "", "sampler_name": "Euler a", "scheduler": "automatic",
        "steps": STEPS, "cfg_scale": 7, "width": width, "height": height, "restore_faces": False,
        "enable_hr": False, "hr_scale": 1, "denoising_strength": 0.7, "clip_skip": 1, "seed": -1,
        "save_images": True, "send_images": True, "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
    }  # fmt: skip
    assert picture(base64.b64decode(http.post("/txt2img", json=body).json()["images"][0]))


def libre_chat(server: Server) -> None:
    """The requests of LibreChat's Stable Diffusion tool, sent as it sends them."""
    width, height = server.image.size
    body = {"prompt": PROMPT, "negative_prompt": "", "cfg_scale": 4.5, "steps": STEPS}
    body |= {"width": width, "height": height}
    answer = server.http.post("/sdapi/v1/txt2img", json=body).json()
    assert picture(base64.b64decode(answer["images"][0]))
    assert json.loads(answer["info"])["infotexts"][0].startswith(PROMPT)


def size_of(server: Server) -> str:
    width, height = server.image.size
    return f"{width}x{height}"


# ---------------------------------------------------------------- edits


def red_square() -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    image.paste((255, 0, 0), (32, 32, 96, 96))
    return image


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def hole(mode: str) -> Image.Image:
    """The middle: white for `L`, transparent for `RGBA`."""
    image = Image.new(mode, (128, 128), 0 if mode == "L" else (0, 0, 0, 255))
    image.paste(255 if mode == "L" else (0, 0, 0, 0), (40, 40, 88, 88))
    return image


def check_outside(made: Image.Image) -> None:
    """Only the middle differs from the red square."""
    before, after = red_square(), made.copy()
    for image in (before, after):
        image.paste((0, 0, 0), (40, 40, 88, 88))
    assert all(abs(a - b) <= 2 for a, b in zip(before.tobytes(), after.tobytes(), strict=True))
    assert made.tobytes() != red_square().tobytes()


def friendli_edits(server: Server) -> None:
    data = base64.b64encode(file_of(red_square())).decode()
    arguments: dict[str, Any] = {
        "model": server.model, "prompt": PROMPT, "image": {"image": data}, "timeout_ms": TIMEOUT_S * 1000
    }  # fmt: skip
    with SyncFriendli(token=server.key, server_url=server.url) as client:
        made = client.dedicated.image.edit(**arguments)  # with the client's own defaults: 20 steps, url
        assert isinstance(made, DedicatedImageGenerateSuccess)
        drawn = picture(server.fetch(made.data[0].url))
        again = client.dedicated.image.edit(**arguments, seed=made.data[0].seed, response_format="raw")
        assert base64.b64decode(again.data[0].b64_json) == drawn.tobytes()

    async def main() -> Any:
        async with AsyncFriendli(token=server.key, server_url=server.url) as client:
            listed = arguments | {"image": [{"image": f"data:image/png;base64,{data}"}]}
            return await client.dedicated.image.edit(**listed, seed=made.data[0].seed, response_format="png")

    assert picture(base64.b64decode(asyncio.run(main()).data[0].b64_json)).tobytes() == drawn.tobytes()


def openai_edits(server: Server) -> None:
    client, red = server.openai(), file_of(red_square())
    plain = client.images.edit(model=server.model, image=red, prompt=PROMPT)
    assert plain.data[0].b64_json
    masked = client.images.edit(model=server.model, image=red, mask=file_of(hole("RGBA")), prompt="a cat")
    check_outside(picture(base64.b64decode(masked.data[0].b64_json)))
    streamed = client.images.edit(
        model=server.model, image=[red], prompt=PROMPT, stream=True, partial_images=1
    )
    assert [event.type for event in streamed][-1] == "image_edit.completed"
    code = ""
    try:
        client.images.create_variation(image=red)
    except openai.BadRequestError as error:
        code = str(error.code)
    assert code == "not_supported"


def web_ui_edits(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    api = webuiapi.WebUIApi(host=host, port=int(port), username="anyone", password=server.key)
    common = {
        "images": [red_square()],
        "prompt": PROMPT,
        "steps": 20,
        "seed": SEED,
        "width": 128,
        "height": 128,
    }
    little = api.img2img(**common, denoising_strength=0.2)
    assert little.image.size == (128, 128)
    masked = api.img2img(**common, mask_image=hole("L"))
    check_outside(masked.image.convert("RGB"))


CHECKS: tuple[tuple[str, str, str, Callable[[Server], None]], ...] = (
    ("friendli", "friendli", "dedicated: url, png, jpeg, jpg, raw; null seed", friendli_dedicated),
    ("friendli", "friendli", "container: raw, jpeg", friendli_container),
    ("friendli", "friendli", "dedicated edits, sync and async", friendli_edits),
    ("openai (Python)", "openai", "base64, url, n, models", openai_sync),
    ("openai (Python)", "openai", "async", openai_async),
    ("openai (Python)", "openai", "stream with partial images", openai_stream),
    ("openai (Python)", "openai", "errors in the server's words", openai_errors),
    ("openai (Python)", "openai", "edits: picture, mask, stream; a variation is refused", openai_edits),
    ("together", "together", "width, height, steps, seed; base64 and url", together_images),
    ("webuiapi", "webuiapi", "txt2img, options, lists, progress, interrupt, png-info", web_ui_api),
    ("webuiapi", "webuiapi", "img2img with and without a mask", web_ui_edits),
    ("Open WebUI", "", "its requests, both engines", open_web_ui),
    ("SillyTavern", "", "its requests", silly_tavern),
    ("LibreChat", "", "its requests", libre_chat),
)


def main() -> None:
    server = Server(*sys.argv[1:4])
    for client, package, what, check in CHECKS:
        line = {"client": client, "version": version(package) if package else "", "check": what, "fault": ""}
        try:
            check(server)
        except Exception:  # whatever a client raises is what the table must say
            line["fault"] = traceback.format_exc()
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
