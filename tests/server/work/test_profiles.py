"""What the server knows of a model before it asks a worker."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mezzotint.errors import InvalidRequestError
from mezzotint.fake_worker import model_info
from mezzotint.messages import LoadModel, MergeFinding, Proof
from mezzotint.server.work.profiles import Calibration, Profile, load_message, settings_digest
from mezzotint.spec import ImageSpec, InputPicture
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


def test_a_calibration_of_0_1_0_keeps_its_rows_and_refuses_no_picture() -> None:
    info = replace(model_info(LoadModel("one", "fake"), 16, 0.001), rows=8)
    stored = json.loads(json.dumps(Calibration("", info, 1.0).to_json()))
    for later in ("max_pictures", "masks", "strength", "sizes", "examples", "merging"):
        del stored["info"][later]
    kept = Calibration.from_json(stored)
    assert kept is not None
    assert kept.info.rows == 8
    picture = InputPicture(16, 16, bytes(16 * 16 * 3))
    asked = ImageSpec(prompt="a cat", num_inference_steps=4, images=(picture,), mask=None)
    Profile(endpoint(), kept.info).check(asked)


def test_a_calibration_keeps_the_proof_for_the_next_worker() -> None:
    proof = Proof("torch 2", {"unet": MergeFinding("", {"x": "row"}, {"x": 0}, {}, {"x": 1}, "mask")})
    info = replace(model_info(LoadModel("one", "fake"), 16, 0.001), proof=proof)
    spec = endpoint()
    stored = json.loads(json.dumps(Calibration(settings_digest(spec), info, 1.0).to_json()))
    kept = Calibration.from_json(stored)
    assert kept is not None
    assert kept.info == info
    assert load_message(spec, kept).proof == proof
    assert load_message(endpoint(dtype="bf16"), kept).proof is None


def test_a_calibration_holds_for_the_form_that_it_names_whatever_the_setting_is() -> None:
    auto, compiles = endpoint(), endpoint(performance="max")
    assert (
        settings_digest(auto)
        == settings_digest(compiles)
        != settings_digest(endpoint(performance="reference"))
    )
    info = replace(model_info(LoadModel("one", "fake"), 16, 0.001), rows=8, form="compiled-1")
    message = load_message(compiles, Calibration(settings_digest(auto), info, 1.0), "compiled-2")
    assert (message.rows, message.rows_form, message.form) == (8, "compiled-1", "compiled-2")


def test_a_calibration_from_before_there_were_forms_holds_for_its_setting() -> None:
    stored = json.loads(
        json.dumps(Calibration("", model_info(LoadModel("one", "fake"), 16, 0.001), 1.0).to_json())
    )
    del stored["info"]["form"]
    kept = Calibration.from_json(stored)
    assert kept is not None
    assert kept.info.form == "auto"


def test_a_setting_that_changes_the_bytes_changes_the_calibration() -> None:
    plain = settings_digest(endpoint())
    assert settings_digest(endpoint(default_steps=9)) == plain
    for changed in ({"width": 512}, {"scheduler": "DDIMScheduler"}, {"arguments": {"clip_skip": 1}}):
        assert settings_digest(endpoint(**changed)) != plain


def test_a_picture_says_how_its_model_is_run() -> None:
    info = model_info(LoadModel("one", "fake"), 16, 0.001)
    assert Profile(endpoint(), info).pipeline == {"dtype": "fp32"}
    spec = endpoint(scheduler="DDIMScheduler", scheduler_settings={"eta": 0.5}, arguments={"clip_skip": 1})
    assert Profile(spec, info).pipeline == {
        "dtype": "fp32",
        "scheduler": "DDIMScheduler",
        "scheduler_settings": {"eta": 0.5},
        "arguments": {"clip_skip": 1},
    }


def test_a_model_that_chooses_its_size_is_not_given_that_of_a_picture() -> None:
    info = replace(model_info(LoadModel("one", "fake"), 64, 0.001), takes_size=False)
    asked = ImageSpec(prompt="a cat", num_inference_steps=4, images=(InputPicture(16, 8, bytes(384)),))
    filled = Profile(endpoint(), info).filled(asked)
    assert (filled.width, filled.height) == (64, 64)
    sized = Profile(endpoint(), replace(info, takes_size=True)).filled(asked)
    assert (sized.width, sized.height) == (16, 8)


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
