"""Pictures go in, on the built-in model's real weights and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mezzotint.server.work.lifecycle import State
from mezzotint.server.workers.process import ENGINE_WORKER
from tests.server.hosting import GENERATE, Host, endpoint, hosting, settings_for

EDIT = "/dedicated/v1/images/edits"
SIDE = 128
PATIENCE_S = 240.0
NUM_ORDERS = int(os.environ.get("NUM_ORDERS", "2"))
"""A run with NUM_ORDERS=10 shows more than the suite has time for."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    settings = settings_for(tmp_path_factory.mktemp("server"), endpoint("emoji", num_threads=1))
    with hosting(settings, ready=False, worker=ENGINE_WORKER) as running:
        running.client.timeout = PATIENCE_S
        ready = running.endpoint().wait_for(State.READY)
        asyncio.run_coroutine_threadsafe(ready, running.loop).result(PATIENCE_S)
        yield running


def png(image: Image.Image) -> dict[str, str]:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"image": base64.b64encode(file.getvalue()).decode()}


def square(colour: str, background: str = "white") -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), background)
    image.paste(colour, (32, 32, 96, 96))
    return image


def hole() -> Image.Image:
    image = Image.new("L", (SIDE, SIDE), 0)
    image.paste(255, (40, 40, 88, 88))
    return image


def body(**fields: Any) -> dict[str, Any]:
    values = {"model": "one", "prompt": "a red square", "num_inference_steps": 20, "seed": 7}
    return values | {"response_format": "png"} | fields


def data_of(host: Host, path: str, values: dict[str, Any]) -> bytes:
    answer = host.client.post(path, json=values)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_a_red_square_with_little_strength_stays_nearly_a_red_square(host: Host) -> None:
    before = np.asarray(square("red")).astype(int)
    little = pixels(data_of(host, EDIT, body(image=png(square("red")), strength=0.2)))
    much = pixels(data_of(host, EDIT, body(image=png(square("red")), prompt="a blue fish", strength=1.0)))
    assert little.shape == (SIDE, SIDE, 3)
    assert np.abs(little - before).mean() < 20
    inside = little[44:84, 44:84].reshape(-1, 3).mean(axis=0)
    assert inside[0] > 180 > 90 > max(inside[1:])
    assert np.abs(much - before).mean() > 2 * np.abs(little - before).mean()


def test_outside_the_mask_the_pixels_stay(host: Host) -> None:
    fields = body(image=png(square("red")), mask=png(hole()), prompt="a cat")
    made, before = pixels(data_of(host, EDIT, fields)), np.asarray(square("red")).astype(int)
    outside = np.asarray(hole()) == 0
    assert np.abs(made - before)[outside].max() <= 2
    assert np.abs(made - before)[~outside].mean() > 5


def test_an_adapter_applies_to_an_edit(host: Host) -> None:
    fields = body(image=png(square("red")), prompt="a red apple", strength=0.8, num_inference_steps=8)
    made = [data_of(host, EDIT, fields | {"model": model}) for model in ("one", "one:mono", "one:flat")]
    changes = [np.abs(pixels(each) - pixels(made[0])).mean() for each in made[1:]]
    assert min(changes) > 2
    assert data_of(host, EDIT, fields) == made[0]


def mixed() -> list[tuple[str, dict[str, Any]]]:
    """24 requests: words alone, a picture, a picture with a mask, each of eight kinds."""
    found: list[tuple[str, dict[str, Any]]] = []
    for number in range(8):
        prompt = ("a red apple", "a cat", "an owl", "a rocket")[number % 4]
        common = body(prompt=prompt, seed=number // 2, num_inference_steps=3 + number % 5)
        picture = png(square(("red", "teal", "gold")[number % 3], ("white", "navy")[number % 2]))
        found.append((GENERATE, common))
        found.append((EDIT, common | {"image": picture, "strength": (0.4, 0.7, 1.0)[number % 3]}))
        model = ("one", "one:mono", "one:flat", "one")[number % 4]
        found.append((EDIT, common | {"image": picture, "mask": png(hole()), "model": model}))
    return found


def test_generations_and_edits_have_one_set_of_bytes_in_every_order_and_after_a_kill(host: Host) -> None:
    wanted = mixed()
    alone = [data_of(host, *each) for each in wanted]
    assert len(set(alone)) == len(wanted)
    chance = random.Random(0)
    for number in range(NUM_ORDERS):
        order = list(range(len(wanted)))
        chance.shuffle(order)
        futures = {index: host.pool.submit(data_of, host, *wanted[index]) for index in order}
        if number == NUM_ORDERS - 1:
            host.until(lambda: host.endpoint().dispatcher.num_running() >= 2)
            pid = host.endpoint().current.replicas[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        together = {index: future.result(PATIENCE_S) for index, future in futures.items()}
        assert [index for index in order if together[index] != alone[index]] == []
