"""AUTOMATIC1111's API as its clients use it, with fake workers."""

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
import pytest
from hypothesis import strategies as st
from PIL import Image

from mezzotint import images
from mezzotint.errors import InvalidRequestError
from mezzotint.server.api.a1111 import take_loras
from mezzotint.spec import AdapterUse
from tests.attacks import attack
from tests.server.hosting import PATIENCE_S, Host, endpoint, hosting, settings_for


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("server")
    file = folder / "glow.safetensors"
    file.write_bytes(b"weights")
    with hosting(settings_for(folder, endpoint("fake:step_s=0.002"), endpoint(id="two"))) as running:
        running.announce("one", "glow", file)
        yield running


@pytest.fixture
def http(host: Host) -> Iterator[httpx2.Client]:
    """A client with a key of its own, as the password of Basic authentication."""
    with host.new_client() as plain:
        secret = plain.headers["authorization"].removeprefix("Bearer ")
    with httpx2.Client(base_url=f"{host.url}/sdapi/v1", auth=("anyone", secret), timeout=PATIENCE_S) as basic:
        yield basic


def ask(http: httpx2.Client, **fields: Any) -> dict[str, Any]:
    answer = http.post("/txt2img", json={"prompt": "a fox", "steps": 4} | fields)
    assert answer.status_code == 200, answer.text
    values: dict[str, Any] = answer.json()
    return values


@attack("Infinity in a field that is echoed", outcome="null in the echo")
def test_a_number_that_json_cannot_write_comes_back_as_null(http: httpx2.Client) -> None:
    body = b'{"prompt": "a fox", "steps": 4, "eta": 1e999, "more": [-1e999, 1.5]}'
    answer = http.post("/txt2img", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert "Infinity" not in answer.text
    values = answer.json()["parameters"]
    assert (values["eta"], values["more"]) == (None, [None, 1.5])


def test_a_picture_comes_with_an_info_that_is_a_json_string(http: httpx2.Client) -> None:
    answer = ask(http, seed=7, cfg_scale=5, negative_prompt="text", width=32, height=16)
    info = json.loads(answer["info"])
    data = base64.b64decode(answer["images"][0])
    assert Image.open(io.BytesIO(data)).size == (32, 16)
    assert (info["seed"], info["steps"], info["cfg_scale"]) == (7, 4, 5)
    assert info["infotexts"] == [images.read_infotext(data)]
    assert "Negative prompt: text" in info["infotexts"][0]


def test_the_dedicated_route_gives_the_same_bytes(host: Host, http: httpx2.Client) -> None:
    picture = ask(http, seed=7, cfg_scale=5.0)["images"][0]
    assert picture == host.picture("a fox", seed=7, guidance_scale=5.0)


def test_minus_one_draws_a_seed(http: httpx2.Client) -> None:
    first, second = (json.loads(ask(http, seed=-1)["info"])["seed"] for _ in range(2))
    assert first != second


def test_batches_are_pictures_with_seeds_that_count_up(http: httpx2.Client) -> None:
    answer = ask(http, seed=5, batch_size=2, n_iter=2)
    assert json.loads(answer["info"])["all_seeds"] == [5, 6, 7, 8]
    assert len(set(answer["images"])) == 4


def test_keys_without_meaning_here_are_ignored(http: httpx2.Client) -> None:
    ask(http, sampler_name="Euler a", enable_hr=False, alwayson_scripts={}, styles=[], restore_faces=True)


def test_a_lora_in_the_prompt_is_the_adapter_of_that_route(host: Host, http: httpx2.Client) -> None:
    answer = ask(http, prompt="a fox <lora:glow>", seed=1)
    info = json.loads(answer["info"])
    assert (info["prompt"], info["sd_model_name"]) == ("a fox", "one:glow")
    assert answer["images"][0] == host.picture("a fox", model="one:glow", seed=1)
    weaker = ask(http, prompt="a fox <lora:glow:0.5>", seed=1)
    assert weaker["images"][0] != answer["images"][0]
    unknown = http.post("/txt2img", json={"prompt": "a fox <lora:glov:1>"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "adapter_not_found")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a fox", ("a fox", ())),
        ("<lora:glow:0.8>a fox", ("a fox", (AdapterUse("glow", 0.8),))),
        ("a <lora:glow:-1> fox <lora:ink>", ("a fox", (AdapterUse("glow", -1.0), AdapterUse("ink")))),
        ("a fox <lora:glow:1:OUTALL>", ("a fox", (AdapterUse("glow", 1.0),))),
        ("a <lora> fox", ("a <lora> fox", ())),
        (None, (None, ())),
    ],
)
def test_loras_are_taken_out_of_the_prompt(prompt: object, expected: tuple[object, ...]) -> None:
    assert take_loras(prompt) == expected


@pytest.mark.parametrize(
    "prompt", ["<lora:a:1> <lora:a:2>", "<lora:a:11>", "".join(map("<lora:{}:1>".format, range(9)))]
)
def test_a_lora_twice_too_many_and_a_wild_weight_are_refused(prompt: str) -> None:
    with pytest.raises(InvalidRequestError):
        take_loras(prompt)


def test_a_bad_field_is_told_in_the_contracts_words(http: httpx2.Client) -> None:
    answer = http.post("/txt2img", json={"prompt": "a fox", "steps": "150"})
    assert answer.status_code == 422
    assert answer.json()["detail"] == "num_inference_steps must be an integer (got '150')"
    mistyped = http.post("/txt2img", json={"prompt": "a fox", "batch_size": "2"})
    assert mistyped.json()["error"]["param"] == "batch_size"


