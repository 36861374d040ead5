"""How an endpoint runs its model: what its settings say takes effect, and each picture's file says it."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from mezzotint.images import read_infotext, read_parameters
from mezzotint.server.work.lifecycle import State
from mezzotint.server.workers.process import ENGINE_WORKER
from tests.engine import tiny
from tests.server.hosting import endpoint, hosting, settings_for

PATIENCE_S = 240.0

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def test_scheduler_arguments_and_dtype_make_the_picture_and_stand_in_its_file(tmp_path: Path) -> None:
    model = tiny.save("stable-diffusion", tmp_path / "model")
    spec = endpoint(
        str(model),
        dtype="torch.float32",
        performance="reference",
        batching="off",
        num_threads=1,
        width=32,
        height=32,
        scheduler="DDIMScheduler",
        scheduler_settings={"timestep_spacing": "trailing"},
        arguments={"guidance_rescale": 0.7},
    )
    with hosting(settings_for(tmp_path, spec), ready=False, worker=ENGINE_WORKER) as host:
        host.client.timeout = PATIENCE_S
        ready = host.endpoint().wait_for(State.READY)
        asyncio.run_coroutine_threadsafe(ready, host.loop).result(PATIENCE_S)
        file = base64.b64decode(host.picture(seed=3, guidance_scale=4.0))

    said = read_parameters(file)
    assert said is not None
    assert said.pipeline == {
        "dtype": "fp32",
        "scheduler": "DDIMScheduler",
        "scheduler_settings": {"timestep_spacing": "trailing"},
        "arguments": {"guidance_rescale": 0.7},
    }
    assert "Sampler: DDIMScheduler" in (read_infotext(file) or "")

    pipe = StableDiffusionPipeline.from_pretrained(str(model))
    pipe.set_progress_bar_config(disable=True)

    def plain(guidance_rescale: float) -> Image.Image:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            made = pipe(
                prompt="a cat",
                num_inference_steps=4,
                guidance_scale=4.0,
                width=32,
                height=32,
                guidance_rescale=guidance_rescale,
                generator=torch.Generator().manual_seed(3),
            )
        finally:
            torch.set_num_threads(threads)
        picture: Image.Image = made.images[0]
        return picture

    usual = plain(0.7)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    drawn = np.asarray(Image.open(io.BytesIO(file)))
    assert np.array_equal(drawn, np.asarray(plain(0.7)))
    assert not np.array_equal(drawn, np.asarray(usual)), "the scheduler took effect"
    assert not np.array_equal(drawn, np.asarray(plain(0.0))), "the argument took effect"
