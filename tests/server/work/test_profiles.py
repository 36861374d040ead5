"""What the server knows of a model before it asks a worker."""

from __future__ import annotations

from dataclasses import replace

from mezzotint.fake_worker import model_info
from mezzotint.messages import LoadModel
from mezzotint.server.work.profiles import Profile
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
