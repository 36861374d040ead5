"""ControlNets beside a pipeline: against plain diffusers, alone and among others; and how they are loaded."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mezzotint.engine import Engine, Request
from mezzotint.engine.results import Image as Pixels
from mezzotint.errors import InvalidRequestError, ModelLoadError
from mezzotint.input_pictures import to_image
from mezzotint.spec import ControlNetSettings, EngineSettings
from tests.engine import tiny
from tests.engine.conftest import same_alone_and_together
from tests.engine.test_editing import DTYPES, PROMPTS, picture, pictures, pipeline
from tests.engine.tiny.controls import CONTROLS, control

ROUTES = ("edges", "depth")
SEVERAL = sorted(set(CONTROLS) - {"qwen-image"})
"""Those whose pipeline follows several ControlNets at once."""


@functools.cache
def nets(name: str, dtype: torch.dtype) -> dict[str, Any]:
    return {route: control(name, dtype, seed) for seed, route in enumerate(ROUTES)}


def requests(name: str) -> list[Request]:
    """Four requests that differ in prompt, steps, guidance, picture, weight and seed; the last has two."""
    call = tiny.call(name)
    width, height = call.pop("width"), call.pop("height")
    return [
        Request(
            prompt=prompt,
            num_inference_steps=2 + index % 2,
            guidance_scale=3.0 + index,
            seed=index,
            width=width,
            height=height,
            negative_prompt=" " if name == "qwen-image" else None,
            control_images=tuple(picture(width, height, index + each) for each in range(num)),
            controlnet_weights=(0.75, 0.5)[:num] if index else (),
            extra=call,
        )
        for index, prompt in enumerate(PROMPTS)
        for num in [2 if index == 3 and name in SEVERAL else 1]
    ]


def plain(name: str, dtype: torch.dtype, request: Request) -> Pixels:
    """What diffusers makes of it; where its pipeline draws from the process, that has the request's seed."""
    base, found = pipeline(name, dtype), list(nets(name, dtype).values())
    cls = getattr(diffusers, type(base).__name__.replace("Pipeline", "ControlNetPipeline"))
    num = len(request.control_images)
    pipe = cls.from_pipe(base, controlnet=found[:num] if num > 1 else found[0], dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    images = [to_image(each) for each in request.control_images]
    by_xl = name in ("stable-diffusion", "stable-diffusion-xl")
    guidance = "true_cfg_scale" if name == "qwen-image" else "guidance_scale"
    arguments = {**request.extra, guidance: request.guidance_scale}
    arguments["image" if by_xl else "control_image"] = images if num > 1 else images[0]
    if request.controlnet_weights:
        weights = list(request.controlnet_weights)
        arguments["controlnet_conditioning_scale"] = weights if num > 1 else weights[0]
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.seed or 0)
        made = pipe(
            prompt=request.prompt,
            num_inference_steps=request.num_inference_steps,
            width=request.width,
            height=request.height,
            generator=torch.Generator().manual_seed(request.seed or 0),
            output_type="np",
            **arguments,
        ).images
    pixels: Pixels = (made[0] * 255).round().astype("uint8")
    return pixels


def without(request: Request) -> Request:
    return replace(request, control_images=(), controlnet_weights=())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONTROLS)
def test_a_controlled_picture_has_the_bytes_of_plain_diffusers(name: str, dtype: torch.dtype) -> None:
    wanted = requests(name)
    expected = [plain(name, dtype, request) for request in wanted]
    engine = Engine(pipeline(name, dtype), rows=1, max_wait_s=0, controlnets=nets(name, dtype))
    try:
        (words,) = pictures(engine, [without(wanted[0])])
        together = pictures(engine, wanted)
    finally:
        engine.close()
    assert np.abs(expected[0].astype(int) - words).mean() > 5  # the picture is followed
    assert all(np.array_equal(got, each) for got, each in zip(together, expected, strict=True))


@pytest.mark.parametrize("name", CONTROLS)
def test_controlled_pictures_share_forwards_and_keep_their_bytes(name: str) -> None:
    dtype = torch.float32
    wanted = [replace(each, controlnet_weights=(0.5,) * len(each.control_images)) for each in requests(name)]
    engine = Engine(pipeline(name, dtype), rows=4, controlnets=nets(name, dtype))
    try:
        same_alone_and_together(engine, [*wanted, *map(without, wanted)])
    finally:
        engine.close()
    assert engine.runner.num_forwards < engine.runner.num_real_rows


