"""From requests to pipeline arguments, for every class that tests can build."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from mezzotint.engine.arguments import PipelineProfile
from mezzotint.engine.manifest import Manifest
from mezzotint.errors import InvalidRequestError, ModelLoadError
from mezzotint.spec import EngineSettings, InputPicture
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


def test_what_a_model_says_of_itself_goes_before_its_family() -> None:
    said = Manifest(sizes=[(32, 16), (16, 16)], num_inference_steps=6, guidance_scale=2.0)
    known = PipelineProfile(tiny.build("flux"), manifest=said)
    assert (known.width, known.height, known.default_steps) == (32, 16, 6)
    arguments, _ = known.call_arguments(request())
    assert (arguments["width"], arguments["height"], arguments["guidance_scale"]) == (32, 16, 2.0)
    assert known.call_arguments(request(guidance_scale=5.0))[0]["guidance_scale"] == 5.0
    assert known.call_arguments(request(width=16))[0]["width"] == 16
    with pytest.raises(InvalidRequestError, match=r"must be 32x16 or 16x16 for this model .got 48x16"):
        known.call_arguments(request(width=48))


def test_a_size_that_a_model_names_but_cannot_have_stops_its_load() -> None:
    with pytest.raises(ModelLoadError, match=r"sizes: this model draws multiples of 8 pixels .got 33x16"):
        PipelineProfile(tiny.build("flux"), manifest=Manifest(sizes=[(33, 16)]))


def test_a_word_that_the_model_was_not_taught_is_said_in_the_answer() -> None:
    known = PipelineProfile(tiny.build("flux"), manifest=Manifest(vocabulary=["a", "red", "cat"]))
    assert known.call_arguments(request(prompt="a red cat"))[1] == []
    (warning,) = known.call_arguments(request(prompt="a red cta"))[1]
    assert "'cta' (nearest known: 'cat')" in warning


def test_a_model_that_names_its_sizes_gives_an_edited_picture_its_own() -> None:
    sketch = InputPicture(48, 16, bytes(48 * 16 * 3))
    free = PipelineProfile(tiny.build("flux"))
    named = PipelineProfile(tiny.build("flux"), manifest=Manifest(sizes=[(32, 16)]))
    assert free.size(request(images=(sketch,))) == (48, 16), "the picture's"
    assert named.size(request(images=(sketch,))) == (32, 16)


def test_a_count_of_tokens_that_fails_fails_no_request() -> None:
    class Processor:
        model_max_length = 4

        def __call__(self, images: Any, **options: Any) -> Any:
            raise ValueError("no picture")

    pipe = tiny.build("flux")
    pipe.tokenizer_2 = Processor()
    arguments, warnings = PipelineProfile(pipe).call_arguments(request(prompt="one two three four five six"))
    assert (arguments["max_sequence_length"], warnings) == (4, [])


def test_the_tokenizer_of_a_processor_counts() -> None:
    class Processor:
        tokenizer = tiny.build("flux").tokenizer_2

        def __call__(self, images: Any, **options: Any) -> Any:
            raise ValueError("no picture")

    pipe = tiny.build("flux")
    pipe.tokenizer_2 = Processor()
    known = PipelineProfile(pipe)
    assert known.max_prompt_tokens == 512
    assert "prompt was cut" in known.call_arguments(request(prompt="fox " * 300))[1][0]


def test_an_endpoints_arguments_reach_every_call() -> None:
    settings = EngineSettings(
        width=64, height=48, default_steps=7, default_guidance=2.0, arguments={"true_cfg_scale": 2}
    )
    known = PipelineProfile(tiny.build("flux"), settings=settings)
    assert (known.width, known.height, known.default_steps, known.size_is_guessed) == (64, 48, 7, False)
    arguments, warnings = known.call_arguments(request(negative_prompt="ugly"))
    assert (arguments["true_cfg_scale"], arguments["guidance_scale"], arguments["width"]) == (2, 2.0, 64)
    assert (arguments["negative_prompt"], warnings) == ("ugly", [])
    assert known.supports_negative_prompt
    assert known.call_arguments(request(extra={"true_cfg_scale": 3.0}))[0]["true_cfg_scale"] == 3.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"arguments": {"true_cgf_scale": 2.0}}, "is not an argument of FluxPipeline; did you mean true_cfg"),
        ({"arguments": {"true_cfg_scale": "much"}}, "'true_cfg_scale' must be float .got 'much'"),
        ({"arguments": {"max_sequence_length": 2.5}}, "must be int .got 2.5"),
        ({"arguments": {"generator": 1}}, "'generator' is set by each request"),
        ({"arguments": {"guidance_scale": 1.0}}, "use default_guidance"),
        ({"width": 60}, "width must be a multiple of 8 for this model .got 60"),
    ],
)
def test_settings_that_a_pipeline_cannot_have_stop_its_load(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words) as caught:
        PipelineProfile(tiny.build("flux"), settings=EngineSettings(**settings))
    assert caught.value.code == "invalid_setting"


def test_guidance_reaches_guiders_and_priors_and_takes_the_place_of_a_schedule() -> None:
    hunyuan = facts("hunyuan-image")
    assert hunyuan.guidance_effective
    assert "distilled_guidance_scale" not in hunyuan.call_arguments(request(guidance_scale=6.0))[0]
    pipe = hunyuan.pipe_for(request(guidance_scale=6.0))
    assert (pipe.guider.guidance_scale, pipe.ocr_guider.guidance_scale) == (6.0, 6.0)
    assert hunyuan.pipe.guider.guidance_scale == 3.5
    assert hunyuan.pipe_for(request()) is hunyuan.pipe
    for name in ("stable-cascade", "wuerstchen"):
        arguments, _ = facts(name).call_arguments(request(guidance_scale=6.0))
        assert arguments["prior_guidance_scale"] == 6.0
    ideogram = facts("ideogram4")
    assert ideogram.default_steps == 48
    unasked, _ = ideogram.call_arguments(request(num_inference_steps=48))
    assert not {"guidance_scale", "guidance_schedule"} & set(unasked)
    for asked in (request(num_inference_steps=20), request(num_inference_steps=48, guidance_scale=7.0)):
        arguments, _ = ideogram.call_arguments(asked)
        assert (arguments["guidance_scale"], arguments["guidance_schedule"]) == (7.0, None)


def test_default_steps_are_the_pipelines_own_within_the_limit() -> None:
    assert facts("sana-sprint").default_steps == 2
    assert facts("deepfloyd-if").default_steps == 50
