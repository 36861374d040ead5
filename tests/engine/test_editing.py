"""Pictures go in: every class that edits against plain diffusers, alone and among others."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from PIL import Image

from mezzotint.engine import Engine, Request
from mezzotint.engine.editing import Editing
from mezzotint.engine.results import Image as Pixels
from mezzotint.errors import InvalidRequestError
from mezzotint.input_pictures import to_image
from mezzotint.messages import Done
from mezzotint.spec import InputPicture
from tests.engine import tiny
from tests.engine.adapter_files import transformer_peft, uses, write
from tests.engine.conftest import same_alone_and_together

SEVERAL = ("Flux2KleinPipeline", "QwenImageEditPlusPipeline")
"""Classes that take a list of pictures."""
DTYPES = (torch.float32, torch.bfloat16)
PROMPTS = ("a red fox", "two boats", "big ocean", "one chair")


@dataclass(frozen=True)
class Case:
    """A pipeline of tests/engine/tiny and the class of diffusers that a request with a picture goes to."""

    tiny: str
    cls: str
    mask: bool = False
    guidance: str = "guidance_scale"
    num_pictures: int = 1
    steps: int | None = None
    """None: any number."""
    call: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that this class wants and the text-to-image class does not."""


CASES = {
    "flux": Case("flux", "FluxImg2ImgPipeline"),
    "flux-mask": Case("flux", "FluxInpaintPipeline", mask=True),
    "stable-diffusion": Case("stable-diffusion", "StableDiffusionImg2ImgPipeline"),
    "stable-diffusion-mask": Case("stable-diffusion", "StableDiffusionInpaintPipeline", mask=True),
    "stable-diffusion-xl": Case("stable-diffusion-xl", "StableDiffusionXLImg2ImgPipeline"),
    "stable-diffusion-xl-mask": Case("stable-diffusion-xl", "StableDiffusionXLInpaintPipeline", mask=True),
    "stable-diffusion-3": Case("stable-diffusion-3", "StableDiffusion3Img2ImgPipeline"),
    "stable-diffusion-3-mask": Case("stable-diffusion-3-wide", "StableDiffusion3InpaintPipeline", mask=True),
    "qwen-image": Case("qwen-image", "QwenImageImg2ImgPipeline", guidance="true_cfg_scale"),
    "qwen-image-mask": Case("qwen-image", "QwenImageInpaintPipeline", mask=True, guidance="true_cfg_scale"),
    "z-image": Case("z-image", "ZImageImg2ImgPipeline"),
    "z-image-mask": Case("z-image", "ZImageInpaintPipeline", mask=True),
    "flux2-klein": Case("flux2-klein", "Flux2KleinPipeline"),
    "flux-kontext": Case("flux-kontext", "FluxKontextPipeline"),
    "sana-sprint": Case("sana-sprint", "SanaSprintImg2ImgPipeline", steps=2),
    "qwen-image-edit": Case("qwen-image-edit", "QwenImageEditPipeline", guidance="true_cfg_scale"),
    "qwen-image-layered": Case("qwen-image-layered", "QwenImageLayeredPipeline", guidance="true_cfg_scale"),
    "qwen-image-edit-plus": Case(
        "qwen-image-edit-plus", "QwenImageEditPlusPipeline", guidance="true_cfg_scale", num_pictures=2
    ),
}
NEEDS_VISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="its processor needs torchvision"
)


def cases() -> list[ParameterSet]:
    return [
        pytest.param(name, marks=[NEEDS_VISION] if case.tiny in tiny.VISION_EDITORS else [])
        for name, case in CASES.items()
    ]


