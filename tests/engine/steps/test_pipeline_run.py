"""The greenlet bridge: an unmodified pipeline parks at every shared forward, and can be ended at each."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezzotint.engine.steps.pipeline_run import PipelineRun, Tap


class Double(nn.Module):
    def forward(self, x: Tensor, *, times: int = 2) -> Tensor:
        return x * times


class Steps:
    """Looks like a scheduler."""

    def __init__(self) -> None:
        self.steps_taken: list[float] = []

    def set_timesteps(self, num: int) -> None:
        self.timesteps = list(range(num))

    def step(self, model_output: Tensor, timestep: int, sample: Tensor) -> Tensor:
        self.steps_taken.append(float(model_output))
        return model_output


class Loop:
    """Looks like a pipeline: calls its module once a step."""

    def __init__(self) -> None:
        self.transformer = Double()
        self.scheduler = Steps()
        self.guidance = 0.0

    @property
    def components(self) -> Mapping[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}

    def __call__(self, num: int, generator: torch.Generator, guidance: float = 0.0, fault: str = "") -> Any:
        self.guidance = guidance
        self.scheduler.set_timesteps(num)
        x = torch.ones(())
        with torch.no_grad():
            for t in self.scheduler.timesteps:
                try:
                    out = self.transformer(x)
                except ArithmeticError:
                    if fault != "forgives":
                        raise
                    out = x
                x = self.scheduler.step(out, t, x)
        return x, self.guidance, torch.rand((), generator=generator).item()

    def maybe_free_model_hooks(self) -> None:
        raise AssertionError("one job must not free what others use")


@pytest.fixture
def loop() -> Iterator[Loop]:
    pipe = Loop()
    tap = Tap("transformer", pipe.transformer)
    with torch.inference_mode():
        yield pipe
    tap.close()


def finish(job: PipelineRun) -> Any:
    job.start()
    while job.call is not None:
        job.resume(job.call.alone())
    return job.result


def test_a_job_runs_to_the_result_of_the_pipeline_itself(loop: Loop) -> None:
    expected = copy.copy(loop)(3, torch.Generator().manual_seed(5), guidance=2.0)
    assert finish(PipelineRun(loop, {"num": 3, "guidance": 2.0}, seed=5)) == expected


def test_jobs_take_turns_and_keep_their_own_schedulers_and_settings(loop: Loop) -> None:
    one = PipelineRun(loop, {"num": 2, "guidance": 1.0}, seed=1)
    two = PipelineRun(loop, {"num": 3, "guidance": 2.0}, seed=2)
    for job in (one, two):
        job.start()
    while one.call or two.call:
        for job in (one, two):
            if job.call is not None:
                job.resume(job.call.alone())
    assert (float(one.result[0]), one.result[1], one.num_steps) == (4.0, 1.0, 2)
    assert (float(two.result[0]), two.result[1], two.num_steps) == (8.0, 2.0, 3)
    assert loop.guidance == 0.0
    assert loop.scheduler.steps_taken == []


def test_a_tapped_module_runs_as_always_outside_a_job(loop: Loop) -> None:
    assert float(loop.transformer(torch.tensor(4.0))) == 8.0
    assert "times" in inspect.signature(loop.transformer.forward).parameters


def test_closing_a_tap_puts_the_previous_attribute_back() -> None:
    plain, hooked = Double(), Double()
    hook = hooked.__dict__["forward"] = plain.forward  # as accelerate does
    taps = [Tap("a", plain), Tap("b", hooked)]
    assert "forward" in plain.__dict__
    for tap in taps:
        tap.close()
    assert "forward" not in plain.__dict__
    assert hooked.__dict__["forward"] is hook


def test_a_tap_leaves_alone_what_somebody_patched_after_it() -> None:
    module = Double()
    tap = Tap("a", module)
    later = module.__dict__["forward"] = Double().forward
    tap.close()
    assert module.__dict__["forward"] is later


def test_an_error_handed_to_the_parked_call_is_raised_inside_the_pipeline(loop: Loop) -> None:
    failing = PipelineRun(loop, {"num": 2}, seed=1)
    failing.start()
    failing.fail(ZeroDivisionError("no"))
    assert isinstance(failing.error, ZeroDivisionError)
    assert failing.call is None

    forgiving = PipelineRun(loop, {"num": 2, "fault": "forgives"}, seed=1)
    forgiving.start()
    forgiving.fail(ZeroDivisionError("no"))
    assert forgiving.error is None
    assert forgiving.call is not None
    forgiving.close()


def test_arguments_that_the_pipeline_refuses_are_the_jobs_error(loop: Loop) -> None:
    job = PipelineRun(loop, {"num": 1, "colour": "red"}, seed=1)
    job.start()
    assert isinstance(job.error, TypeError)
    job.close()


def test_closing_unwinds_the_pipeline_where_it_stands() -> None:
    events: list[str] = []

    class Careful(Loop):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().__call__(*args, **kwargs)
            finally:
                events.append("unwound")

    pipe = Careful()
    tap = Tap("transformer", pipe.transformer)
    with torch.inference_mode():
        job = PipelineRun(pipe, {"num": 5}, seed=1)
        job.start()
        assert events == []
        job.close()
        assert events == ["unwound"]
        job.close()
    assert job.call is None
    assert job.result is None
    tap.close()


def test_a_pipeline_that_swallows_everything_still_ends_when_closed() -> None:
    class Stubborn(Loop):
        def __call__(self, num: int, generator: torch.Generator) -> Any:  # type: ignore[override]
            while True:
                try:
                    self.transformer(torch.ones(()))
                except BaseException:
                    self.transformer(torch.ones(()))

    pipe = Stubborn()
    tap = Tap("transformer", pipe.transformer)
    with torch.inference_mode():
        job = PipelineRun(pipe, {"num": 1}, seed=1)
        job.start()
        job.close()
    assert job.call is None
    tap.close()


def test_a_job_that_never_started_can_be_closed(loop: Loop) -> None:
    job = PipelineRun(loop, {"num": 1}, seed=1)
    job.close()
    assert job.call is None


def test_a_forward_that_wants_gradients_or_autocast_runs_in_place() -> None:
    class Mixed(Loop):
        def __call__(self, generator: torch.Generator) -> Any:  # type: ignore[override]
            with torch.enable_grad():
                first = self.transformer(torch.ones(()))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                second = self.transformer(torch.ones(()))
            return first + second

    pipe = Mixed()
    tap = Tap("transformer", pipe.transformer)
    with torch.no_grad():
        job = PipelineRun(pipe, {}, seed=1)
        job.start()
        assert float(job.result) == 4.0
        assert not torch.is_grad_enabled()
    tap.close()


def test_gradients_stay_off_however_jobs_interleave(loop: Loop) -> None:
    one, two = PipelineRun(loop, {"num": 1}, seed=1), PipelineRun(loop, {"num": 2}, seed=1)
    one.start()
    two.start()
    for job in (one, two, two):
        assert job.call is not None
        assert not torch.is_grad_enabled()
        job.resume(job.call.alone())
    assert not torch.is_grad_enabled()


@pytest.mark.parametrize("end", ["finish", "close", "fail"])
def test_an_ended_job_is_freed_at_once_without_the_garbage_collector(loop: Loop, end: str) -> None:
    gc.collect()
    gc.disable()
    try:
        job = PipelineRun(loop, {"num": 2}, seed=1, before_step=lambda scheduler, arguments: None)
        job.start()
        assert job.call is not None
        held = weakref.ref(job.call.args[0])
        if end == "finish":
            while job.call is not None:
                job.resume(job.call.alone())
        elif end == "fail":
            job.fail(ZeroDivisionError("no"))
        job.close()
        job.error = None
        gone = weakref.ref(job)
        del job
        assert gone() is None
        assert held() is None
    finally:
        gc.enable()


def test_the_step_hook_sees_the_scheduler_before_each_step(loop: Loop) -> None:
    seen: list[tuple[int, float]] = []

    def hook(scheduler: Any, arguments: Mapping[str, Any]) -> None:
        seen.append((len(scheduler.steps_taken), float(arguments["model_output"])))

    finish(PipelineRun(loop, {"num": 3}, seed=1, before_step=hook))
    assert seen == [(0, 2.0), (1, 4.0), (2, 8.0)]
