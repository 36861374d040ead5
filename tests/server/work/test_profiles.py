"""What the server knows of a model before it asks a worker."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mezzotint.errors import InvalidRequestError
from mezzotint.fake_worker import model_info
from mezzotint.messages import LoadModel
from mezzotint.server.work.profiles import Calibration, Profile
from mezzotint.spec import ImageSpec
from tests.server.hosting import endpoint


def test_a_default_guidance_is_not_sent_to_a_model_that_ignores_guidance() -> None:
    spec = endpoint(default_guidance=2.5)
    heeds = model_info(LoadModel("one", "fake"), 16, 0.001)
    ignores = replace(heeds, guidance_effective=False)
    assert Profile(spec, None).guidance_scale(None) == 2.5
    assert Profile(spec, heeds).guidance_scale(None) == 2.5
    assert Profile(spec, ignores).guidance_scale(None) is None, "nobody asked, so nobody is to be warned"
    for info in (None, heeds, ignores):
        assert Profile(spec, info).guidance_scale(0.0) == 0.0


def test_only_the_sizes_that_a_model_names_are_taken() -> None:
    info = replace(model_info(LoadModel("one", "fake"), 16, 0.001), sizes=[(16, 16), (32, 16)])
    kept = Calibration.from_json(json.loads(json.dumps(Calibration("", info, 1.0).to_json())))
    assert kept is not None
    for known in (info, kept.info):
        profile = Profile(endpoint(), known)
        assert profile.nearest_size(512, 512) == (16, 16)
        assert profile.nearest_size(1024, 512) == (32, 16)
        for width, height in ((None, None), (16, 16), (32, None), (32, 16)):
            profile.check(ImageSpec(prompt="a cat", num_inference_steps=4, width=width, height=height))
        for width, height, param in ((24, 16, "width"), (None, 32, "height"), (16, 32, "width")):
            asked = ImageSpec(prompt="a cat", num_inference_steps=4, width=width, height=height)
            words = f"must be 16x16 or 32x16 for endpoint one .got {width or 16}x{height}"
            with pytest.raises(InvalidRequestError, match=words) as caught:
                profile.check(asked)
            assert (caught.value.code, caught.value.param) == ("out_of_range", param)
