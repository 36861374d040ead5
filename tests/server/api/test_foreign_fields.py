"""Fields of OpenAI's and Together's own APIs: unused ones are checked, and Together's have their meaning."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx2
import jsonschema_rs
import pytest
from PIL import Image

from tests.server.hosting import Host, endpoint, hosting, settings_for

IMAGES = "/v1/images/generations"


def text_of(colour: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("server")
    file = folder / "glow.safetensors"
    file.write_bytes(b"weights")
    named = endpoint("fake:step_s=0", aliases=("gpt-image-1", "dall-e-3"))
    with hosting(settings_for(folder, named)) as running:
        running.announce("one", "glow", file)
        yield running


def ask(host: Host, route: str = IMAGES, **fields: Any) -> httpx2.Response:
    return host.client.post(route, json={"model": "one", "prompt": "a fox", "seed": 7, "steps": 2} | fields)


def made(host: Host, route: str = IMAGES, **fields: Any) -> str:
    answer = ask(host, route, **fields)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["data"][0]["b64_json"]
    return text


@pytest.mark.parametrize(
    ("fields", "code", "valid"),
    [
        ({"quality": "hd", "style": "vivid", "moderation": "low", "user": "me"}, "", True),
        ({"quality": "max", "complexity": "high", "safety_identifier": "me"}, "", True),
        ({"disable_safety_checker": True}, "", True),
        ({"quality": "banana"}, "invalid_value", False),
        ({"quality": 5}, "invalid_value", False),
        ({"style": "loud"}, "invalid_value", False),
        ({"background": ["auto"]}, "invalid_value", False),
        ({"disable_safety_checker": 1}, "invalid_value", False),
        ({"user": 5}, "invalid_type", False),
        ({"image_url": 5}, "invalid_type", False),
        ({"reference_images": "x"}, "invalid_type", False),
        ({"image_loras": [{"scale": 1}]}, "invalid_type", False),
        ({"image_loras": [{"path": "glow", "scale": "much"}]}, "invalid_type", False),
        ({"image_loras": [{"path": "glow", "scale": 11}]}, "out_of_range", False),
        ({"image_loras": [{"path": "glow"}] * 2}, "not_supported", False),
        ({"image_loras": [{"path": "glow", "scale": 0.5}]}, "", True),
    ],
)
def test_a_value_that_its_own_api_does_not_know_is_an_error(
    host: Host, fields: dict[str, Any], code: str, valid: bool
) -> None:
    answer = ask(host, **fields)
    assert answer.status_code == (200 if valid else 400), answer.text
    assert valid or answer.json()["error"]["code"] == code
    assert valid or answer.json()["error"]["param"] in fields
    paths = host.client.get("/openapi.json").json()["paths"]
    schema = paths[IMAGES]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert jsonschema_rs.Draft202012Validator(schema).is_valid({"prompt": "a fox"} | fields) == valid


def test_a_background_that_is_not_transparent_is_said(host: Host) -> None:
    answer = ask(host, background="transparent")
    assert answer.json()["warnings"] == ["background had no effect: this server's pictures are opaque"]


def test_names_of_openai_whose_models_never_answer_a_url_get_none(host: Host) -> None:
    """Open WebUI prefers a URL where there is one, and fetches none from its own network."""
    for route, picture in ((IMAGES, {}), ("/v1/images/edits", {"image": text_of("red")})):
        [item] = ask(host, route, model="gpt-image-1", **picture).json()["data"]
        assert "b64_json" in item
        assert "url" not in item
    [item] = ask(host, model="gpt-image-1", response_format="url").json()["data"]
    assert "url" in item
    [item] = ask(host, model="dall-e-3").json()["data"]
    assert "url" in item


def test_pictures_of_together_are_pictures_to_begin_from(host: Host) -> None:
    red, blue = text_of("red"), text_of("blue")
    edited = made(host, "/v1/images/edits", image=red)
    assert made(host, image_url=f"data:image/png;base64,{red}") == edited
    assert made(host, reference_images=[red]) == edited
    assert made(host, image_url=blue) != edited != made(host)


def test_a_url_of_a_picture_is_refused_in_words(host: Host) -> None:
    answer = ask(host, image_url="https://example.org/fox.png")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "image_url_refused")


def test_a_lora_of_together_is_an_adapter(host: Host) -> None:
    assert made(host, image_loras=[{"path": "glow"}]) == made(host, model="one:glow")
    half = made(host, image_loras=[{"path": "glow", "scale": 0.5}])
    assert half not in (made(host), made(host, model="one:glow"))
    answer = ask(host, image_loras=[{"path": "glov"}])
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")


def test_a_program_may_ask_for_methods_without_a_key(host: Host) -> None:
    """SillyTavern does, to see whether a server of stable-diffusion.cpp is there."""
    answer = httpx2.request("OPTIONS", f"{host.url}{IMAGES}")
    assert answer.status_code == 204
    assert "POST" in answer.headers["allow"]
