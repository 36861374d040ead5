"""Another scheduler than a model came with."""

from __future__ import annotations

from typing import Any

import pytest

from mezzotint.engine.models import loading
from mezzotint.errors import ModelLoadError
from mezzotint.spec import EngineSettings
from tests.engine import tiny


def loaded(name: str, **settings: Any) -> Any:
    return loading.load(tiny.build(name), EngineSettings(device="cpu", num_threads=1, **settings)).pipe


def test_a_scheduler_has_the_models_settings_and_the_endpoints() -> None:
    pipe = loaded(
        "stable-diffusion",
        scheduler="DPMSolverMultistepScheduler",
        scheduler_settings={"use_karras_sigmas": True},
    )
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert pipe.scheduler.config.beta_end == 0.012
    assert pipe.scheduler.config.use_karras_sigmas
    assert pipe.config["scheduler"] == ("diffusers", "DPMSolverMultistepScheduler")
    assert loaded("stable-diffusion-3", scheduler_settings={"shift": 5.0}).scheduler.config.shift == 5.0
    assert loaded("stable-diffusion-3").scheduler.config.shift == 3.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scheduler": "DDIMSchedular"}, "has no 'DDIMSchedular'; did you mean DDIMScheduler"),
        ({"scheduler": "FluxPipeline"}, "has no 'FluxPipeline'"),
        ({"scheduler_settings": {"shaft": 5.0}}, "has no 'shaft'; did you mean shift"),
    ],
)
def test_a_scheduler_that_there_is_not_stops_the_load(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words) as caught:
        loaded("stable-diffusion-3", **settings)
    assert caught.value.code == "invalid_setting"
