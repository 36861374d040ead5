"""Pictures to files and back, checked against Pillow's decoders."""

from __future__ import annotations

import contextlib
import io
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from mezzotint.errors import InvalidRequestError
from mezzotint.images import (
    FORMATS,
    Parameters,
    decode,
    encode,
    parse_infotext,
    read_infotext,
    read_parameters,
)
from tests.attacks import attack


def made(**fields: Any) -> Parameters:
    return Parameters.from_dict(fields)


CAT = made(
    model="emoji:noto",
    prompt='a "cat", 猫 🐱\nSteps: two',
    num_inference_steps=8,
    seed=2**63 - 1,
    guidance_scale=7.25,
    negative_prompt="dog: no",
    width=17,
    height=5,
    adapter_scale=-0.5,
)


def noise(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(width: int, height: int) -> NDArray[np.uint8]:
    ramp = np.linspace(0, 255, width * height).reshape(height, width, 1)
    return np.repeat(ramp, 3, axis=2).astype(np.uint8)


def open_pixels(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))


@given(st.integers(1, 40), st.integers(1, 40), st.binary(min_size=1, max_size=64))
def test_a_png_of_any_size_decodes_to_the_same_pixels(width: int, height: int, seed: bytes) -> None:
    pixels = np.resize(np.frombuffer(seed, np.uint8), (height, width, 3))
    data = encode("png", pixels, width, height)
    assert np.array_equal(open_pixels(data), pixels)
    assert np.array_equal(np.asarray(decode("png", data)), pixels)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 9), (9, 1), (17, 5), (128, 128), (513, 255)])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_at_every_size(name: str, width: int, height: int) -> None:
    pixels = smooth(width, height)
    image = decode(name, encode(name, pixels, width, height), width, height)
    assert image.size == (width, height)
    assert image.mode == "RGB"
    error = np.abs(np.asarray(image).astype(int) - pixels)
    assert error.max() <= {"image/jpeg": 3, "image/webp": 12}.get(FORMATS[name].mime_type, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_and_arrays_give_the_same_file_and_so_does_a_second_run(name: str) -> None:
    pixels = noise(17, 5)
    first = encode(name, pixels, 17, 5, parameters=CAT)
    assert first == encode(name, pixels.tobytes(), 17, 5, parameters=CAT)
    assert first == encode(name, memoryview(pixels.tobytes()), 17, 5, parameters=CAT)


def test_the_mime_type_is_that_of_the_bytes() -> None:
    for name in ("url", "png", "jpeg", "jpg"):
        image = Image.open(io.BytesIO(encode(name, noise(8, 8), 8, 8)))
        assert Image.MIME[str(image.format)] == FORMATS[name].mime_type


def test_raw_is_the_bare_pixels_and_says_how_to_read_them() -> None:
    pixels = noise(17, 5)
    data = encode("raw", pixels, 17, 5, parameters=CAT)
    says = FORMATS["raw"].item_fields(3)
    assert data == pixels.tobytes()
    assert np.array_equal(np.frombuffer(data, says["dtype"]).reshape(5, 17, says["channels"]), pixels)


def test_a_picture_with_alpha_keeps_it_where_the_format_can() -> None:
    pixels = np.concatenate([noise(17, 5), np.full((5, 17, 1), 255, np.uint8)], axis=2)
    pixels[:, 8:, 3] = 0
    for name in ("png", "raw"):
        shown = decode(name, encode(name, pixels, 17, 5, parameters=CAT), 17, 5)
        assert shown.mode == "RGBA"
        assert np.array_equal(np.asarray(shown), pixels)
    webp = decode("webp", encode("webp", pixels, 17, 5))
    assert np.array_equal(np.asarray(webp)[:, :, 3], pixels[:, :, 3])
    jpeg = decode("jpeg", encode("jpeg", pixels, 17, 5, quality=100))
    assert jpeg.mode == "RGB"
    assert np.asarray(jpeg)[:, 12:].min() > 240, "shown on white"
    assert FORMATS["raw"].item_fields(4)["channels"] == 4
    assert FORMATS["png"].item_fields(4) == {}


def test_raw_without_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match="width and height"):
        decode("raw", bytes(12))


@pytest.mark.parametrize(("width", "height"), [(0, 4), (4, 0), (5, 2), (-4, -4)])
def test_pixels_of_another_size_are_refused(width: int, height: int) -> None:
    with pytest.raises(ValueError, match="48 bytes are not"):
        encode("png", bytes(48), width, height)


def test_a_png_of_a_smooth_picture_is_much_smaller_than_its_pixels() -> None:
    assert len(encode("png", smooth(256, 256), 256, 256)) < 256 * 256 * 3 / 20


def test_jpeg_quality_changes_the_size() -> None:
    sizes = [
        len(encode("jpeg", noise(64, 64), 64, 64, quality=quality)) for quality in (0, 50, 89, 90, 95, 100)
    ]
    assert sizes == sorted(set(sizes))


# ---------------------------------------------------------------- parameters


def test_png_carries_the_parameters_in_itxt() -> None:
    data = encode("png", noise(17, 5), 17, 5, parameters=CAT)
    image = Image.open(io.BytesIO(data))
    assert isinstance(image, PngImagePlugin.PngImageFile)
    image.load()
    assert image.text["parameters"] == CAT.to_infotext()
    assert image.text["mezzotint"] == CAT.to_json()
    assert isinstance(image.text["parameters"], PngImagePlugin.iTXt)
    assert np.array_equal(np.asarray(image), noise(17, 5))


