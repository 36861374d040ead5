"""Remembered results of text encoders: the same bytes as without, fewer forwards, and never by mistake."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mezzotint.engine import Engine, Request
from mezzotint.engine.steps.batching import Call
from mezzotint.engine.steps.text_cache import TextCache
from mezzotint.spec import AdapterUse, Batching
from tests.engine import adapter_files, tiny

PROMPTS = ("a red fox", "a red fox", "two boats at dawn", "a red fox", "two boats at dawn")
NEGATIVE = ("stable-diffusion-xl", "stable-diffusion-3", "pixart-sigma", "sana", "qwen-image")
FAMILIES = ("flux", "flux2-klein", "z-image", *NEGATIVE)


class Counted:
    """A pipeline whose text encoders count their forwards."""

    def __init__(self, name: str) -> None:
        self.pipe: Any = tiny.build(name)
        self.num_forwards = 0
        for part in self.pipe.components.values():
            if isinstance(part, PreTrainedModel):
                part.forward = self._counting(part.forward)

    def _counting(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counting(*args: Any, **kwargs: Any) -> Any:
            self.num_forwards += 1
            return forward(*args, **kwargs)

        return counting


def wanted(name: str, adapters: tuple[AdapterUse, ...] = ()) -> list[Request]:
    call = tiny.call(name)
    width, height = call.pop("width"), call.pop("height")
    return [
        Request(
            prompt=prompt,
            num_inference_steps=1 + seed % 2,
            seed=seed,
            guidance_scale=4.0,
            negative_prompt="blurred" if name in NEGATIVE else None,
            width=width,
            height=height,
            adapters=adapters,
            extra=call,
        )
        for seed, prompt in enumerate(PROMPTS)
    ]


def bytes_of(engine: Engine, requests: list[Request]) -> list[bytes]:
    found = []
    for result in engine.generate(requests):
        assert result.image is not None, result.error
        found.append(result.image.tobytes())
    return found


@pytest.mark.parametrize("batching", ["exact", "fast"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_bytes_are_those_without_and_the_forwards_fewer(name: str, batching: Batching) -> None:
    requests, found, forwards = wanted(name), [], []
    for max_bytes in (0, 2**26):
        counted = Counted(name)
        engine = Engine(counted.pipe, batching=batching, rows=2, max_rows=2, text_cache_bytes=max_bytes)
        found.append([bytes_of(engine, requests) for _ in range(2)])
        forwards.append(counted.num_forwards)
        engine.close()
    assert found[0] == found[1]
    texts = engine.runner.texts
    assert texts.hits > texts.misses > 0
    assert forwards[1] == forwards[0] - texts.hits


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """Engines that remember nothing and much, with two adapters that change the text encoders."""
    folder: Path = tmp_path_factory.mktemp("adapters")
    engines = []
    for max_bytes in (0, 2**26):
        pipe = tiny.build("stable-diffusion-xl")
        files = [
            adapter_files.write(adapter_files.sdxl_kohya(pipe, seed), folder / f"{seed}.safetensors")
            for seed in (1, 2)
        ]
        engine = Engine(pipe, rows=2, text_cache_bytes=max_bytes)
        for route, file in zip("ab", files, strict=True):
            engine.enable_adapters().add(route, file)
        engines.append(engine)
    yield engines[0], engines[1]
    for engine in engines:
        engine.close()


def test_an_adapter_of_the_text_has_results_of_its_own_at_each_scale(sdxl: tuple[Engine, Engine]) -> None:
    plain, remembering = sdxl
    uses = [(), (AdapterUse("a"),), (AdapterUse("a", 0.5),), (AdapterUse("b"),), (AdapterUse("a"),)]
    requests = [wanted("stable-diffusion-xl", adapters)[0] for adapters in uses]
    found = bytes_of(remembering, requests)
    assert found == bytes_of(remembering, requests) == bytes_of(plain, requests)
    assert len(set(found)) == 4
    assert remembering.runner.texts.hits > 0


def test_an_adapter_that_was_replaced_leaves_nothing_behind(sdxl: tuple[Engine, Engine]) -> None:
    requests = [wanted("stable-diffusion-xl", (AdapterUse("a"),))[0]]
    before, after = [], []
    for engine in sdxl:
        bank = engine.enable_adapters()
        before.append(bytes_of(engine, [*requests, *requests, *requests]))
        bank.register("a", bank.info("b").file)
        after.append(bytes_of(engine, [*requests, *requests, *requests]))
    assert before[0] == before[1]
    assert after[0] == after[1]
    assert before[0] != after[0]


def call(run: Any, text: torch.Tensor, **more: Any) -> Call:
    return Call("text_encoder", run, (), {"text": text, **more}, repeatable=True)


def results(cache: TextCache, run: Any, *values: float, **more: Any) -> list[float]:
    return [float(cache.result(call(run, torch.full((8,), float(value)), **more))[0]) for value in values]


def double(text: torch.Tensor) -> torch.Tensor:
    return text * 2


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    cache = TextCache(3 * 32)
    assert results(cache, double, 1, 1, 2, 3, 1, 4) == [2, 2, 4, 6, 2, 8]
    assert (cache.num_bytes, cache.hits, cache.misses) == (96, 1, 5)  # the first repeat ran: it is the proof
    results(cache, double, 3, 1, 4)
    assert cache.hits == 4
    results(cache, double, 2)
    assert (cache.num_bytes, cache.hits) == (96, 4)


def test_a_result_that_is_larger_than_the_budget_is_not_kept() -> None:
    cache = TextCache(31)
    results(cache, double, 1, 1, 1)
    assert (cache.num_bytes, cache.hits) == (0, 0)


def test_what_a_pipeline_writes_into_a_result_is_not_remembered() -> None:
    cache = TextCache(1000)
    for _ in range(4):
        found = cache.result(call(double, torch.ones(8)))
        assert found.tolist() == [2.0] * 8
        found.zero_()
    assert cache.hits == 2


def test_parts_of_one_storage_stay_parts_of_one_and_keep_their_strides() -> None:
    cache = TextCache(1000)

    def parts(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.stack([text, text + 1]).T
        return whole, whole[:, 1]

    first, *_, last = [cache.result(call(parts, torch.ones(8))) for _ in range(3)]
    assert cache.hits == 1
    assert [each.stride() for each in last] == [each.stride() for each in first] == [(1, 8), (1,)]
    assert last[1].untyped_storage().data_ptr() == last[0].untyped_storage().data_ptr()


def noisy(text: torch.Tensor) -> torch.Tensor:
    return text + torch.rand(8)


class Counting:
    """Keeps state: every call adds one more."""

    def __init__(self) -> None:
        self.num = 0

    def __call__(self, text: torch.Tensor) -> torch.Tensor:
        self.num += 1
        return text + self.num


def writing(text: torch.Tensor) -> torch.Tensor:
    return text.add_(1)


@pytest.mark.parametrize("run", [noisy, Counting(), writing])
def test_a_module_that_is_not_a_function_of_its_inputs_runs_every_time(run: Any) -> None:
    cache = TextCache(1000)
    results(cache, run, 1, 1, 1, 1)
    assert (cache.hits, cache.num_bytes) == (0, 0)


def test_a_call_with_something_else_than_tensors_and_plain_values_runs_every_time() -> None:
    cache = TextCache(1000)
    for more in ({"state": object()}, {"state": torch.Generator()}):
        results(cache, lambda text, state: text, 1, 1, 1, **more)
    assert (cache.hits, cache.misses) == (0, 0)


def test_equal_numbers_of_different_types_are_different_inputs() -> None:
    cache = TextCache(1000)
    run = lambda text, flag: text + (5 if flag is True else 0)  # noqa: E731
    assert results(cache, run, 1, 1, 1, flag=True) == [6, 6, 6]
    assert results(cache, run, 1, 1, flag=1) == [1, 1]
