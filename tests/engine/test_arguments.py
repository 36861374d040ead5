"""From requests to pipeline arguments, for every class that tests can build."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from mezzotint.engine.arguments import PipelineProfile
from mezzotint.errors import InvalidRequestError
from mezzotint.spec import ImageSpec as Request
from tests.engine import tiny


def facts(name: str) -> PipelineProfile:
    return PipelineProfile(tiny.build(name))


def request(**fields: Any) -> Request:
    return Request(**{"prompt": "a red fox", "num_inference_steps": 4, **fields})


@pytest.mark.parametrize("name", tiny.ALL)
def test_no_pipeline_gets_an_argument_it_does_not_take(name: str) -> None:
    pipe = tiny.build(name)
    known = PipelineProfile(pipe)
    arguments, _ = known.call_arguments(request(guidance_scale=3.0, negative_prompt="ugly"))
    assert set(arguments) <= set(inspect.signature(pipe.__call__).parameters)
    assert {"prompt", "num_inference_steps", "width", "height", "output_type"} <= set(arguments)
    assert known.width % known.size_multiple == 0
    assert known.denoiser is not None
    assert known.max_prompt_tokens


def test_guidance_reaches_the_argument_of_the_family() -> None:
    flux, _ = facts("flux").call_arguments(request(guidance_scale=2.5))
    assert flux["guidance_scale"] == 2.5
    qwen, _ = facts("qwen-image").call_arguments(request(guidance_scale=2.5))
    assert qwen["true_cfg_scale"] == 2.5
    assert qwen["negative_prompt"] == " "
    assert "guidance_scale" not in qwen


def test_unset_guidance_is_the_familys_default() -> None:
    known = facts("flux")
    arguments, _ = known.call_arguments(request())
    assert arguments["guidance_scale"] == known.family.default_guidance == 3.5


def test_distilled_models_default_to_few_steps_and_take_no_guidance() -> None:
    known = facts("flux-schnell")
    assert (known.default_steps, known.guidance_effective) == (4, False)
    arguments, warnings = known.call_arguments(request(guidance_scale=5.0))
    assert "guidance_scale" not in arguments
    assert len(warnings) == 1


def test_a_short_text_encoder_is_given_its_own_length() -> None:
    pipe = tiny.build("flux")
    pipe.tokenizer_2.model_max_length = 24
    known = PipelineProfile(pipe)
    assert known.max_prompt_tokens == 24
    arguments, _ = known.call_arguments(request())
    assert arguments["max_sequence_length"] == 24
    ordinary, _ = facts("flux").call_arguments(request())
    assert "max_sequence_length" not in ordinary


def test_extra_wins_over_what_the_engine_would_choose() -> None:
    pipe = tiny.build("flux")
    pipe.tokenizer_2.model_max_length = 24
    arguments, warnings = PipelineProfile(pipe).call_arguments(
        request(prompt="fox " * 12, extra={"max_sequence_length": 16})
    )
    assert arguments["max_sequence_length"] == 16
    assert "first 16" in warnings[0]


def test_the_default_size_is_what_the_model_was_made_for() -> None:
    assert (facts("stable-diffusion").width, facts("flux").width) == (64, 32)


@pytest.mark.parametrize("steps", [0, 51, True, 2.5, "4"])
def test_steps_outside_one_to_fifty_are_refused(steps: Any) -> None:
    with pytest.raises(InvalidRequestError, match="between 1 and 50") as caught:
        facts("flux").call_arguments(request(num_inference_steps=steps))
    assert caught.value.param == "num_inference_steps"
