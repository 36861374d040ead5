"""Pictures for ControlNets over real HTTP, with fake workers."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from mezzotint.client import Client
from mezzotint.spec import ControlNetSettings
from tests.server.api.test_edits import BLUE, EDIT, MIB, RED, file_of, refused, text_of
from tests.server.hosting import Host, endpoint, hosting, settings_for

NETS = tuple(ControlNetSettings(route=route, source=f"studio/{route}") for route in ("edges", "depth"))
RED_FORM, BLUE_FORM = {"image": text_of(RED)}, {"image": text_of(BLUE)}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with_nets = endpoint("fake:step_s=0", controlnets=NETS)
    plain = endpoint("fake:step_s=0", id="plain")
    with hosting(settings_for(tmp_path_factory.mktemp("server"), with_nets, plain)) as running:
        yield running


def made(host: Host, **fields: Any) -> bytes:
    answer = host.post(seed=7, **fields)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def test_each_picture_and_weight_is_part_of_the_request(host: Host) -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"control_images": [RED_FORM]},
        {"control_images": [BLUE_FORM]},
        {"control_images": [RED_FORM, BLUE_FORM]},
        {"control_images": [BLUE_FORM, RED_FORM]},
    ]
    pictures = [made(host, **fields) for fields in asked]
    assert len(set(pictures)) == len(asked)
    assert [made(host, **fields) for fields in asked] == pictures
    assert made(host, control_images=None, controlnet_weights=None) == pictures[0]
    assert made(host, control_images=[], controlnet_weights=[]) == pictures[0]


def test_the_openai_route_takes_them_as_extras(host: Host) -> None:
    values = {"model": "one", "prompt": "a cat", "steps": 4, "seed": 7, "control_images": [RED_FORM]}
    answer = host.client.post("/v1/images/generations", json=values | {"controlnet_weights": [0.5]})
    assert answer.status_code == 200, answer.text
    refused(
        host.client.post("/v1/images/generations", json=values | {"model": "plain"}), "not_supported", 400
    )


@pytest.mark.parametrize(
    ("fields", "code", "sentence"),
    [
        ({"model": "plain", "control_images": [RED_FORM]}, "not_supported", "plain has no ControlNet"),
        ({"model": "plain", "controlnet_weights": [1]}, "not_supported", "plain has no ControlNet"),
        ({"model": "plain", "control_images": [{"image": "?"}]}, "not_supported", "has no ControlNet"),
        ({"control_images": [RED_FORM] * 3}, "not_supported", "endpoint one follows edges, depth"),
        (
            {"control_images": [RED_FORM], "controlnet_weights": [1, 1]},
            "invalid_value",
            "one weight for each",
        ),
        ({"control_images": [{"image": "?"}]}, "image_not_base64", "control_images"),
        ({"control_images": [{"image": "aGk="}]}, "image_format", "control_images must be a PNG"),
    ],
)
def test_what_cannot_be_is_refused(host: Host, fields: dict[str, Any], code: str, sentence: str) -> None:
    assert sentence in refused(host.post(**fields), code)


def test_an_edit_takes_none(host: Host) -> None:
    values = {"model": "one", "prompt": "a cat", "image": RED_FORM, "control_images": [BLUE_FORM]}
    assert "not both" in refused(host.client.post(EDIT, json=values), "not_supported")


def test_models_say_which_controlnets_they_have(host: Host) -> None:
    listed = {each["id"]: each["mezzotint"] for each in host.client.get("/v1/models").json()["data"]}
    assert (listed["one"]["controlnets"], listed["plain"]["controlnets"]) == (["edges", "depth"], [])


def test_bodies_may_be_large_where_an_endpoint_has_controlnets(host: Host) -> None:
    large = file_of(Image.frombytes("RGB", (1024, 512), random.Random(0).randbytes(3 * MIB // 2)))
    assert host.post(control_images=[{"image": text_of(large)}]).status_code == 200


def test_the_client_sends_files(host: Host, tmp_path: Any) -> None:
    file = tmp_path / "red.png"
    file.write_bytes(RED)
    with Client(base_url=host.url, api_key=host.first_key) as client:
        result = client.images.generate(
            model="one", prompt="a cat", num_inference_steps=4, seed=7, response_format="png",
            control_images=[file, BLUE], controlnet_weights=(0.5, 1),
        )  # fmt: skip
    wanted = made(host, control_images=[RED_FORM, BLUE_FORM], controlnet_weights=[0.5, 1])
    assert result.data[0].data == wanted
