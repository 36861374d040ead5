"""Pictures go in over real HTTP, in every dialect, with fake workers."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mezzotint.errors import InvalidRequestError
from mezzotint.fake_worker import paint
from mezzotint.input_pictures import read_mask, read_pictures, to_image
from mezzotint.server.api.img2img import prepared
from mezzotint.spec import ImageSpec, InputPicture
from tests.attacks import attack
from tests.server.hosting import Host, endpoint, hosting, settings_for

EDIT = "/dedicated/v1/images/edits"
MIB = 2**20


def file_of(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


RED = file_of(Image.new("RGB", (16, 16), "red"))
BLUE = file_of(Image.new("RGB", (16, 16), "blue"))
MASK = file_of(Image.new("L", (16, 16), 255))
HOLE = file_of(Image.new("RGBA", (16, 16), (0, 0, 0, 0)))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("server")
    with hosting(settings_for(folder, endpoint("fake:step_s=0"))) as running:
        yield running


def body(**fields: Any) -> dict[str, Any]:
    values = {"model": "one", "prompt": "a cat", "image": {"image": text_of(RED)}, "seed": 7}
    values |= {"response_format": "png"} | fields
    return {name: value for name, value in values.items() if value is not ...}


def edit(host: Host, **fields: Any) -> httpx2.Response:
    return host.client.post(EDIT, json=body(**fields))


def picture(host: Host, **fields: Any) -> bytes:
    answer = edit(host, **fields)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def refused(answer: httpx2.Response, code: str, status: int = 422) -> str:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    message: str = answer.json()["error"]["message"]
    return message


# ---------------------------------------------------------------- the dedicated route


def test_the_worker_gets_the_pixels_of_the_picture(host: Host) -> None:
    mask = read_mask(MASK, read_pictures([RED])[0])
    for given_mask, strength in ((None, 0.8), (mask, 1.0)):
        spec = ImageSpec(
            prompt="a cat", num_inference_steps=20, seed=7, guidance_scale=None, width=16, height=16,
            images=read_pictures([RED]), mask=given_mask, strength=strength,
        )  # fmt: skip
        wanted = Image.frombytes("RGB", (16, 16), paint(spec, 16, 16))
        fields = {"mask": {"image": text_of(MASK)}} if given_mask else {}
        assert Image.open(io.BytesIO(picture(host, **fields))).tobytes() == wanted.tobytes()


def test_every_spelling_of_a_picture_is_the_same_request(host: Host) -> None:
    webp = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(webp, "WEBP", lossless=True)
    spellings: list[Any] = [
        {"image": text_of(RED)},
        [{"image": text_of(RED)}],
        {"image": f"data:image/png;base64,{text_of(RED)}"},
        {"image": text_of(webp.getvalue())},
    ]
    pictures = {picture(host, image=spelling) for spelling in spellings}
    assert len(pictures) == 1
    assert picture(host, image={"image": text_of(BLUE)}) not in pictures


def test_twenty_steps_are_the_default_and_only_those_that_run_are_counted(host: Host) -> None:
    assert edit(host, strength=1).json()["usage"] == {"images": 1, "steps": 20}
    assert edit(host).json()["usage"]["steps"] == 16
    assert edit(host, strength=0.5, num_inference_steps=8, n=2).json()["usage"] == {"images": 2, "steps": 8}
    assert edit(host, mask={"image": text_of(MASK)}).json()["usage"]["steps"] == 20


def test_the_size_is_the_pictures_own_up_to_the_models(host: Host) -> None:
    wide = {"image": text_of(file_of(Image.new("RGB", (320, 80))))}
    item = edit(host, image=wide).json()["data"][0]
    assert (item["width"], item["height"]) == (32, 8)
    item = edit(host, image=wide, width=32, height=16).json()["data"][0]
    assert (item["width"], item["height"]) == (32, 16)


def test_what_is_left_out_and_null_are_the_same(host: Host) -> None:
    nulls = dict.fromkeys(("mask", "strength", "n", "width", "height", "negative_prompt", "guidance_scale"))
    assert picture(host, **nulls) == picture(host)


@pytest.mark.parametrize(
    ("fields", "code", "sentence"),
    [
        ({"image": ...}, "missing_field", "image is required"),
        ({"image": None}, "invalid_type", "image must be"),
        ({"image": "abc"}, "invalid_type", "image must be"),
        ({"image": {"image": 3}}, "invalid_type", "image must be"),
        ({"image": {"image": "", "more": 1}}, "invalid_type", "image must be"),
        ({"image": []}, "missing_field", "at least one picture"),
        ({"image": {"image": "%%%"}}, "image_not_base64", "is not base64"),
        ({"image": {"image": ""}}, "image_format", "PNG, JPEG or WebP"),
        ({"image": {"image": text_of(b"GIF89a")}}, "image_format", "PNG, JPEG or WebP"),
        ({"image": {"image": text_of(RED[:40])}}, "image_damaged", "damaged or cut short"),
        ({"image": {"image": "http://127.0.0.1/a.png"}}, "image_url_refused", "fetches no pictures"),
        ({"image": [{"image": text_of(RED)}] * 300}, "too_many_images", "at most 16 pictures (got 300)"),
        (
            {"image": [{"image": text_of(RED)}] * 3},
            "not_supported",
            "works from 2 pictures a request (got 3)",
        ),
        ({"mask": [{"image": text_of(MASK)}]}, "invalid_type", "mask must be one picture"),
        ({"mask": {"image": text_of(file_of(Image.new("L", (16, 8))))}}, "mask_size", "16x16 (got 16x8)"),
        ({"strength": 1.5}, "out_of_range", "strength must be between 0 and 1 (got 1.5)"),
        ({"strength": "0.5"}, "invalid_type", "strength must be a number"),
        ({"strength": 0.01}, "out_of_range", "at least 1"),
        ({"num_inference_steps": 51}, "out_of_range", "between 1 and 50"),
        ({"width": 20}, "out_of_range", "multiple of 8"),
        ({"stren": 1}, "unknown_field", "did you mean strength?"),
        ({"prompt": ...}, "missing_field", "prompt is required"),
    ],
)
def test_each_fault_is_said_and_nothing_is_queued(
    host: Host, fields: dict[str, Any], code: str, sentence: str
) -> None:
    before = len(host.service.admission.tickets.by_id)
    assert sentence in refused(edit(host, **fields), code)
    assert len(host.service.admission.tickets.by_id) == before


def test_a_model_that_makes_pictures_from_words_says_so(host: Host) -> None:
    profile = host.endpoint().profile
    assert profile.info is not None
    words = dataclasses.replace(profile, info=dataclasses.replace(profile.info, max_pictures=0))
    spec = ImageSpec(prompt="a cat", num_inference_steps=4, images=read_pictures([RED]))
    profile.check(spec)
    with pytest.raises(InvalidRequestError, match="endpoint one makes pictures from words only") as error:
        words.check(spec)
    assert (error.value.code, error.value.param) == ("not_supported", "image")


def test_an_idempotency_key_counts_the_pictures_in(host: Host) -> None:
    headers = {"idempotency-key": "pictures"}

    def send(data: bytes) -> httpx2.Response:
        fields = body(image={"image": text_of(data)}, seed=None)
        return host.client.post(EDIT, json=fields, headers=headers)

    first = send(RED).json()
    assert send(RED).json() == first
    refused(send(BLUE), "conflict", 409)


def test_a_generation_takes_no_picture(host: Host) -> None:
    answer = host.post(image={"image": text_of(RED)})
    refused(answer, "unknown_field")


# ---------------------------------------------------------------- bodies


@attack("A large body where none is needed", outcome="413")
def test_these_routes_alone_take_large_bodies(host: Host) -> None:
    large = text_of(file_of(Image.frombytes("RGB", (1024, 1024), random.Random(0).randbytes(3 * MIB))))
    assert len(large) > 4 * MIB
    assert edit(host, image={"image": large}).status_code == 200
    message = refused(host.post(prompt="x" * 2 * MIB), "body_too_large", 413)
    assert "1048576 bytes" in message
    assert "max_body_bytes" in message
    message = refused(edit(host, prompt="x" * 33 * MIB), "body_too_large", 413)
    assert "33554432 bytes" in message
    assert "max_image_body_bytes" in message


def test_type_and_route_are_checked_before_size(host: Host) -> None:
    huge = b"x" * 2 * MIB
    plain = {"content-type": "text/plain"}
    refused(host.client.post(EDIT, content=huge[:9], headers=plain), "unsupported_media_type", 415)
    refused(host.client.post("/nowhere", content=huge, headers=plain), "not_found", 404)
    answer = host.client.post("/dedicated/v1/images/generations", content=huge, headers=plain)
    refused(answer, "unsupported_media_type", 415)
    form = {"content-type": "multipart/form-data; boundary=x"}
    refused(host.client.post(EDIT, content=b"x", headers=form), "unsupported_media_type", 415)


# ---------------------------------------------------------------- OpenAI


@pytest.fixture(scope="module")
def client(host: Host) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{host.url}/v1", api_key=host.first_key, max_retries=0) as made:
        yield made


def b64(answer: Any) -> str:
    text: str = answer.data[0].b64_json
    return text


def test_openais_client_edits_with_its_own_defaults(client: openai.OpenAI) -> None:
    made = client.images.edit(model="one", image=RED, prompt="a cat")
    assert made.data
    assert made.data[0].b64_json
    assert made.data[0].url


def test_openais_form_and_json_are_the_dedicated_request(host: Host, client: openai.OpenAI) -> None:
    wanted = text_of(picture(host, strength=0.5, num_inference_steps=8))
    extra = {"seed": 7, "num_inference_steps": 8, "strength": 0.5}
    form = client.images.edit(model="one", image=RED, prompt="a cat", extra_body=extra)
    assert b64(form) == wanted
    file = ("red.png", RED, "image/png")
    listed = client.images.edit(model="one", image=[file], prompt="a cat", extra_body=extra)
    assert b64(listed) == wanted
    for image in (
        {"image": text_of(RED)},
        {"image": {"image": text_of(RED)}},
        {"images": [{"image_url": f"data:image/png;base64,{text_of(RED)}"}]},
    ):
        values = {"model": "one", "prompt": "a cat", "response_format": "b64_json", **extra, **image}
        answer = host.client.post("/v1/images/edits", json=values)
        assert answer.status_code == 200, answer.text
        assert answer.json()["data"][0]["b64_json"] == wanted


def test_of_openais_mask_the_transparent_part_is_repainted(host: Host, client: openai.OpenAI) -> None:
    extra = {"seed": 7, "num_inference_steps": 20}
    form = client.images.edit(model="one", image=RED, mask=HOLE, prompt="a cat", extra_body=extra)
    assert b64(form) == text_of(picture(host, mask={"image": text_of(MASK)}))


def test_every_option_of_openais_client_is_taken(client: openai.OpenAI) -> None:
    made = client.images.edit(
        model="one",
        image=[("a.png", RED), ("b.png", BLUE)],
        prompt="a cat",
        background="auto",
        input_fidelity="high",
        n=2,
        output_compression=90,
        output_format="jpeg",
        quality="high",
        response_format="b64_json",
        size="16x16",
        user="me",
    )
    assert made.data
    assert len(made.data) == 2
    assert Image.open(io.BytesIO(base64.b64decode(b64(made)))).format == "JPEG"


def test_an_edit_streams_events_of_its_own_name(client: openai.OpenAI) -> None:
    stream = client.images.edit(model="one", image=RED, prompt="a cat", stream=True, partial_images=2)
    *earlier, last = [event.type for event in stream]
    assert last == "image_edit.completed"
    assert set(earlier) <= {"image_edit.partial_image"}
    assert len(earlier) <= 2, "a preview that comes too late for its step is left out"


@pytest.mark.filterwarnings("ignore:deprecated")
def test_a_variation_is_not_supported(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="variations are not supported") as error:
        client.images.create_variation(image=RED)
    assert error.value.code == "not_supported"


@attack("A multipart form made to break the parser", outcome="422")
@pytest.mark.parametrize(
    ("files", "fields", "code"),
    [
        ({"image[]": b""}, {"prompt": "x"}, "image_format"),
        ({"image": RED}, {}, "missing_field"),
        ({"image": RED}, {"prompt": "x", "n": "three"}, "invalid_type"),
        ({"image": RED}, {"prompt": "x", "strength": "9"}, "out_of_range"),
        ({"image": RED}, {"prompt": "x", "odd": "1"}, "unknown_field"),
        ({"image": RED, "prompt": b"x"}, {}, "invalid_type"),
        ({"image": b"no picture"}, {"prompt": "x"}, "image_format"),
    ],
)
def test_a_forms_faults_are_said(
    host: Host, files: dict[str, bytes], fields: dict[str, str], code: str
) -> None:
    answer = host.client.post("/v1/images/edits", data={"model": "one", **fields}, files=files)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text


def test_what_is_no_form_is_said(host: Host) -> None:
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        answer = host.client.post("/v1/images/edits", content=b"\xff--", headers={"content-type": kind})
        assert answer.status_code == 400, answer.text


# ---------------------------------------------------------------- AUTOMATIC1111


def test_img2img_is_the_dedicated_request(host: Host) -> None:
    values = {
        "prompt": "a cat",
        "seed": 7,
        "steps": 8,
        "denoising_strength": 0.5,
        "init_images": [text_of(RED)],
        "override_settings": {"sd_model_checkpoint": "one"},
        "resize_mode": 0,
    }
    answer = host.client.post("/sdapi/v1/img2img", json=values)
    assert answer.status_code == 200, answer.text
    assert answer.json()["images"] == [text_of(picture(host, strength=0.5, num_inference_steps=8))]
    assert "init_images" not in answer.json()["parameters"]
    inverted = values | {"mask": text_of(file_of(Image.new("L", (16, 16)))), "inpainting_mask_invert": 1}
    plain = values | {"mask": text_of(MASK)}
    answers = [
        host.client.post("/sdapi/v1/img2img", json=each).json()["images"] for each in (inverted, plain)
    ]
    assert answers[0] == answers[1] != answer.json()["images"]


def wide_stripes() -> Image.Image:
    """32x16: red, then white, then blue."""
    image = Image.new("RGB", (32, 16), "white")
    image.paste("red", (0, 0, 8, 16))
    image.paste("blue", (24, 0, 32, 16))
    return image


def masked_spec(words: ImageSpec, picture: bytes, mask: bytes) -> ImageSpec:
    images = read_pictures([picture])
    return dataclasses.replace(words, images=images, mask=read_mask(mask, images[0]))


def test_resize_modes_crop_and_fill_the_picture() -> None:
    words = ImageSpec(prompt="a cat", num_inference_steps=8, width=16, height=16)
    masked = masked_spec(words, file_of(wide_stripes()), file_of(wide_stripes().convert("L")))
    stretched, cropped, filled = (prepared(masked, {"resize_mode": mode}) for mode in range(3))
    assert stretched == masked
    assert to_image(cropped.images[0]).tobytes() == Image.new("RGB", (16, 16), "white").tobytes()
    assert filled.images[0].size == (32, 32)
    assert to_image(filled.images[0]).crop((0, 8, 32, 24)).tobytes() == wide_stripes().tobytes()
    above = to_image(filled.images[0]).crop((0, 0, 32, 8))
    assert above.tobytes() == wide_stripes().crop((0, 0, 32, 8)).tobytes()
    assert [each.mask and each.mask.size for each in (cropped, filled)] == [(16, 16), (32, 32)]
    high = ImageSpec(prompt="a cat", num_inference_steps=8, width=32, height=8, images=cropped.images)
    assert prepared(high, {"resize_mode": 1}).images[0].size == (16, 4)
    assert prepared(high, {"resize_mode": 2}).images[0].size == (64, 16)


def test_a_blurred_mask_has_no_hard_edge() -> None:
    words = ImageSpec(prompt="a cat", num_inference_steps=8)
    half = Image.new("L", (32, 32))
    half.paste(255, (16, 0, 32, 32))
    sharp = masked_spec(words, file_of(half.convert("RGB")), file_of(half))
    soft = prepared(sharp, {"mask_blur": 4})
    assert sharp.mask is not None
    assert soft.mask is not None
    assert set(sharp.mask.pixels) == {0, 255}
    assert 100 < soft.mask.pixels[16] < 200
    assert prepared(sharp, {"mask_blur": 0}) == sharp


def test_what_img2img_cannot_do_is_said(host: Host) -> None:
    values = {"prompt": "a cat", "seed": 7, "steps": 2, "init_images": [text_of(RED)], "mask": text_of(MASK)}
    wishes = {"resize_mode": 3, "inpainting_fill": 0, "inpaint_full_res": True, "mask_blur": 4}
    info = json.loads(host.client.post("/sdapi/v1/img2img", json=values | wishes).json()["info"])
    assert [text.split(" had")[0] for text in info["warnings"]] == [
        "resize_mode 3", "inpainting_fill 0", "inpaint_full_res",
    ]  # fmt: skip
    done = {"resize_mode": 1, "inpainting_fill": 1, "inpaint_full_res": False}
    info = json.loads(host.client.post("/sdapi/v1/img2img", json=values | done).json()["info"])
    assert info["warnings"] == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"resize_mode": 4}, "out_of_range"),
        ({"mask_blur": -1}, "out_of_range"),
        ({"inpainting_fill": "much"}, "invalid_type"),
        ({"init_images": None}, "invalid_type"),
        ({"init_images": [3]}, "invalid_type"),
        ({"init_images": []}, "missing_field"),
        ({"init_images": ["%"]}, "image_not_base64"),
        ({"mask": 3}, "invalid_type"),
        ({"denoising_strength": "much"}, "invalid_type"),
    ],
)
def test_img2img_faults_are_said(host: Host, changes: dict[str, Any], code: str) -> None:
    values = {"prompt": "a cat", "init_images": [text_of(RED)]} | changes
    refused(host.client.post("/sdapi/v1/img2img", json=values), code)


@pytest.mark.parametrize("side", [2**63, 10**4000])
def test_a_side_beyond_all_bounds_is_answered_at_once(host: Host, side: int) -> None:
    values = {"model": "one", "prompt": "a cat", "image": text_of(RED), "num_inference_steps": 1}
    for sizes in ({"height": side}, {"width": side, "height": side}):
        for path in ("/v1/images/edits", "/v1/images/generations"):
            sent = {name: value for name, value in values.items() if name != "image" or "edits" in path}
            assert host.client.post(path, json=sent | sizes).status_code in (200, 400)
    assert host.client.post("/v1/images/edits", json=values | {"steps": side}).status_code in (200, 400)


# ---------------------------------------------------------------- whatever is sent

_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
_files = st.sampled_from([RED, BLUE, MASK, HOLE, file_of(Image.new("RGB", (9, 5)), "JPEG")])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(_files))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


_pictures = damaged().map(lambda data: {"image": text_of(data)})
_likely: dict[str, st.SearchStrategy[Any]] = {
    "image": _pictures | st.lists(_pictures, max_size=3),
    "mask": _pictures | st.none(),
    "strength": st.floats() | st.none(),
    "num_inference_steps": st.integers(-1, 52),
    "width": st.sampled_from([16, 8, 20, None]),
}


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    values = body(num_inference_steps=1)
    for name in draw(st.lists(st.sampled_from([*_likely, "prompt", "extra"]), max_size=4, unique=True)):
        values[name] = draw(_likely.get(name, _anything) if draw(st.booleans()) else _anything)
    return json.dumps(values).encode()


def no_defect(answer: httpx2.Response) -> None:
    assert answer.status_code in (200, 400, 404, 422), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["code"] != "internal_error"
        assert len(answer.content) < 2500, "an error does not echo what it was sent at length"


def send_both(host: Host, sent: bytes) -> None:
    for path in (EDIT, "/v1/images/edits"):
        no_defect(host.client.post(path, content=sent, headers={"content-type": "application/json"}))


def send_form(host: Host, data: bytes, mask: bytes | None) -> None:
    files = {"image": data} | ({"mask": mask} if mask is not None else {})
    no_defect(host.client.post("/v1/images/edits", data={"model": "one", "prompt": "x"}, files=files))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(sent=bodies())
def test_no_body_breaks_the_server(host: Host, sent: bytes) -> None:
    send_both(host, sent)


@attack("Damaged pictures, hundreds of kinds", outcome="200 or 422")
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=damaged(), mask=st.none() | damaged())
def test_no_damaged_picture_breaks_the_server(host: Host, data: bytes, mask: bytes | None) -> None:
    send_form(host, data, mask)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(sent=bodies())
def test_ten_thousand_bodies_leave_nothing_behind(host: Host, sent: bytes) -> None:
    send_both(host, sent)
    assert host.endpoint().dispatcher.idle


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=damaged(), mask=st.none() | damaged())
def test_two_thousand_damaged_pictures_leave_nothing_behind(
    host: Host, data: bytes, mask: bytes | None
) -> None:
    send_form(host, data, mask)
    assert host.endpoint().dispatcher.idle


def test_a_picture_has_no_pixels_in_its_repr() -> None:
    assert "pixels" not in repr(InputPicture(1, 1, b"123"))