def test_jpeg_carries_the_parameters_in_the_user_comment() -> None:
    image = Image.open(io.BytesIO(encode("jpeg", noise(17, 5), 17, 5, parameters=CAT)))
    comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + CAT.to_infotext().encode("utf-16-be")


def test_the_infotext_reads_like_that_of_the_web_ui() -> None:
    text = made(
        model="emoji", prompt="a cat", num_inference_steps=8, seed=1, guidance_scale=7.0, width=128, height=96
    ).to_infotext()
    assert text == "a cat\nSteps: 8, CFG scale: 7, Seed: 1, Size: 128x96, Model: emoji"


@pytest.mark.parametrize("name", ["url", "png", "jpeg", "jpg", "webp"])
def test_parameters_come_back_from_the_file(name: str) -> None:
    data = encode(name, noise(17, 5), 17, 5, parameters=CAT)
    assert read_parameters(data) == CAT
    assert read_infotext(data) == CAT.to_infotext()


@pytest.mark.parametrize("name", ["png", "jpeg"])
def test_parameters_can_be_left_out(name: str) -> None:
    data = encode(name, noise(17, 5), 17, 5)
    assert read_parameters(data) is None
    assert read_infotext(data) is None


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
ANY = st.builds(
    made,
    model=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}(:[A-Za-z0-9]{1,9})?", fullmatch=True),
    prompt=WORDS,
    num_inference_steps=st.integers(1, 50),
    seed=st.integers(0, 2**63 - 1),
    guidance_scale=st.none() | st.floats(0, 100),
    negative_prompt=st.none() | WORDS,
    width=st.none() | st.integers(8, 16384),
    height=st.none() | st.integers(8, 16384),
    adapter_scale=st.none() | st.floats(-10, 10),
)


@given(ANY)
def test_any_parameters_come_back_from_png_and_jpeg(parameters: Parameters) -> None:
    for name in ("png", "jpeg"):
        assert read_parameters(encode(name, bytes(3), 1, 1, parameters=parameters)) == parameters


@given(ANY)
def test_the_infotext_alone_gives_the_parameters_back_where_the_prompt_is_one_line(
    parameters: Parameters,
) -> None:
    for text in (parameters.spec.prompt, parameters.spec.negative_prompt or ""):
        assume(text == text.strip() and not {"\n", "\r"} & set(text))
    assume((parameters.spec.width is None) == (parameters.spec.height is None))
    assert parse_infotext(parameters.to_infotext()) == parameters


def test_parameters_too_long_for_a_jpeg_segment_are_left_out_and_fit_into_a_png() -> None:
    long = made(
        model="emoji", prompt="🐱" * 10_000, num_inference_steps=8, seed=1, negative_prompt="🐶" * 10_000
    )
    assert read_parameters(encode("png", bytes(3), 1, 1, parameters=long)) == long
    data = encode("jpeg", bytes(3), 1, 1, parameters=long)
    assert read_parameters(data) is None
    assert decode("jpeg", data).size == (1, 1)


def test_parameters_of_other_tools_are_read() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text(
        "parameters",
        "a cat,\non a mat\nNegative prompt: dog,\nblurry\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 42, Size: 512x768, "
        'Lora hashes: "a: b, c: d", Version: v1',
    )
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG", pnginfo=info)
    assert read_parameters(file.getvalue()) == made(
        model="",
        prompt="a cat,\non a mat",
        num_inference_steps=20,
        seed=42,
        guidance_scale=7.5,
        negative_prompt="dog,\nblurry",
        width=512,
        height=768,
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a cat",
        "a cat\nSteps: many, Seed: 1",
        "a cat\nSteps: 8, Seed: -1",
        "Steps: ²",
        f"a cat\nSteps: 8, Seed: {'9' * 5000}",
        "a" * 100_000,
        " " * 100_000,
        'a: "' * 50_000,
    ],
)
def test_a_text_without_steps_and_seed_gives_no_parameters(text: str) -> None:
    assert parse_infotext(text) is None


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", "[" * 100_000, '{"model":1,"prompt":2}'])
def test_a_broken_mezzotint_text_gives_no_parameters(text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("mezzotint", text)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG", pnginfo=info)
    assert read_parameters(file.getvalue()) is None


GOOD = encode("png", noise(8, 8), 8, 8, parameters=CAT)


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(100)])
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_parameters(data)
    assert caught.value.code == "invalid_image"


@attack("A damaged file for png-info", outcome="422")
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on broken EXIF
@given(st.data())
def test_a_damaged_file_never_crashes_the_reader(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["png", "jpeg"]))
    damaged = bytearray(encode(name, noise(8, 8), 8, 8, parameters=CAT))
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[position] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(InvalidRequestError):
        read_parameters(bytes(damaged))


def test_the_idat_is_plain_zlib() -> None:
    start = GOOD.index(b"IDAT") + 4
    length = int.from_bytes(GOOD[start - 8 : start - 4], "big")
    assert len(zlib.decompress(GOOD[start : start + length])) == 8 * (8 * 3 + 1)


def test_how_the_model_was_run_is_in_the_file_and_comes_back() -> None:
    pipeline = {"dtype": "bf16", "scheduler": "DDIMScheduler", "arguments": {"clip_skip": 1}}
    asked = replace(CAT, pipeline=pipeline)
    for name in ("png", "jpeg", "webp"):
        data = encode(name, noise(8, 8), 8, 8, parameters=asked)
        assert read_parameters(data) == asked
    assert ", Sampler: DDIMScheduler, " in asked.to_infotext()
