"""One vocabulary: what the wire, the settings and the messages share travels by its name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mezzotint.config import EndpointSettings
from mezzotint.images import Parameters
from mezzotint.messages import LoadModel, decode, encode
from mezzotint.schemas import make_body
from mezzotint.server.work.profiles import load_message
from mezzotint.spec import AdapterUse, ControlNetSettings, EngineSettings, ImageSpec

ENGINE = Path(__file__).parents[1] / "src" / "mezzotint" / "engine"
CHANGED: dict[str, Any] = {
    "revision": "v2",
    "dtype": "fp16",
    "device": "cuda:1",
    "num_threads": 3,
    "batching": "fast",
    "performance": "max",
    "max_rows": 5,
    "max_jobs": 7,
    "min_batch_gain": 1.9,
    "max_batch_stretch": 3.5,
    "max_wait_s": 4.0,
    "offload": True,
    "allow_remote_code": "studio/own@" + "0" * 40,
    "adapter_bytes": 123,
    "text_cache_bytes": 45,
    "default_steps": 9,
    "default_guidance": 2.5,
    "width": 64,
    "height": 32,
    "scheduler": "DDIMScheduler",
    "scheduler_settings": {"shift": 5.0},
    "arguments": {"clip_skip": 1},
    "controlnets": (ControlNetSettings(route="edges", source="studio/edges"),),
}


def test_every_engine_setting_is_tried_here() -> None:
    assert set(CHANGED) == set(EngineSettings.model_fields)


@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_of_an_endpoint_reaches_its_worker(name: str) -> None:
    spec = EndpointSettings(id="one", **{name: CHANGED[name]})
    message = decode(encode(load_message(spec, None)))
    assert isinstance(message, LoadModel)
    assert getattr(message.settings, name) == CHANGED[name] != getattr(EngineSettings(), name)


def test_what_was_called_compiled_is_max() -> None:
    assert EngineSettings.model_validate({"performance": "compiled"}).performance == "max"


@pytest.mark.parametrize("name", CHANGED)
def test_the_engine_reads_every_setting(name: str) -> None:
    reads = re.compile(rf"\b(settings|said)\.{name}\b")
    assert any(reads.search(file.read_text()) for file in ENGINE.rglob("*.py"))


def test_a_body_becomes_the_spec_that_the_file_gives_back() -> None:
    body = make_body(
        {
            "model": "emoji:ink",
            "prompt": "a cat",
            "num_inference_steps": 8,
            "seed": 3,
            "guidance_scale": None,
            "width": 64,
            "height": 32,
        }
    )
    assert body.spec == ImageSpec(
        prompt="a cat", num_inference_steps=8, seed=3, width=64, height=32, adapters=(AdapterUse("ink"),)
    )
    made = Parameters(body.model, body.spec)
    assert Parameters.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "a cat", "num_inference_steps": 8},
        {"model": 3, "prompt": "a cat", "num_inference_steps": 8},
        {"model": "emoji", "prompt": "a cat", "num_inference_steps": "8"},
        {"model": "emoji", "prompt": "a cat", "num_inference_steps": 8, "extra": {"output_type": "pil"}},
        {"model": "emoji", "prompt": "a cat", "num_inference_steps": 8, "later": 1},
        {"model": "emoji:ink", "prompt": "a cat", "num_inference_steps": 8, "adapter_scale": "x"},
    ],
)
def test_parameters_of_another_shape_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  any of its kinds
        Parameters.from_dict(values)
