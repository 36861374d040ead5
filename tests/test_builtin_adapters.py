"""The three adapters that come with the built-in model, on its real weights."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import random
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from mezzotint.engine.lora.bank import AdapterBank
from mezzotint.engine.models.sources import locate
from mezzotint.server.work.adapters import built_in_adapters
from mezzotint.server.work.lifecycle import State
from mezzotint.server.workers.process import ENGINE_WORKER
from tests.server.hosting import Host, endpoint, hosting, settings_for

ROUTES = ("flat", "mono", "noto")
MODELS = ("emoji", *(f"emoji:{route}" for route in ROUTES))
PROMPTS = ("a red apple", "a cat", "a rocket on a teal background", "an owl")
MARGIN = 8.0
"""Mean absolute difference between two styles, of 255 levels, over PROMPTS with one seed."""
MAX_BYTES = 3_000_000
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}
"""Largest difference of a channel value (0 to 1) from diffusers with load_lora_weights, after 4 steps.

In bf16 the order of roundings differs between the two; TOLERANCE_MEAN bounds the average there.
"""
TOLERANCE_MEAN = 0.005
PATIENCE_S = 240.0

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def file_of(route: str) -> Path:
    return Path(next(each.source for each in built_in_adapters("emoji") if each.route == route))


# ---------------------------------------------------------------- served


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One server, one worker with the built-in model; nothing names the adapters."""
    emoji = endpoint("emoji", id="emoji", num_threads=1)
    settings = settings_for(tmp_path_factory.mktemp("server"), emoji)
    with hosting(settings, worker=ENGINE_WORKER, ready=False) as running:
        running.client.timeout = httpx2.Timeout(PATIENCE_S)
        ready = running.endpoint("emoji").wait_for(State.READY)
        asyncio.run_coroutine_threadsafe(ready, running.loop).result(PATIENCE_S)
        yield running


def pixels(host: Host, model: str, prompt: str) -> Any:
    data = base64.b64decode(host.picture(prompt, model=model, seed=11, num_inference_steps=8))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32)


def test_they_are_there_without_a_word_of_configuration(host: Host) -> None:
    assert tuple(entry["id"] for entry in host.client.get("/v1/models").json()["data"]) == MODELS
    shown = host.client.get("/dedicated/beta/endpoint/emoji/adapters").json()["data"]
    assert [(one["route"], one["origin"], one["state"]) for one in shown] == [
        (route, "built-in", "ready") for route in ROUTES
    ]
    error = host.post(model="emoji:flatt").json()["error"]
    assert (error["code"], "did you mean emoji:flat?" in error["message"]) == ("adapter_not_found", True)


def test_forty_eight_mixed_requests_have_the_bytes_they_have_alone(host: Host) -> None:
    chance = random.Random(4)
    wanted: list[dict[str, Any]] = [
        {
            "prompt": chance.choice(PROMPTS),
            "model": MODELS[number % 4],
            "num_inference_steps": chance.randint(2, 8),
            "guidance_scale": chance.choice((1.0, 2.5, 4.0, 8.0)),
            "seed": chance.randrange(2**32),
        }
        for number in range(48)
    ]
    running: list[Future[httpx2.Response]] = [host.post_soon(**fields) for fields in wanted]
    together = [answer.result(PATIENCE_S).json()["data"][0]["b64_json"] for answer in running]
    alone = [host.picture(**fields) for fields in wanted]
    differing = [at for at in range(48) if together[at] != alone[at]]
    assert differing == []
    assert len(set(alone)) == 48


def test_each_has_a_style_of_its_own(host: Host) -> None:
    drawn = {model: np.stack([pixels(host, model, prompt) for prompt in PROMPTS]) for model in MODELS}
    for one, other in itertools.combinations(MODELS, 2):
        apart = float(np.abs(drawn[one] - drawn[other]).mean())
        assert apart > MARGIN, f"{one} and {other} are {apart:.1f} levels apart"


# ---------------------------------------------------------------- as files


@pytest.mark.parametrize("route", ROUTES)
def test_the_file_is_small_and_names_only_lora_matrices(route: str) -> None:
    file = file_of(route)
    assert file.stat().st_size <= MAX_BYTES
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
    assert names
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight", ".alpha")) for name in names)


def drawn_by(pipe: Any) -> Any:
    with torch.no_grad():
        result = pipe(
            "a red apple",
            num_inference_steps=4,
            guidance_scale=4.0,
            height=128,
            width=128,
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        )
    return result.images[0]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture
def pipe(dtype: torch.dtype) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipe = DiffusionPipeline.from_pretrained(locate("emoji"), torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("route", ROUTES)
def test_diffusers_reads_it_and_draws_the_same(route: str, dtype: torch.dtype, pipe: Any) -> None:
    base = drawn_by(pipe)
    bank = AdapterBank(pipe, byte_budget=1 << 28)
    bank.add(route, file_of(route))
    lease = bank.acquire(route, None)
    assert lease is not None
    with contextlib.ExitStack() as everywhere:
        for component in bank._layers:
            everywhere.enter_context(bank.rows(component, [lease]))
        ours = drawn_by(pipe)
    bank.close()
    assert np.abs(ours - base).max() > 10 * TOLERANCE[torch.float32], "the adapter counts"

    pipe.load_lora_weights(str(file_of(route)))
    theirs = drawn_by(pipe)
    assert np.abs(ours - theirs).max() < TOLERANCE[dtype]
    assert np.abs(ours - theirs).mean() < min(TOLERANCE[dtype], TOLERANCE_MEAN)
