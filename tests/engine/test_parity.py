"""Every family against plain diffusers: alone to the byte, merged within tolerance, one seed one picture."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.engine import Engine, EngineSettings, Request
from mezzotint.engine.models import loading
from mezzotint.families import family
from mezzotint.messages import Done, Failed, Progress
from tests.engine import tiny
from tests.engine.rules import RULES

pytestmark = [  # diffusers' own
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
]

DTYPES = (torch.float32, torch.bfloat16)
PROMPTS = ("a red fox", "two boats", "big ocean", "one chair")
"""Of one length: Qwen-Image merges only prompts of as many tokens."""

Image = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]


@dataclass(frozen=True)
class Case:
    """A pipeline of tests/engine/tiny and what its calls have in common."""

    tiny: str
    guidance: str = "guidance_scale"
    """The argument of plain diffusers that the request's guidance_scale is to reach."""
    negative_prompt: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "flux": Case("flux"),
    "flux-schnell": Case("flux-schnell"),
    "flux-true-cfg": Case("flux", negative_prompt="an ugly one", extra={"true_cfg_scale": 3.0}),
    "flux2-klein": Case("flux2-klein"),
    "stable-diffusion": Case("stable-diffusion", negative_prompt="an ugly one"),
    "stable-diffusion-xl": Case("stable-diffusion-xl"),
    "stable-diffusion-3": Case("stable-diffusion-3", negative_prompt="an ugly one"),
    "pixart-sigma": Case("pixart-sigma"),
    "sana": Case("sana"),
    "qwen-image": Case("qwen-image", guidance="true_cfg_scale", negative_prompt="an ugly one"),
    "z-image": Case("z-image", negative_prompt="an ugly one"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The thread count is part of what the bytes depend on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def pipeline(name: str, dtype: torch.dtype) -> Any:
    """Loaded from a folder as an endpoint's model is; its weights lie as they lie in the file."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.save(name, Path(folder))
        short = "fp32" if dtype == torch.float32 else "bf16"
        return loading.load(
            folder,
            EngineSettings(dtype=short, device="cpu", num_threads=1, performance="reference"),
        ).pipe


def requests(case: Case) -> list[Request]:
    """Four requests that differ in prompt, steps, guidance and seed."""
    call = tiny.call(case.tiny)
    width, height = call.pop("width"), call.pop("height")
    return [
        Request(
            prompt=prompt,
            num_inference_steps=2 + index % 3,
            guidance_scale=3.0 + index,
            seed=index,
            width=width,
            height=height,
            negative_prompt=case.negative_prompt,
            extra={**call, **case.extra},
        )
        for index, prompt in enumerate(PROMPTS)
    ]


@functools.cache
def expected_pictures(name: str, dtype: torch.dtype) -> list[Image]:
    """What plain diffusers makes of the requests of a case."""
    return [plain(CASES[name], dtype, request) for request in requests(CASES[name])]


def plain(case: Case, dtype: torch.dtype, request: Request) -> Image:
    arguments = {**request.extra, case.guidance: request.guidance_scale}
    if request.negative_prompt is not None:
        arguments["negative_prompt"] = request.negative_prompt
    images = pipeline(case.tiny, dtype)(
        prompt=request.prompt,
        num_inference_steps=request.num_inference_steps,
        width=request.width,
        height=request.height,
        generator=torch.Generator().manual_seed(request.seed or 0),
        output_type="np",
        **arguments,
    ).images
    picture: Image = (images[0] * 255).round().astype("uint8")
    return picture


def pictures(engine: Engine, wanted: Sequence[Request]) -> list[Image]:
    results = engine.generate(wanted)
    for result in results:
        if result.error is not None:
            raise result.error
    return [result.image for result in results if result.image is not None]


def interleaved(engine: Engine, wanted: Sequence[Request]) -> tuple[list[Image], list[str]]:
    """The pictures, and which job made a step, runs of one job counted once."""
    done: dict[str, Image] = {}
    order: list[str] = []
    for index, request in enumerate(wanted):
        engine.submit(request, str(index), seed=request.seed)
    while len(done) < len(wanted):
        for event in engine.step():
            if isinstance(event, Failed):
                raise AssertionError(event.message)
            if isinstance(event, Done):
                pixels = np.frombuffer(event.payload, np.uint8)
                done[event.job_id] = pixels.reshape(event.height, event.width, 3)
            if isinstance(event, Progress) and order[-1:] != [event.job_id]:
                order.append(event.job_id)
    return [done[str(index)] for index in range(len(wanted))], order


def engine_for(case: Case, dtype: torch.dtype, **settings: Any) -> Engine:
    return Engine(pipeline(case.tiny, dtype), **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_job_alone_gives_the_bytes_of_plain_diffusers(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    wanted = requests(case)
    expected = expected_pictures(name, dtype)
    assert not np.array_equal(expected[0], expected[1])

    engine = engine_for(case, dtype, batching="exact", rows=1, max_wait_s=0)
    try:
        alone = pictures(engine, wanted[:1])[0]
        together, order = interleaved(engine, wanted)
    finally:
        engine.close()

    assert np.array_equal(alone, expected[0])
    assert len(order) > 2 * len(wanted)
    assert all(np.array_equal(got, picture) for got, picture in zip(together, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_merged_jobs_stay_within_the_tolerance_of_their_family(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    wanted = requests(case)
    expected = expected_pictures(name, dtype)
    known = family(type(pipeline(case.tiny, dtype)).__name__)
    tolerance = known.tolerance_fp32 if dtype == torch.float32 else known.tolerance_bf16

    engine = engine_for(case, dtype, batching="fast", max_rows=8)
    try:
        merged = pictures(engine, wanted)
    finally:
        engine.close()

    assert engine.runner.num_forwards < engine.runner.num_real_rows / 2
    for got, picture in zip(merged, expected, strict=True):
        assert np.abs(got.astype(int) - picture.astype(int)).max() <= round(tolerance * 255)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_seed_gives_the_same_bytes_whoever_else_runs(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    wanted = requests(case)
    others = [dataclasses.replace(request, seed=100 + index) for index, request in enumerate(wanted)]
    engine = engine_for(case, dtype, batching="exact", rows=4)
    try:
        alone = [pictures(engine, [request])[0] for request in wanted]
        backwards = pictures(engine, wanted[::-1])[::-1]
        among_others = pictures(engine, [*others[:2], wanted[0], others[2], *wanted[1:], others[3]])
    finally:
        engine.close()

    assert engine.runner.num_forwards < engine.runner.num_real_rows
    kept = [among_others[index] for index in (2, 4, 5, 6)]
    for index in range(len(wanted)):
        assert np.array_equal(backwards[index], alone[index])
        assert np.array_equal(kept[index], alone[index])


@pytest.mark.parametrize("name", ["flux", "stable-diffusion-xl", "sana", "z-image"])
def test_the_auto_performance_setting_keeps_the_promise_too(name: str) -> None:
    case, dtype = CASES[name], torch.bfloat16
    wanted = requests(case)
    pipe = tiny.build(case.tiny, dtype)
    loading.tune(pipe, "auto")
    engine = Engine(pipe, batching="exact", rows=4)
    alone = [pictures(engine, [request])[0] for request in wanted]
    together = pictures(engine, wanted[::-1])[::-1]
    engine.close()

    for index, picture in enumerate(expected_pictures(name, dtype)):
        difference = np.abs(alone[index].astype(int) - picture.astype(int)) / 255
        assert np.array_equal(together[index], alone[index])
        assert difference.max() <= loading.TOLERANCE[dtype]
        assert difference.mean() <= loading.TOLERANCE[dtype] / 10


@pytest.mark.parametrize("name", CASES)
def test_what_is_inferred_and_proven_is_what_was_written_by_hand(name: str) -> None:
    case = CASES[name]
    engine = engine_for(case, torch.float32, rows=4)
    engine.find_rules(requests(case)[0])
    engine.close()
    finding = engine.findings[engine.profile.denoiser_name]
    assert finding.rule is not None, finding.reason
    expected = RULES[type(engine.profile.denoiser).__name__].arguments
    assert finding.rule.arguments.items() <= expected.items()


def test_texts_of_different_length_share_forwards_and_keep_their_bytes() -> None:
    case = CASES["qwen-image"]
    wanted = [
        dataclasses.replace(request, prompt=prompt, num_inference_steps=2)
        for request, prompt in zip(requests(case), ("fox", "two boats at dawn", "a chair"), strict=False)
    ]
    engine = engine_for(case, torch.float32, rows=4)
    alone = [pictures(engine, [request])[0] for request in wanted]
    before = engine.runner.num_forwards
    together = pictures(engine, wanted)
    engine.close()
    assert engine.runner.num_forwards - before == 4, "two a step, with guidance"
    for one, other, request in zip(alone, together, wanted, strict=True):
        assert np.array_equal(one, other)
        expected = plain(case, torch.float32, request)
        assert np.abs(one.astype(int) - expected.astype(int)).max() <= 1


def test_every_denoiser_with_a_known_rule_has_a_case() -> None:
    pipes = [pipeline(case.tiny, torch.float32) for case in CASES.values()]
    denoisers = {type(pipe.components[family(type(pipe).__name__).denoiser]).__name__ for pipe in pipes}
    assert denoisers == set(RULES)
