"""OpenAI's images, asked for by OpenAI's own client, with fake workers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import hypothesis
import jsonschema_rs
import openai
import pytest
from hypothesis import strategies as st
from PIL import Image

from mezzotint import images
from mezzotint.fake_worker import EXAMPLES
from mezzotint.server.api import openai as openai_api
from mezzotint.server.api.openai import KNOWN
from tests.attacks import attack
from tests.server.hosting import Host, endpoint, hosting, settings_for

IMAGES = "/v1/images/generations"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("server")
    file = folder / "glow.safetensors"
    file.write_bytes(b"weights")
    with hosting(settings_for(folder, endpoint(), endpoint(id="two", default_steps=5))) as running:
        running.announce("one", "glow", file)
        yield running


@pytest.fixture(scope="module")
def ai(host: Host) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{host.url}/v1", api_key=str(host.first_key), max_retries=0) as client:
        yield client


def pixels(data: str | None) -> bytes:
    image = Image.open(io.BytesIO(base64.b64decode(data or "")))
    return image.convert("RGB").tobytes()


def test_a_picture_comes_as_base64_with_the_seed_that_gives_it_again(ai: openai.OpenAI) -> None:
    first = ai.images.generate(model="one", prompt="an owl", response_format="b64_json")
    assert first.data
    assert first.usage
    assert first.size == "16x16"
    assert first.output_format == "png"
    assert first.usage.output_tokens == 8, "the model's own number of steps"
    seed = first.data[0].seed  # type: ignore[attr-defined]
    again = ai.images.generate(
        model="one", prompt="an owl", response_format="b64_json", extra_body={"seed": seed}
    )
    assert again.data
    assert again.data[0].b64_json == first.data[0].b64_json


def test_the_dedicated_route_gives_the_same_bytes(host: Host, ai: openai.OpenAI) -> None:
    extra = {
        "seed": 5,
        "steps": 4,
        "guidance_scale": 3.0,
        "negative_prompt": "text",
        "width": 24,
        "height": 16,
    }
    answer = ai.images.generate(model="one", prompt="a fox", response_format="b64_json", extra_body=extra)
    native = {name: value for name, value in extra.items() if name != "steps"}
    assert answer.data
    assert answer.data[0].b64_json == host.picture("a fox", num_inference_steps=4, **native)


def test_size_quality_and_format_reach_the_file(ai: openai.OpenAI) -> None:
    answer = ai.images.generate(
        model="one", prompt="a fox", size="32x16", output_format="jpeg", output_compression=60,
        response_format="b64_json", quality="high", user="somebody",
    )  # fmt: skip
    assert answer.data
    data = base64.b64decode(answer.data[0].b64_json or "")
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("JPEG", (32, 16))
    made = images.read_parameters(data)
    assert made is not None
    assert made.spec.prompt == "a fox"


def test_a_url_is_the_default_and_answers_the_file(ai: openai.OpenAI) -> None:
    answer = ai.images.generate(
        model="one", prompt="a fox", n=2, output_format="jpeg", extra_body={"seed": 1}
    )
    assert answer.data
    assert [item.seed for item in answer.data] == [1, 2]  # type: ignore[attr-defined]
    for item in answer.data:
        file = httpx2.get(str(item.url))
        assert file.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(file.content)).size == (16, 16)


def test_partial_images_come_before_the_picture(ai: openai.OpenAI) -> None:
    stream = ai.images.generate(
        model="one", prompt="a fox", stream=True, partial_images=3, extra_body={"seed": 3, "steps": 8}
    )
    events = list(stream)
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image"] * 3 + ["completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    plain = ai.images.generate(
        model="one", prompt="a fox", response_format="b64_json", extra_body={"seed": 3, "steps": 8}
    )
    assert plain.data
    assert events[-1].b64_json == plain.data[0].b64_json
    assert events[-1].usage.output_tokens == 8  # type: ignore[union-attr]


def test_partial_images_that_come_while_one_is_drawn_are_sent_too(
    host: Host, ai: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = openai_api._partial

    def slow(*values: Any) -> bytes:
        host.until(lambda: not host.service.admission.tickets.living())
        return draw(*values)

    monkeypatch.setattr(openai_api, "_partial", slow)
    events = list(ai.images.generate(model="one", prompt="a fox", stream=True, partial_images=3))
    assert [event.type.removeprefix("image_generation.") for event in events] == [
        *["partial_image"] * 3,
        "completed",
    ]


def test_a_stream_tells_its_progress_in_comments_only(host: Host) -> None:
    body = {"model": "one", "prompt": "a fox", "stream": True, "steps": 3}
    with host.client.stream("POST", IMAGES, json=body) as answer:
        lines = list(answer.iter_lines())
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert any(line.startswith(": step ") for line in lines)
    names = [line for line in lines if line.startswith("event:")]
    assert names == ["event: image_generation.completed"]


def test_a_failure_in_mid_stream_is_an_error_of_the_client(ai: openai.OpenAI) -> None:
    stream = ai.images.generate(model="one", prompt="a fox !fail@2", stream=True, partial_images=1)
    with pytest.raises(openai.APIError, match="failed at step 2"):
        list(stream)


def test_the_async_client_streams_too(host: Host) -> None:
    async def main() -> list[str]:
        key = str(host.first_key)
        async with openai.AsyncOpenAI(base_url=f"{host.url}/v1", api_key=key, max_retries=0) as ai:
            stream = await ai.images.generate(model="one", prompt="a fox", stream=True, partial_images=1)
            return [event.type async for event in stream]

    assert asyncio.run(main()) == ["image_generation.partial_image", "image_generation.completed"]


def test_a_client_that_leaves_a_stream_cancels_its_request(tmp_path: Any) -> None:
    settings = settings_for(tmp_path, endpoint("fake:step_s=0.01"), attach_window_s=0.05)
    with hosting(settings) as host:
        body = {"model": "one", "prompt": "a fox", "stream": True, "steps": 50}
        with host.client.stream("POST", IMAGES, json=body) as answer:
            ticket_id = answer.headers["x-request-id"]
            next(answer.iter_lines())
        assert host.wait_until(ticket_id, "cancelled")["error"]["code"] == "request_cancelled"


def test_an_endpoint_has_its_own_default_steps(ai: openai.OpenAI) -> None:
    answer = ai.images.generate(model="two", prompt="a fox")
    assert answer.usage
    assert answer.usage.output_tokens == 5


def test_without_a_model_the_keys_only_endpoint_answers(host: Host) -> None:
    with host.new_client(endpoints=("two",)) as http:
        answer = http.post(IMAGES, json={"prompt": "a fox"})
    assert answer.json()["model"] == "two"
    refused = host.client.post(IMAGES, json={"prompt": "a fox"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "model is required: this key may use one, two"


def test_models_are_endpoints_and_their_adapters(host: Host, ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["one", "one:glow", "two"]
    facts = ai.models.retrieve("two").mezzotint  # type: ignore[attr-defined]
    assert (facts["width"], facts["size_multiple"], facts["default_steps"]) == (16, 8, 5)
    assert (facts["sizes"], facts["examples"]) == ([], list(EXAMPLES))
    with host.new_client(endpoints=("two",)) as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["two"]
        assert http.get("/v1/models/one").status_code == 403


def test_an_adapter_changes_the_picture(host: Host) -> None:
    plain, glowing = (
        host.client.post(
            IMAGES, json={"model": model, "prompt": "a fox", "seed": 1, "response_format": "b64_json"}
        )
        for model in ("one", "one:glow")
    )
    assert pixels(plain.json()["data"][0]["b64_json"]) != pixels(glowing.json()["data"][0]["b64_json"])


def test_the_container_form_answers_one_image_of_an_adapter(host: Host) -> None:
    body = {"model": "glow", "prompt": "a fox", "num_inference_steps": 4, "seed": 1}
    raw = host.client.post(IMAGES, json=body | {"response_format": "raw"}).json()
    assert raw["model"] == "one:glow"
    item = raw["data"][0]
    expected = host.post("a fox", model="one:glow", seed=1, response_format="raw").json()["data"][0]
    assert raw["image"] == expected["b64_json"]
    assert (item["layout"], item["channels"]) == (expected["layout"], 3)
    jpeg = host.client.post(IMAGES, json=body | {"response_format": "jpeg"}).json()
    assert Image.open(io.BytesIO(base64.b64decode(jpeg["image"]))).format == "JPEG"


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "dall-e-3"}, 404, "endpoint_not_found", "model"),
        ({"model": "one:glov"}, 404, "adapter_not_found", "model"),
        ({"model": 7}, 400, "invalid_type", "model"),
        ({"prompt": None}, 400, "missing_field", "prompt"),
        ({"num_inference_step": 4}, 400, "unknown_field", "num_inference_step"),
        ({"steps": "99"}, 400, "invalid_type", "num_inference_steps"),
        ({"steps": 4, "num_inference_steps": 5}, 400, "invalid_value", "steps"),
        ({"size": "big"}, 400, "invalid_value", "size"),
        ({"size": "32x32", "width": 32}, 400, "invalid_value", "size"),
        ({"width": 0}, 400, "out_of_range", "width"),
        ({"response_format": "tiff"}, 400, "invalid_value", "response_format"),
        ({"output_format": "gif"}, 400, "invalid_value", "output_format"),
        ({"output_compression": 101}, 400, "out_of_range", "output_compression"),
        ({"stream": "yes"}, 400, "invalid_value", "stream"),
        ({"partial_images": 4}, 400, "out_of_range", "partial_images"),
        ({"n": 11}, 400, "out_of_range", "n"),
    ],
)
def test_a_bad_field_is_refused(
    host: Host, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = host.client.post(IMAGES, json={"model": "one", "prompt": "a fox"} | fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    ("fields", "valid"),
    [
        ({}, True),
        ({"size": "auto", "n": 2, "steps": 4, "seed": 1, "stream": False, "user": "me"}, True),
        ({"size": "32x32", "output_format": "jpeg", "output_compression": 0, "response_format": "raw"}, True),
        (dict.fromkeys(("size", "steps", "n", "seed", "stream", "quality")), True),
        ({"model": 7}, False),
        ({"prompt": None}, False),
        ({"num_inference_step": 4}, False),
        ({"steps": 99}, True),
        ({"steps": 9.5}, False),
        ({"size": "big"}, False),
        ({"response_format": "tiff"}, False),
        ({"output_format": "webp"}, True),
        ({"output_format": "gif"}, False),
        ({"output_compression": 101}, False),
        ({"stream": "yes"}, False),
        ({"partial_images": 4}, False),
        ({"n": 10, "steps": 1}, True),
        ({"n": 11}, False),
    ],
)
def test_the_published_schema_says_what_the_route_takes(
    host: Host, fields: dict[str, Any], valid: bool
) -> None:
    paths = host.client.get("/openapi.json").json()["paths"]
    schema = paths[IMAGES]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = {"model": "one", "prompt": "a fox"} | fields
    assert jsonschema_rs.Draft202012Validator(schema).is_valid(body) == valid
    assert (host.client.post(IMAGES, json=body).status_code == 200) == valid


def test_without_a_response_format_both_forms_are_there(host: Host, ai: openai.OpenAI) -> None:
    image = ai.images.generate(model="one", prompt="a fox").data[0]  # type: ignore[index]
    assert image.b64_json is not None
    assert image.url is not None
    assert httpx2.get(image.url).content == base64.b64decode(image.b64_json)


def test_the_container_form_also_has_a_jpeg(host: Host) -> None:
    answer = host.client.post(
        IMAGES, json={"model": "one", "prompt": "a fox", "num_inference_steps": 2}
    ).json()
    assert Image.open(io.BytesIO(base64.b64decode(answer["image"]))).format == "JPEG"
    assert "image" not in host.client.post(IMAGES, json={"model": "one", "prompt": "a fox"}).json()


def test_a_fixed_menu_is_met_half_way_and_every_change_is_said(host: Host) -> None:
    menu = {"model": "one", "prompt": "a fox", "size": "1024x1024", "num_inference_steps": 150}
    answer = host.client.post(IMAGES, json=menu)
    assert answer.status_code == 200, answer.text
    assert answer.json()["size"] == "32x32"
    assert answer.json()["usage"]["output_tokens"] == 50
    steps, size = answer.json()["warnings"]
    assert steps == "num_inference_steps is 50: 150 is not between 1 and 50"
    assert size == "the picture is 32x32: this endpoint cannot draw 1024x1024"
    assert answer.headers["x-warnings"] == f"{steps}; {size}"


def test_the_shape_of_a_size_is_kept(host: Host) -> None:
    answer = host.client.post(IMAGES, json={"model": "one", "prompt": "a fox", "size": "1536x1024"}).json()
    width, height = map(int, answer["size"].split("x"))
    assert width > height
    assert width * height <= 32 * 32


def test_a_server_may_refuse_instead(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, endpoint("fake", id="one"), foreign_values="refuse")
    with hosting(settings) as strict:
        body = {"model": "one", "prompt": "a fox", "steps": 99}
        assert strict.client.post(IMAGES, json=body).json()["error"]["code"] == "out_of_range"


def test_an_alias_names_its_endpoint(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, endpoint("fake", id="one", aliases=("gpt-image-1", "dall-e-3")))
    with hosting(settings) as host:
        body = {"model": "dall-e-3", "prompt": "a fox", "steps": 2}
        assert host.client.post(IMAGES, json=body).json()["model"] == "one"


def test_webp_carries_its_parameters_and_a_long_prompt_is_taken(host: Host) -> None:
    body = {"model": "one", "prompt": "a fox " * 4000, "output_format": "webp", "output_compression": 80}
    data = base64.b64decode(host.client.post(IMAGES, json=body).json()["data"][0]["b64_json"])
    assert Image.open(io.BytesIO(data)).format == "WEBP"
    made = images.read_parameters(data)
    assert made is not None
    assert made.spec.prompt == body["prompt"].strip()  # type: ignore[attr-defined]


def test_the_client_shows_the_contracts_words(ai: openai.OpenAI, host: Host) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean two"):
        ai.images.generate(model="tow", prompt="a fox")
    stranger = ai.with_options(api_key="mz_wrong")
    with pytest.raises(openai.AuthenticationError, match="unknown or has been revoked"):
        stranger.models.list()


ANYTHING: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just([{}])
)


@attack("Any fields on OpenAI's route", outcome="no 5xx")
@hypothesis.given(st.dictionaries(st.sampled_from((*KNOWN, "\ud800")), ANYTHING))
@hypothesis.settings(max_examples=80, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_no_body_is_the_servers_fault(host: Host, fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "one", "prompt": "a fox", "steps": 1} | fields)
    answer = host.client.post(IMAGES, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
