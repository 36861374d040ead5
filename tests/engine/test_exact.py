"""A seed is a promise: in `exact` mode a request has one set of bytes, whatever runs beside it."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from mezzotint.engine import Engine, Request
from mezzotint.messages import Done, Failed
from tests.engine import tiny
from tests.engine.conftest import same_alone_and_together

ROWS = 4
DTYPES = (torch.float32, torch.bfloat16)
PROMPTS = ("a red fox", "two boats at dawn", "", "an old map of an island nobody has found", "one chair")

Pictures = dict[int, bytes]


def wanted(num: int, name: str = "flux") -> list[Request]:
    """`num` requests that differ in prompt, steps, guidance and seed."""
    call = tiny.call(name)
    width, height = call.pop("width"), call.pop("height")
    if name == "flux":
        width = height = 32  # 64 tokens are enough here
    return [
        Request(
            prompt=PROMPTS[index % len(PROMPTS)],
            num_inference_steps=(2, 1, 3, 2, 5)[index % 5],
            guidance_scale=1.5 + index % 4,
            seed=index // 2,
            width=width,
            height=height,
            extra=call,
        )
        for index in range(num)
    ]


REQUESTS = wanted(16)


@dataclass
class Run:
    """An engine and the requests given to it by number."""

    engine: Engine

    def submit(self, *indices: int) -> None:
        for index in indices:
            self.engine.submit(REQUESTS[index], str(index))

    def steps(self, num: int) -> Pictures:
        found: Pictures = {}
        for _ in range(num):
            found |= self._done()
        return found

    def rest(self) -> Pictures:
        found: dict[int, bytes] = {}
        while self.engine.has_work:
            found |= self._done()
        return found

    def cancel(self, *indices: int) -> None:
        for index in indices:
            assert self.engine.cancel(str(index))

    def _done(self) -> dict[int, bytes]:
        events = self.engine.step()
        failed = [event for event in events if isinstance(event, Failed)]
        assert not failed
        return {int(event.job_id): event.payload for event in events if isinstance(event, Done)}


def all_at_once(run: Run) -> Pictures:
    run.submit(*range(16))
    return run.rest()


def in_reverse_order(run: Run) -> Pictures:
    run.submit(*reversed(range(16)))
    return run.rest()


def two_at_a_time(run: Run) -> Pictures:
    found: dict[int, bytes] = {}
    for index in range(0, 16, 2):
        run.submit(index, index + 1)
        found |= run.rest()
    return found


def as_many_as_rows(run: Run) -> Pictures:
    run.submit(*range(ROWS))
    return run.rest()


def one_more_than_rows(run: Run) -> Pictures:
    run.submit(*range(ROWS + 1))
    return run.rest()


def one_joins_at_every_step(run: Run) -> Pictures:
    found: dict[int, bytes] = {}
    for index in range(16):
        run.submit(index)
        found |= run.steps(1)
    return found | run.rest()


def the_same_twice_side_by_side(run: Run) -> Pictures:
    run.submit(3)
    run.engine.submit(REQUESTS[3], "103")
    run.submit(7, 8)
    found = run.rest()
    assert found.pop(103) == found[3]
    return found


def among_cancelled_ones(run: Run) -> Pictures:
    run.submit(*range(8))
    found = run.steps(20)
    gone = [index for index in (0, 2, 4) if index not in found]
    run.cancel(*gone)
    assert gone
    return found | run.rest()


def cancelled_and_made_again(run: Run) -> Pictures:
    run.submit(4, 5, 6)
    found = run.steps(12)
    run.cancel(4)
    run.submit(4)
    return found | run.rest()


def long_ones_overtaken_by_short_ones(run: Run) -> Pictures:
    run.submit(4, 9, 14)
    found = run.steps(12)
    run.submit(1, 6, 11)
    return found | run.rest()


def beside_another_size(run: Run) -> Pictures:
    for index in range(3):
        other = replace(REQUESTS[index], width=48, height=32)
        run.engine.submit(other, str(200 + index))
    run.submit(2, 3, 4)
    return {index: data for index, data in run.rest().items() if index < 200}


def beside_two_forwards_a_step(run: Run) -> Pictures:
    for index in range(2):
        true_cfg = {**REQUESTS[index].extra, "true_cfg_scale": 3.0}
        other = replace(REQUESTS[index], negative_prompt="ugly", extra=true_cfg)
        run.engine.submit(other, str(300 + index))
    run.submit(0, 1, 2)
    return {index: data for index, data in run.rest().items() if index < 300}


def with_priorities(run: Run) -> Pictures:
    for index in range(8):
        run.engine.submit(REQUESTS[index], str(index), priority=index % 3)
    return run.rest()


def everything_overdue(run: Run) -> Pictures:
    run.engine.max_wait_s = 0.0
    run.submit(*range(8))
    return run.rest()


def in_a_random_order_with_random_pauses(run: Run) -> Pictures:
    chance = random.Random(7)
    order = list(range(16))
    chance.shuffle(order)
    found: dict[int, bytes] = {}
    for index in order:
        run.submit(index)
        found |= run.steps(chance.randrange(5))
    return found | run.rest()


SCENARIOS: tuple[Callable[[Run], Pictures], ...] = (
    all_at_once,
    in_reverse_order,
    two_at_a_time,
    as_many_as_rows,
    one_more_than_rows,
    one_joins_at_every_step,
    the_same_twice_side_by_side,
    among_cancelled_ones,
    cancelled_and_made_again,
    long_ones_overtaken_by_short_ones,
    beside_another_size,
    beside_two_forwards_a_step,
    with_priorities,
    everything_overdue,
    in_a_random_order_with_random_pauses,
)


@functools.cache
def pipeline(name: str, dtype: torch.dtype) -> Any:
    return tiny.build(name, dtype)


@functools.cache
def alone(dtype: torch.dtype) -> Pictures:
    """Every request by itself, in an engine of its own."""
    engine = Engine(pipeline("flux", dtype), rows=ROWS)
    run = Run(engine)
    found: Pictures = {}
    for index in range(16):
        run.submit(index)
        found.update(run.rest())
    engine.close()
    assert len(set(found.values())) == 16
    return found


@pytest.fixture
def run(dtype: torch.dtype) -> Iterator[Run]:
    engine = Engine(pipeline("flux", dtype), rows=ROWS)
    yield Run(engine)
    engine.close()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_request_has_the_same_bytes_as_alone(
    scenario: Callable[[Run], Pictures], run: Run, dtype: torch.dtype
) -> None:
    found = scenario(run)
    assert len(found) >= 3
    expected = alone(dtype)
    assert [index for index, data in sorted(found.items()) if data != expected[index]] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forwards_really_are_shared(dtype: torch.dtype) -> None:
    engine = Engine(pipeline("flux", dtype), rows=ROWS)
    run = Run(engine)
    run.submit(*range(16))
    run.rest()
    engine.close()
    steps = sum(request.num_inference_steps for request in REQUESTS)
    assert engine.runner.num_real_rows == steps
    assert engine.runner.num_forwards < steps / 2


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("stable-diffusion", 2),
        ("stable-diffusion-xl", 3),
        ("stable-diffusion-3", 4),
        ("pixart-sigma", 4),
        ("sana", 2),
    ],
)
def test_calls_of_two_rows_keep_the_promise_too(name: str, rows: int) -> None:
    """Classifier-free guidance sends two rows at once; guidance 1 sends one."""
    requests = [replace(each, guidance_scale=1.0 if each.seed == 2 else 4.0) for each in wanted(5, name)]
    engine = Engine(pipeline(name, torch.float32), rows=rows)
    same_alone_and_together(engine, requests)
    engine.close()


def test_rows_that_threads_may_cut_in_the_middle_keep_their_bytes() -> None:
    """Two threads cut five rows of fp32 in mid-row, where vector code ends and scalar code begins."""
    torch.set_num_threads(2)
    engine = Engine(pipeline("flux", torch.float32), rows=5)
    requests = wanted(5)
    same_alone_and_together(engine, requests)
    engine.close()


def test_a_shape_whose_rows_depend_on_their_place_is_not_merged() -> None:
    """A model that tells the rows apart stands for a kernel that does so on some machine."""
    pipe = tiny.build("flux")
    plain = pipe.transformer.forward

    @functools.wraps(plain)
    def by_place(**arguments: Any) -> tuple[torch.Tensor]:
        (rows,) = plain(**arguments)
        return (rows * (1 + torch.arange(len(rows)).view(-1, 1, 1) / 8),)

    pipe.transformer.forward = by_place
    engine = Engine(pipe, rows=ROWS)
    requests = wanted(5)
    same_alone_and_together(engine, requests)
    engine.close()
    assert engine.runner.num_forwards == 2 * sum(each.num_inference_steps for each in requests)
    assert engine.runner.num_padded_rows == 0


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [(FlowMatchLCMScheduler, {}), (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True})],
)
def test_noise_that_a_scheduler_draws_comes_from_the_seed(scheduler: Any, options: dict[str, Any]) -> None:
    """Pipelines of flow-matching models hand their generator to no step of the scheduler."""
    pipe = tiny.build("flux")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **options)
    engine = Engine(pipe, rows=ROWS)
    requests = [REQUESTS[4], REQUESTS[9], replace(REQUESTS[4], seed=77)]
    single = [engine.generate([request])[0].image for request in requests]
    together = [result.image for result in engine.generate(requests)]
    engine.close()
    pictures = [image.tobytes() for image in (*single, *together) if image is not None]
    assert pictures[:3] == pictures[3:]
    assert len(set(pictures)) == 3


def test_a_second_engine_gives_the_bytes_of_the_first() -> None:
    """The first request of a process and the thousandth: nothing warms up, nothing wears out."""
    first = Engine(pipeline("flux", torch.bfloat16), rows=ROWS)
    (result,) = first.generate([REQUESTS[4]])
    first.close()
    assert result.image is not None
    assert result.image.tobytes() == alone(torch.bfloat16)[4]