def test_the_forwards_of_a_controlnet_merge_too() -> None:
    name = "stable-diffusion-xl"
    engine = Engine(pipeline(name, torch.float32), rows=8, controlnets=nets(name, torch.float32))
    num = 0

    def count(*_: Any) -> None:
        nonlocal num
        num += 1

    handle = nets(name, torch.float32)["edges"].conv_in.register_forward_hook(count)
    same = replace(requests(name)[0], num_inference_steps=4)
    pictures(engine, [same])
    num = 0
    try:
        pictures(engine, [replace(same, seed=seed) for seed in range(4)])
    finally:
        handle.remove()
        engine.close()
    assert num < 4 * 4


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"control_images": (picture(8, 8),) * 3}, "not_supported", "follows edges, depth, in this order"),
        ({"controlnet_weights": (0.5, 0.5)}, "invalid_value", "one weight for each"),
        ({"controlnet_weights": (1.5,)}, "out_of_range", "between 0 and 1"),
        ({"images": (picture(8, 8),)}, "not_supported", "not both"),
    ],
)
def test_what_the_controlnets_cannot_do_is_refused(changes: dict[str, Any], code: str, sentence: str) -> None:
    engine = Engine(pipeline("flux", torch.float32), controlnets=nets("flux", torch.float32))
    (result,) = engine.generate([replace(requests("flux")[0], **changes)])
    engine.close()
    assert isinstance(result.error, InvalidRequestError)
    assert result.error.code == code
    assert sentence in result.error.message


def test_a_model_without_a_controlnet_says_so() -> None:
    engine = Engine(pipeline("flux", torch.float32))
    (result,) = engine.generate([requests("flux")[0]])
    engine.close()
    assert result.error is not None
    assert result.error.code == "not_supported"
    assert "has no ControlNet" in result.error.message


# ---------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name in ("stable-diffusion", "stable-diffusion-xl", "flux"):
        folders[name] = tmp_path_factory.mktemp("controlnets") / name
        nets(name, torch.float32)["edges"].save_pretrained(folders[name])
    return folders


def settings(source: Path | str) -> EngineSettings:
    one = ControlNetSettings(route="edges", source=str(source))
    return EngineSettings(
        dtype="fp32", device="cpu", num_threads=1, performance="reference", controlnets=(one,)
    )


def test_a_controlnet_of_the_settings_is_loaded_beside_the_model(saved: dict[str, Path]) -> None:
    name = "stable-diffusion"
    request = requests(name)[0]
    engine = Engine.load(tiny.build(name, torch.float32), settings(saved[name]), rows=1)
    (made,) = pictures(engine, [request])
    parameters = engine.info().num_parameters
    engine.close()
    assert np.array_equal(made, plain(name, torch.float32, request))
    assert parameters > sum(each.numel() for each in nets(name, torch.float32)["edges"].parameters())


@pytest.mark.parametrize(
    ("of", "code", "sentence"),
    [
        ("flux", "unsupported_class", "follows a ControlNetModel"),
        ("stable-diffusion-xl", "unsupported_class", "does not fit this model"),
        ("nowhere", "model_not_found", "no folder here"),
    ],
)
def test_a_controlnet_of_another_model_is_refused(
    saved: dict[str, Path], of: str, code: str, sentence: str
) -> None:
    with pytest.raises(ModelLoadError, match=sentence) as refusal:
        Engine.load(tiny.build("stable-diffusion", torch.float32), settings(saved.get(of, Path(of))), rows=1)
    assert refusal.value.code == code


def test_a_model_that_follows_no_controlnet_is_not_given_one(saved: dict[str, Path]) -> None:
    with pytest.raises(ModelLoadError, match="no ControlNet for PixArtSigmaPipeline"):
        Engine.load(tiny.build("pixart-sigma", torch.float32), settings(saved["flux"]), rows=1)


def test_weights_that_can_run_a_program_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(saved["flux"] / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((saved["flux"] / "config.json").read_text())
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="can run any program"):
        Engine.load(tiny.build("flux", torch.float32), settings(tmp_path), rows=1)


def test_a_damaged_file_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((saved["flux"] / "config.json").read_text())
    data = (saved["flux"] / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ModelLoadError, match="damaged or cut short"):
        Engine.load(tiny.build("flux", torch.float32), settings(tmp_path), rows=1)


def test_a_union_of_kinds_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((saved["flux"] / "config.json").read_text()) | {"num_mode": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(saved["flux"] / "diffusion_pytorch_model.safetensors")
    weights["controlnet_mode_embedder.weight"] = torch.zeros(2, 32)
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelLoadError, match="union of several kinds"):
        Engine.load(tiny.build("flux", torch.float32), settings(tmp_path), rows=1)