def test_what_sillytavern_sends_by_itself_gives_a_picture(http: httpx2.Client) -> None:
    body = {
        "prompt": "a fox",
        "negative_prompt": "lowres, bad anatomy, bad hands, text, error, cropped, worst quality",
        "sampler_name": "Euler a",
        "scheduler": "normal",
        "steps": 80,
        "cfg_scale": 7,
        "width": 512,
        "height": 512,
        "restore_faces": False,
        "enable_hr": True,
        "hr_upscaler": "Latent",
        "seed": -1,
        "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
        "alwayson_scripts": {"ADetailer": {"args": [True]}},
    }
    answer = http.post("/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    told = json.loads(answer.json()["info"])["warnings"]
    assert any("hires fix" in text for text in told)
    assert any("ADetailer" in text for text in told)
    assert any("512x512" in text for text in told)
    assert any("80 is not between 1 and 50" in text for text in told)


def test_lists_that_clients_ask_for_at_their_start_are_there(http: httpx2.Client) -> None:
    for name in ("cmd-flags", "memory", "embeddings", "scripts"):
        assert isinstance(http.get(f"/{name}").json(), dict)
    for name in ("hypernetworks", "face-restorers", "prompt-styles", "realesrgan-models"):
        assert http.get(f"/{name}").json() == []
    for name in ("refresh-checkpoints", "refresh-loras", "unload-checkpoint", "reload-checkpoint"):
        assert http.post(f"/{name}").json() == {}


def test_the_key_is_the_password(host: Host) -> None:
    for auth in (None, ("anyone", "mz_wrong"), ("anyone", "")):
        answer = httpx2.get(f"{host.url}/sdapi/v1/options", auth=auth)
        assert answer.status_code == 401
    for text in (b"Basic %%%", b"Basic \xe9"):
        garbled = httpx2.get(f"{host.url}/sdapi/v1/options", headers={b"authorization": text})
        assert garbled.json()["error"]["code"] == "missing_api_key"
    assert host.client.get("/sdapi/v1/options").status_code == 200, "a bearer token is taken as well"


def test_the_options_choose_the_endpoint_of_this_key(http: httpx2.Client, host: Host) -> None:
    assert http.get("/options").json()["sd_model_checkpoint"] == "one"
    assert http.post("/options", json={"sd_model_checkpoint": "two", "unknown": 1}).json() == {}
    assert http.get("/options").json()["sd_model_checkpoint"] == "two"
    assert json.loads(ask(http)["info"])["sd_model_name"] == "two"
    override = ask(http, override_settings={"sd_model_checkpoint": "one"})
    assert json.loads(override["info"])["sd_model_name"] == "one"
    assert host.client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "one", "another key's choice"
    assert http.post("/options", json={"sd_model_checkpoint": "three"}).status_code == 404


def test_models_samplers_and_loras_are_listed(http: httpx2.Client) -> None:
    assert [model["title"] for model in http.get("/sd-models").json()] == ["one", "one:glow", "two"]
    assert [sampler["name"] for sampler in http.get("/samplers").json()] == ["Automatic"]
    assert [lora["name"] for lora in http.get("/loras").json()] == ["glow"]
    assert [scheduler["name"] for scheduler in http.get("/schedulers").json()] == ["automatic"]
    for name in ("upscalers", "latent-upscale-modes", "sd-vae"):
        assert http.get(f"/{name}").json() == []


def test_progress_is_seen_and_an_interrupt_cancels(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.02"))) as slow:
        api = "/sdapi/v1"
        assert slow.client.get(f"{api}/progress").json()["state"]["job_count"] == 0
        pending = slow.pool.submit(slow.client.post, f"{api}/txt2img", json={"prompt": "a fox", "steps": 50})
        slow.run(until_a_step_is_done(slow))
        seen = slow.client.get(f"{api}/progress").json()
        assert 0 < seen["progress"] < 1
        assert seen["state"]["sampling_steps"] == 50
        assert seen["eta_relative"] > 0
        assert slow.client.post(f"{api}/interrupt").json() == {}
        answer = pending.result(PATIENCE_S)
        assert (answer.status_code, answer.json()["error"]["code"]) == (499, "request_cancelled")
        assert slow.client.get(f"{api}/progress").json()["state"]["job_count"] == 0


async def until_a_step_is_done(host: Host) -> None:
    tickets = host.service.admission.tickets.by_id
    while not any(ticket.step for ticket in tickets.values()):
        if tickets:
            ticket = next(iter(tickets.values()))
            await ticket.changed(ticket.changes)
        else:
            await asyncio.sleep(0)


def test_png_info_reads_what_made_a_picture(http: httpx2.Client) -> None:
    made = ask(http, seed=7)
    for text in (made["images"][0], f"data:image/png;base64,{made['images'][0]}"):
        read = http.post("/png-info", json={"image": text}).json()
        assert read["info"] == json.loads(made["info"])["infotexts"][0]
        assert read["parameters"]["seed"] == 7
    large = http.post("/png-info", json={"image": made["images"][0], "padding": "x" * 2**21})
    assert large.status_code == 200, "a body with a picture may be larger than others"
    for text in ("no base64!", "é"):
        bad = http.post("/png-info", json={"image": text})
        assert (bad.status_code, bad.json()["error"]["code"]) == (422, "invalid_image")


ANYTHING: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just([{}])
)
KEYS = (
    "prompt", "negative_prompt", "steps", "seed", "cfg_scale", "width", "height", "batch_size", "n_iter",
    "override_settings", "sampler_name", "\ud800",
)  # fmt: skip


@attack("Any fields on AUTOMATIC1111's route", outcome="no 5xx")
@hypothesis.given(st.dictionaries(st.sampled_from(KEYS), ANYTHING))
@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_no_body_is_the_servers_fault(host: Host, fields: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "a fox", "steps": 1} | fields)
    answer = host.client.post("/sdapi/v1/txt2img", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 422), answer.text