@pytest.fixture(autouse=True)
def small_pictures_for_qwen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its editing classes look at a million pixels whatever they are given: here at some thousand."""
    shares = {"qwenimage_edit": 256, "qwenimage_edit_plus": 256, "qwenimage_layered": 25}
    for name, share in shares.items():
        module = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_{name}")
        usual = module.calculate_dimensions

        def small(area: int, ratio: float, usual: Any = usual, share: int = share) -> Any:
            return usual(area // share, ratio)

        monkeypatch.setattr(module, "calculate_dimensions", small)


@functools.cache
def pipeline(name: str, dtype: torch.dtype) -> Any:
    return tiny.build(name, dtype)


def picture(width: int, height: int, seed: int = 0) -> InputPicture:
    """Stripes of colour with some noise."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    noise[:, : width // 2] += np.array([180, 20, 60])
    noise[height // 2 :] += np.array([0, 120, 10])
    return InputPicture(width, height, noise.clip(0, 255).astype(np.uint8).tobytes())


def mask(width: int, height: int) -> InputPicture:
    """White in the middle."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[height // 4 : -height // 4, width // 4 : -width // 4] = 255
    return InputPicture(width, height, pixels.tobytes(), 1)


def requests(case: Case) -> list[Request]:
    """Four requests that differ in prompt, steps, guidance, strength, picture and seed."""
    call = tiny.call(case.tiny)
    width, height = call.pop("width"), call.pop("height")
    call.pop("num_inference_steps", None)
    by_itself = case.cls == type(pipeline(case.tiny, torch.float32)).__name__
    return [
        Request(
            prompt=prompt,
            num_inference_steps=case.steps or 4 + index % 3,
            guidance_scale=3.0 + index,
            seed=index,
            width=width,
            height=height,
            negative_prompt=" " if case.guidance == "true_cfg_scale" else None,
            images=tuple(
                picture(64, 64, index + each) if by_itself else picture(width, height, index)
                for each in range(case.num_pictures)
            ),
            mask=mask(width, height) if case.mask else None,
            strength=None if by_itself else (0.5, 0.75, 1.0, 0.6 if case.steps else 0.4)[index],
            extra=call,
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def plain(case: Case, dtype: torch.dtype, request: Request) -> Pixels:
    """What diffusers makes of it with a pipeline of its own, made the way its manual says."""
    base = pipeline(case.tiny, dtype)
    cls = getattr(diffusers, case.cls)
    pipe = base if isinstance(base, cls) else cls.from_pipe(base, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {**request.extra, **case.call, case.guidance: request.guidance_scale}
    takes = inspect.signature(cls.__call__).parameters
    if "strength" in takes:
        arguments |= {"image": to_image(request.images[0]), "strength": request.strength}
    else:
        mode = "RGBA" if case.cls == "QwenImageLayeredPipeline" else "RGB"
        images = [to_image(each).convert(mode) for each in request.images]
        arguments["image"] = images if case.cls in SEVERAL else images[0]
    if request.mask is not None:
        arguments["mask_image"] = to_image(request.mask)
    if "height" in takes:
        arguments |= {"width": request.width, "height": request.height}
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    made = pipe(
        prompt=request.prompt,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator().manual_seed(request.seed or 0),
        output_type="np",
        **arguments,
    ).images
    pixels: Pixels = (np.asarray(made[0]) * 255).round().astype("uint8")
    if request.mask is not None:
        outside = np.asarray(to_image(request.mask)) == 0
        pixels[outside] = np.asarray(to_image(request.images[0]))[outside]
    return pixels


def pictures(engine: Engine, wanted: list[Request]) -> list[Pixels]:
    """Of one that has layers, all of them."""
    results = engine.generate(wanted)
    for result in results:
        if result.error is not None:
            raise result.error
    return [
        np.stack(result.layers) if result.layers else result.image
        for result in results
        if result.image is not None
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cases())
def test_an_edit_alone_gives_the_bytes_of_plain_diffusers(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    wanted = requests(case)
    expected = [plain(case, dtype, request) for request in wanted]
    assert len({each.tobytes() for each in expected}) == len(wanted)

    engine = Engine(pipeline(case.tiny, dtype), rows=1, max_wait_s=0)
    try:
        alone = pictures(engine, wanted[:1])[0]
        together = pictures(engine, wanted)
    finally:
        engine.close()

    assert np.array_equal(alone, expected[0])
    assert all(np.array_equal(got, each) for got, each in zip(together, expected, strict=True))


@NEEDS_VISION
def test_a_model_that_draws_in_layers_gives_each_with_its_alpha_and_chooses_its_size() -> None:
    engine = Engine(pipeline("qwen-image-layered", torch.float32), rows=2)
    request = replace(requests(CASES["qwen-image-layered"])[0], width=None, height=None)
    sized = replace(request, width=64, height=64, extra={"layers": 1})
    several, single = engine.generate([request, sized])
    assert engine.merges, engine.findings
    engine.close()
    assert [layer.shape for layer in several.layers] == [(128, 128, 4)] * 2
    assert several.image is not None
    assert np.array_equal(several.image, several.layers[0])
    assert len({layer.tobytes() for layer in several.layers}) == 2
    assert several.warnings == ()
    assert single.image is not None
    assert (single.image.shape, single.layers) == ((128, 128, 4), ())
    assert single.warnings == ("width and height had no effect: this model chooses them itself",)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["flux", "stable-diffusion-xl", "qwen-image", "z-image"])
def test_edits_and_generations_share_forwards_and_keep_their_bytes(name: str, dtype: torch.dtype) -> None:
    both = requests(CASES[name])[:2] + requests(CASES[f"{name}-mask"])[:2]
    words = [replace(each, images=(), mask=None, strength=None) for each in both]
    engine = Engine(pipeline(name, dtype), rows=4)
    try:
        same_alone_and_together(engine, [*both, *words])
    finally:
        engine.close()
    assert engine.runner.num_forwards < engine.runner.num_real_rows


@NEEDS_VISION
@pytest.mark.parametrize("name", ["qwen-image-edit", "qwen-image-layered"])
def test_a_class_that_only_edits_merges_and_keeps_its_bytes(name: str) -> None:
    engine = Engine(pipeline(name, torch.float32), rows=4)
    try:
        same_alone_and_together(engine, requests(CASES[name])[:2])
    finally:
        engine.close()
    assert engine.runner.num_forwards < engine.runner.num_real_rows


def test_the_pipelines_for_pictures_share_every_component() -> None:
    pipe = pipeline("flux", torch.bfloat16)
    editing = Engine(pipe).editing
    (edit, *_), (repaint, *_) = requests(CASES["flux"]), requests(CASES["flux-mask"])
    for request in (edit, repaint):
        profile = editing.profile(request)
        assert editing.profile(request) is profile
        shared = {name: part for name, part in profile.pipe.components.items() if part is not None}
        assert all(part is pipe.components[name] for name, part in shared.items())
        assert "transformer" in shared
    assert next(pipe.transformer.parameters()).dtype == torch.bfloat16


def test_a_generation_has_the_same_bytes_beside_edits_as_without_any() -> None:
    words = replace(requests(CASES["flux"])[0], images=(), strength=None)
    without, beside = Engine(pipeline("flux", torch.float32), rows=4), None
    (expected,) = pictures(without, [words])
    without.close()
    beside = Engine(pipeline("flux", torch.float32), rows=4)
    got = pictures(beside, [words, *requests(CASES["flux"])])[0]
    beside.close()
    assert np.array_equal(got, expected)


def test_the_size_comes_from_the_picture() -> None:
    engine = Engine(pipeline("flux", torch.float32))
    (request, *_) = requests(CASES["flux"])
    wide = replace(request, width=None, height=None, images=(picture(60, 20),))
    (made,) = pictures(engine, [wide])
    engine.close()
    assert made.shape == (16, 56, 3)  # at most the model's own 32 x 32 pixels


def test_outside_the_mask_every_pixel_stays() -> None:
    engine = Engine(pipeline("stable-diffusion", torch.bfloat16))
    request = requests(CASES["stable-diffusion-mask"])[0]
    (made,) = pictures(engine, [request])
    engine.close()
    assert request.mask is not None
    outside = np.asarray(to_image(request.mask)) == 0
    before = np.asarray(to_image(request.images[0]))
    assert np.array_equal(made[outside], before[outside])
    assert not np.array_equal(made[~outside], before[~outside])


def test_an_adapter_applies_to_edits_and_rows_of_both_mix(tmp_path: Path) -> None:
    pipe = pipeline("flux", torch.float32)
    file = write(transformer_peft(pipe, 1), tmp_path / "adapter.safetensors")
    base = requests(CASES["flux"])[:2] + requests(CASES["flux-mask"])[:1]
    adapted = [replace(each, adapters=uses("inked")) for each in base]
    engine = Engine(pipe, rows=4)
    try:
        engine.enable_adapters().add("inked", file)
        alone = pictures(engine, base[:1])[0], pictures(engine, adapted[:1])[0]
        assert not np.array_equal(*alone)
        same_alone_and_together(engine, [*base, *adapted])
    finally:
        engine.close()


def test_at_full_strength_nothing_of_the_picture_is_left() -> None:
    """Where the pipeline itself begins from noise alone, as Flux does."""
    request = replace(requests(CASES["flux"])[0], strength=1.0)
    other = replace(request, images=(picture(64, 64, 9),))
    engine = Engine(pipeline("flux", torch.float32))
    one, two = pictures(engine, [request, other])
    engine.close()
    assert np.array_equal(one, two)


def test_only_the_steps_that_run_are_counted() -> None:
    engine = Engine(pipeline("flux", torch.float32))
    request = replace(requests(CASES["flux"])[0], num_inference_steps=10, strength=0.3)
    engine.submit(request, "1", seed=1)
    events = []
    while engine.has_work:
        events += engine.step()
    engine.close()
    told = [(event.step, event.num_steps) for event in events if not isinstance(event, Done)]  # type: ignore[union-attr]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("name", "changes", "code", "sentence"),
    [
        ("pixart-sigma", {}, "not_supported", "makes pictures from words only"),
        ("flux", {"images": (picture(8, 8),) * 2}, "not_supported", "works from 1 picture a request"),
        ("flux2-klein", {"mask": mask(8, 8)}, "not_supported", "repaints no part"),
        ("flux", {"images": (), "mask": mask(8, 8)}, "missing_field", "send image too"),
        ("flux", {"strength": 0.1}, "out_of_range", "at least 1"),
        ("flux", {"strength": 1.5}, "out_of_range", "between 0 and 1"),
        pytest.param(
            "qwen-image-edit", {"images": ()}, "missing_field", "none from words only", marks=NEEDS_VISION
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    name: str, changes: dict[str, Any], code: str, sentence: str
) -> None:
    request = Request(prompt="a fox", num_inference_steps=4, images=(picture(8, 8),))
    engine = Engine(pipeline(name, torch.float32))
    (result,) = engine.generate([replace(request, **changes)])
    engine.close()
    assert isinstance(result.error, InvalidRequestError)
    assert result.error.code == code
    assert sentence in result.error.message


def test_a_strength_without_effect_is_said() -> None:
    engine = Engine(pipeline("flux2-klein", torch.float32))
    (result,) = engine.generate([replace(requests(CASES["flux2-klein"])[0], strength=0.5)])
    engine.close()
    assert result.warnings == ("strength had no effect: this model does not use it",)


@pytest.mark.filterwarnings("ignore")  # of torch.jit, which one of the many classes uses
def test_the_sisters_are_those_of_the_auto_classes() -> None:
    """Where diffusers' own table and the name of a tested class disagree, a request would go astray."""
    from diffusers.pipelines import auto_pipeline

    tables = {
        "_from_picture": auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        "_repaint": auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    }
    named = {cls.__name__: key for key, cls in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items()}
    found = set()
    for name in tiny.FAMILIES:
        editing: Editing = Engine(pipeline(name, torch.float32)).editing
        key = named[type(pipeline(name, torch.float32)).__name__]
        for attribute, table in tables.items():
            if editing.max_pictures and editing.strength:
                assert getattr(editing, attribute) is table.get(key)
                found.add(key)
    assert found == {
        "flux",
        "stable-diffusion",
        "stable-diffusion-xl",
        "stable-diffusion-3",
        "qwenimage",
        "z-image",
    }


def test_a_picture_of_another_size_is_made_to_fit() -> None:
    engine = Engine(pipeline("flux", torch.float32))
    (request, *_) = requests(CASES["flux"])
    large = picture(200, 200)
    fitted = InputPicture(64, 64, to_image(large, (64, 64)).tobytes())
    got, expected = pictures(engine, [replace(request, images=(large,)), replace(request, images=(fitted,))])
    engine.close()
    assert np.array_equal(got, expected)
    assert to_image(large).size == (200, 200) != Image.fromarray(got).size
