"""The server that a client is driven against, and what its pictures must be.

Every client runs in an environment of its own, so this needs nothing but Pillow. A client's module hands its
checks to `run`, which prints one line of JSON for each.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import traceback
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

PROMPT = "a red apple on a teal background"
STEPS = 4
SEED = 7
TIMEOUT_S = 120
LITTLE = 0.2
"""A strength that leaves a picture nearly as it is."""
HOLE = (40, 40, 88, 88)
"""The part of `red_square` that `hole` repaints."""


class Server:
    """Where the server is, and the picture that PROMPT, STEPS and SEED must give."""

    def __init__(self, url: str, key: str, model: str) -> None:
        self.url, self.key, self.model = url, key, model
        body = {"model": model, "prompt": PROMPT, "num_inference_steps": STEPS, "seed": SEED}
        answer = self.post("/dedicated/v1/images/generations", body | {"response_format": "png"})
        self.png = base64.b64decode(answer["data"][0]["b64_json"])
        self.image = picture(self.png)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def post(self, path: str, body: dict[str, Any], authorization: str = "") -> Any:
        """The answer to a body of JSON, as a program without a library would ask for it."""
        headers = {
            "authorization": authorization or f"Bearer {self.key}",
            "content-type": "application/json",
        }
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)

    def get(self, path: str, authorization: str = "") -> Any:
        headers = {"authorization": authorization or f"Bearer {self.key}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, None, headers)) as answer:
            return json.load(answer)

    def fetch(self, url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return bytes(answer.read())


Check = tuple[str, Callable[[Server], None]]
"""What is checked, in a few words, and the function that raises unless it holds."""


def run(checks: Sequence[Check]) -> None:
    """Runs the checks against the server that the command line names: URL KEY MODEL."""
    server = Server(*sys.argv[1:4])
    for what, check in checks:
        fault = ""
        try:
            check(server)
        except Exception:  # whatever a client raises is what the table must say
            fault = traceback.format_exc()
        print(json.dumps({"check": what, "fault": fault}), flush=True)


# ---------------------------------------------------------------- pictures


def picture(data: bytes | str) -> Image.Image:
    """The decoded picture in a file, or in the base64 of one."""
    if isinstance(data, str):
        data = base64.b64decode(data.partition("base64,")[2] or data)
    return Image.open(io.BytesIO(data)).convert("RGB")


def size_of(server: Server) -> str:
    return f"{server.image.width}x{server.image.height}"


def near(one: Image.Image, other: Image.Image, levels: float = 12) -> bool:
    """The same picture but for what JPEG, or a little strength, changes: so many levels on average."""
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return one.size == other.size and sum(abs(a - b) for a, b in pairs) / len(one.tobytes()) < levels


def red_square() -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    image.paste((255, 0, 0), (32, 32, 96, 96))
    return image


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def text_of(image: Image.Image) -> str:
    """Its PNG in base64."""
    return base64.b64encode(file_of(image)).decode()


def hole(mode: str) -> Image.Image:
    """The middle: white for `L`, transparent for `RGBA`."""
    image = Image.new(mode, (128, 128), 0 if mode == "L" else (0, 0, 0, 255))
    image.paste(255 if mode == "L" else (0, 0, 0, 0), HOLE)
    return image


def check_nearly_red(made: Image.Image) -> None:
    """A little strength leaves the red square red, and the ground around it white."""
    assert made.size == (128, 128), made.size
    assert made.tobytes() != red_square().tobytes(), "nothing was edited"
    for box, colour in (
        ((44, 44, 84, 84), "red"),
        ((0, 0, 20, 20), "white"),
        ((108, 108, 128, 128), "white"),
    ):
        mean = made.crop(box).resize((1, 1), Image.Resampling.BOX)
        assert near(mean, Image.new("RGB", (1, 1), colour), levels=40), f"{colour}: {mean.getpixel((0, 0))}"


def check_outside(made: Image.Image) -> None:
    """Only the middle differs from the red square."""
    before, after = red_square(), made.copy()
    for image in (before, after):
        image.paste((0, 0, 0), HOLE)
    assert all(abs(a - b) <= 2 for a, b in zip(before.tobytes(), after.tobytes(), strict=True))
    assert made.tobytes() != red_square().tobytes(), "nothing was edited"
