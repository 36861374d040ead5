"""What a run changes on what it shares stays its own: processors, hooks, generators, guiders, `generate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import ConfigMixin
from torch import Tensor, nn

from mezzotint.engine.models import forms
from mezzotint.engine.steps.pipeline_run import PipelineRun, Tap
from mezzotint.engine.steps.shared_state import AttentionState


class Attention(nn.Module):
    """Adds what its processor says."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.processor


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.said: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x)
        return result

    def generate(self, x: Tensor) -> Tensor:
        """A language model that keeps a token on itself between two forwards."""
        self.said.append(int(x))
        result: Tensor = self(self(x)) + self.said.pop()
        return result


class Guider(ConfigMixin):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seen: list[float] = []


class Pipe:
    def __init__(self) -> None:
        self.transformer = Denoiser()
        self.guider = Guider()

    @property
    def components(self) -> Mapping[str, Any]:
        return {"transformer": self.transformer, "guider": self.guider}

    def __call__(self, act: Callable[[Pipe], Any], generator: torch.Generator) -> Any:
        return act(self)


def perturbed(processor: float) -> Callable[[Pipe], float]:
    """As perturbed-attention guidance does: sets its processor, runs two steps, puts the old one back."""

    def act(pipe: Pipe) -> float:
        attention = pipe.transformer.attention
        before, attention.processor = attention.processor, processor
        result = pipe.transformer(pipe.transformer(torch.zeros(())))
        attention.processor = before
        return float(result)

    return act


def hooked(pipe: Pipe) -> float:
    handle = pipe.transformer.attention.register_forward_hook(lambda module, args, result: result * 10)
    result = pipe.transformer(pipe.transformer(torch.zeros(())))
    handle.remove()
    return float(result)


def drawing(pipe: Pipe) -> tuple[float, float]:
    first = torch.rand(()).item()
    pipe.transformer(torch.zeros(()))
    return first, torch.rand(()).item()


def usual(pipe: Pipe) -> float:
    return float(pipe.transformer(torch.zeros(())))


def guided(pipe: Pipe) -> list[float]:
    for number in (1.0, 2.0):
        pipe.guider.seen.append(number)
        pipe.transformer(torch.zeros(()))
    return pipe.guider.seen


def speaking(pipe: Pipe) -> float:
    return float(pipe.transformer.generate(torch.zeros(())))


def started(pipe: Pipe, *acts: Callable[[Pipe], Any]) -> list[PipelineRun]:
    attention = AttentionState(pipe.components)
    runs = [PipelineRun(pipe, {"act": act}, seed=seed, attention=attention) for seed, act in enumerate(acts)]
    for run in runs:
        run.start()
    return runs


def interleaved(runs: list[PipelineRun]) -> list[Any]:
    while any(run.call for run in runs):
        for run in runs:
            if run.call is not None:
                run.resume(run.call.alone())
    return [run.result for run in runs]


@pytest.fixture
def pipe() -> Any:
    pipe = Pipe()
    taps = [Tap("transformer", pipe.transformer), Tap("transformer", pipe.transformer, "generate")]
    with torch.inference_mode():
        yield pipe
    for tap in taps:
        tap.close()


def test_processors_that_a_run_sets_are_seen_by_no_other(pipe: Pipe) -> None:
    runs = started(pipe, perturbed(5.0), perturbed(7.0), perturbed(1.0), hooked)
    assert interleaved(runs) == [10.0, 14.0, 2.0, 110.0]
    assert pipe.transformer.attention.processor == 1.0
    assert not pipe.transformer.attention._forward_hooks


class Compiled(dict[Any, Any]):
    """A compiled forward for whatever comes."""

    def get(self, key: Any, default: Any = None) -> Any:
        return lambda arguments: torch.tensor(100.0)


def test_a_run_that_has_set_processors_never_runs_compiled_code() -> None:
    pipe: Any = Pipe()
    forms.install(pipe.transformer, Compiled())
    tap = Tap("transformer", pipe.transformer)
    with torch.inference_mode():
        assert interleaved(started(pipe, perturbed(5.0), usual)) == [10.0, 100.0]
    tap.close()


def test_a_run_that_has_set_processors_is_not_merged(pipe: Pipe) -> None:
    changed, usual = started(pipe, perturbed(5.0), guided)
    assert changed.call is not None
    assert changed.call.in_place is not None
    assert changed.call.key is None
    for run in (changed, usual):
        run.close()


def test_closing_a_run_in_the_middle_takes_its_processors_off(pipe: Pipe) -> None:
    closed, other = started(pipe, perturbed(5.0), perturbed(1.0))
    closed.close()
    assert pipe.transformer.attention.processor == 1.0
    assert interleaved([other]) == [2.0]


def test_what_a_run_draws_without_a_generator_comes_from_its_seed(pipe: Pipe) -> None:
    before = torch.get_rng_state()
    alone = [interleaved([run])[0] for run in started(pipe, drawing, drawing)]
    together = interleaved(started(pipe, drawing, drawing))
    assert together == alone
    assert together[0] != together[1]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    assert alone[0] == (torch.rand(()).item(), torch.rand(()).item())


def test_a_component_with_a_state_is_each_runs_own(pipe: Pipe) -> None:
    assert interleaved(started(pipe, guided, guided)) == [[1.0, 2.0], [1.0, 2.0]]
    assert pipe.guider.seen == []


def test_a_run_does_not_park_inside_generate(pipe: Pipe) -> None:
    speaker, other = started(pipe, speaking, perturbed(1.0))
    assert speaker.call is None
    assert speaker.result == 2.0
    assert interleaved([other]) == [2.0]
