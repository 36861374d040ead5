"""The dedicated route over real HTTP, with fake workers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from mezzotint import images
from mezzotint.spec import ImageSpec
from tests.attacks import attack
from tests.server.hosting import GENERATE, Host, client, endpoint, hosting, settings_for


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(settings_for(tmp_path_factory.mktemp("server"))) as running:
        yield running


def test_every_response_format_decodes_to_the_same_pixels(host: Host) -> None:
    raw = host.post(seed=7, response_format="raw").json()["data"][0]
    pixels = base64.b64decode(raw["b64_json"])
    assert (raw["channels"], raw["dtype"], raw["layout"]) == (3, "uint8", "HWC")
    assert len(pixels) == raw["width"] * raw["height"] * 3
    for form in ("png", "jpeg", "jpg", "url"):
        item = host.post(seed=7, response_format=form).json()["data"][0]
        assert item["response_format"] == form
        assert ("url" in item) != ("b64_json" in item)
        data = httpx2.get(item["url"]).content if form == "url" else base64.b64decode(item["b64_json"])
        image = Image.open(io.BytesIO(data)).convert("RGB")
        assert image.size == (raw["width"], raw["height"])
        if form in ("png", "url"):
            assert image.tobytes() == pixels


def test_layers_with_alpha_are_several_items_of_one_job(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:channels=4,layers=3"))) as layered:
        answer = layered.post(seed=7, n=2, response_format="raw").json()
        assert answer["usage"] == {"images": 6, "steps": 8}
        assert [item["seed"] for item in answer["data"]] == [7, 7, 7, 8, 8, 8]
        assert {item["channels"] for item in answer["data"]} == {4}
        assert len({item["b64_json"] for item in answer["data"]}) == 6
        png = layered.post(seed=7, response_format="png").json()["data"][1]
        shown = Image.open(io.BytesIO(base64.b64decode(png["b64_json"])))
        assert shown.mode == "RGBA"
        assert shown.tobytes() == base64.b64decode(answer["data"][1]["b64_json"])
        jpeg = layered.post(seed=7, response_format="jpeg").json()["data"][0]
        assert Image.open(io.BytesIO(base64.b64decode(jpeg["b64_json"]))).mode == "RGB"


def test_url_is_the_default_format_and_null_means_the_default(host: Host) -> None:
    for fields in ({"response_format": ...}, {"response_format": None}):
        item = host.post(**fields).json()["data"][0]
        assert item["response_format"] == "url"
        assert item["url"].startswith(host.url + "/images/")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(host: Host) -> None:
    assert host.picture(seed=5) == host.picture(seed=5)
    assert host.picture(seed=5) != host.picture(seed=6)


def test_a_drawn_seed_is_small_and_gives_the_picture_again(host: Host) -> None:
    item = host.post(seed=None).json()["data"][0]
    assert 0 <= item["seed"] < 2**32
    assert host.picture(seed=item["seed"]) == item["b64_json"]


def test_image_i_of_n_uses_seed_plus_i(host: Host) -> None:
    answer = host.post(n=3, seed=10).json()
    assert [item["seed"] for item in answer["data"]] == [10, 11, 12]
    assert answer["usage"] == {"images": 3, "steps": 12}
    assert answer["data"][2]["b64_json"] == host.picture(seed=12)


def test_the_png_holds_its_parameters_and_nothing_that_differs_between_runs(host: Host) -> None:
    data = base64.b64decode(host.picture(seed=5, guidance_scale=3.5, negative_prompt="rain"))
    found = images.read_parameters(data)
    assert found == images.Parameters(
        "one",
        ImageSpec(
            prompt="a cat",
            num_inference_steps=4,
            seed=5,
            guidance_scale=3.5,
            negative_prompt="rain",
            width=16,
            height=16,
        ),
        {"dtype": "fp32"},
    )


def test_the_answer_says_how_long_it_took(host: Host) -> None:
    answer = host.post()
    names = [part.partition(";")[0].strip() for part in answer.headers["server-timing"].split(",")]
    assert names == ["queue", "generate", "encode"]
    assert answer.json()["data"][0]["timings"]["generate_ms"] > 0
    assert answer.json()["id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"model": "two"}, 404, "endpoint_not_found", "model"),
        ({"model": "one:style"}, 404, "adapter_not_found", "model"),
        ({"num_inference_steps": 51}, 422, "out_of_range", "num_inference_steps"),
        ({"num_inference_steps": ...}, 422, "missing_field", "num_inference_steps"),
        ({"sed": 1}, 422, "unknown_field", "sed"),
        ({"width": 20, "height": 16}, 422, "out_of_range", "width"),
        ({"width": 64, "height": 64}, 422, "out_of_range", "width"),
        ({"height": 8192}, 422, "out_of_range", "height"),
    ],
)
def test_a_bad_request_is_refused_before_any_work(
    host: Host, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = host.post(**fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    assert answer.json()["detail"] == error["message"]


def test_the_nearest_endpoint_is_named(host: Host) -> None:
    assert "did you mean one?" in host.post(model="onee").json()["detail"]


def test_a_failing_job_is_a_500_that_says_why(host: Host) -> None:
    answer = host.post("a cat !fail@2")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
    assert "step 2" in answer.json()["detail"]
    answer = host.post("a cat !oom")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "out_of_memory")


def test_one_failing_image_fails_the_request_and_leaves_others_alone(host: Host) -> None:
    good = host.post_soon("a dog", seed=1, num_inference_steps=20)
    assert host.post("a cat !fail@3", n=4).status_code == 500
    assert good.result().status_code == 200


def test_the_team_header_is_accepted(host: Host) -> None:
    assert host.post(headers={"x-friendli-team": "team-1"}).status_code == 200


@attack("A picture's URL without its signature, or with a changed one", outcome="403")
def test_a_stored_picture_needs_its_signature_and_no_key(host: Host) -> None:
    url = httpx2.URL(host.post(response_format="url").json()["data"][0]["url"])
    with client(host.url, None) as stranger:
        good = stranger.get(url)
        assert (good.status_code, good.headers["content-type"]) == (200, "image/png")
        forged = stranger.get(url.copy_set_param("signature", "0" * 64))
        assert (forged.status_code, forged.json()["error"]["code"]) == (403, "invalid_signature")
        longer = stranger.get(url.copy_set_param("expires", "99999999999"))
        assert longer.status_code == 403
        assert stranger.get(url.copy_set_param("signature", "ü")).status_code == 403
        assert stranger.get("/images/no-such.png?expires=1&signature=x").status_code == 404
        assert stranger.get("/images/..%2f..%2fmezzotint.db?expires=1&signature=x").status_code == 404


@attack("A picture's URL after its end", outcome="410")
def test_an_expired_url_is_gone(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, url_ttl_s=0)) as host:
        answer = httpx2.get(host.post(response_format="url").json()["data"][0]["url"])
        assert (answer.status_code, answer.json()["error"]["code"]) == (410, "url_expired")


def test_the_public_url_setting_is_the_base_of_picture_urls(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, public_url="https://pictures.example/base/")) as host:
        url = host.post(response_format="url").json()["data"][0]["url"]
        assert url.startswith("https://pictures.example/base/images/")


def test_defaults_of_the_endpoint_fill_what_is_unset(tmp_path: Path) -> None:
    spec = endpoint(default_guidance=2.5, width=24, height=32, embed_parameters=False)
    with hosting(settings_for(tmp_path, spec)) as host:
        item = host.post(seed=1).json()["data"][0]
        assert (item["width"], item["height"]) == (24, 32)
        assert item["b64_json"] == host.picture(seed=1, guidance_scale=2.5, width=24)
        assert item["b64_json"] != host.picture(seed=1, guidance_scale=3.0)
        assert images.read_parameters(base64.b64decode(item["b64_json"])) is None


def test_the_openapi_document_has_examples_that_are_true(host: Host) -> None:
    document = host.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    operation = document["paths"][GENERATE]["post"]
    examples = operation["requestBody"]["content"]["application/json"]["schema"]["examples"]
    assert examples
    for example in examples:
        assert host.client.post(GENERATE, json=example | {"model": "one"}).status_code == 200


def test_several_adapters_each_with_its_strength(host: Host, tmp_path: Path) -> None:
    for route in ("glow", "ink"):
        file = tmp_path / f"{route}.safetensors"
        file.write_bytes(b"weights")
        host.announce("one", route, file)
    uses = [{"route": "glow", "scale": 0.5}, {"route": "ink"}]
    asked: dict[str, Any] = {"seed": 1, "response_format": "raw"}
    both = host.picture(adapters=uses, **asked)
    assert host.picture(adapters=uses, model="one:glow", **asked) == both
    assert host.picture(model="one:glow", **asked) != both
    missing = host.post(adapters=[{"route": "glow"}, {"route": "inc"}])
    error = missing.json()["error"]
    assert (missing.status_code, error["code"], error["param"]) == (404, "adapter_not_found", "adapters")
    assert "did you mean one:ink?" in error["message"]
