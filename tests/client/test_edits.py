"""Pictures through the SDK: whatever names a picture is the same request, waited for or followed."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mezzotint.client import Completed
from mezzotint.errors import InvalidRequestError
from tests.client.faces import Connect
from tests.client.scripted import Script, answer

FIELDS: dict[str, Any] = {"model": "emoji", "prompt": "a cat", "seed": 7, "response_format": "png"}


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (16, 16), "red").save(path)
    return path


def test_every_way_to_give_a_picture_is_the_same_request(
    connect: Connect, server: tuple[str, str], red: Path
) -> None:
    url, key = server
    images = connect(url, api_key=key)
    data_url = f"data:image/png;base64,{base64.b64encode(red.read_bytes()).decode()}"
    with Image.open(red) as file:
        image = file.copy()
    ways: list[Any] = [red, str(red), red.read_bytes(), image, data_url, [red], (red,)]
    made = {images.edit(**FIELDS, image=way).data[0].data for way in ways}
    assert len(made) == 1
    other = images.edit(**FIELDS, image=Image.new("RGB", (16, 16), "blue")).data[0].data
    assert other not in made


def test_an_edit_is_followed_as_a_generation_is(connect: Connect, server: tuple[str, str], red: Path) -> None:
    url, key = server
    images = connect(url, api_key=key)
    fields = {**FIELDS, "image": red, "mask": Image.new("L", (16, 16), 255), "num_inference_steps": 8}
    waited = images.edit(**fields)
    (*_, last) = images.stream(**fields)
    assert isinstance(last, Completed)
    assert last.result.data[0].data == waited.data[0].data
    assert images.submit(**fields).result().data[0].data == waited.data[0].data
    (many,) = images.generate_many([fields])
    assert many.data[0].data == waited.data[0].data


def test_the_body_is_what_the_route_documents(connect: Connect, script: Script, red: Path) -> None:
    script.answers(answer())
    connect(script.url).edit(model="emoji", prompt="a cat", image=[red, red], mask=red, strength=0.5)
    (seen,) = script.seen
    text = base64.b64encode(red.read_bytes()).decode()
    assert seen.path == "/dedicated/v1/images/edits"
    assert json.loads(seen.body) == {
        "model": "emoji",
        "prompt": "a cat",
        "num_inference_steps": 20,
        "strength": 0.5,
        "image": [{"image": text}, {"image": text}],
        "mask": {"image": text},
    }


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image": "no/such/file.png"}, "cannot be read"),
        ({"image": 3}, "must be a path, bytes"),
        ({"image": b"x", "strength": 2.0}, "strength must be between 0 and 1"),
        ({"image": b"x", "control_images": [1]}, "control_images"),
    ],
)
def test_bad_fields_are_refused_before_anything_is_sent(
    connect: Connect, script: Script, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        connect(script.url).edit(**{**FIELDS, **fields})
    assert script.seen == []
