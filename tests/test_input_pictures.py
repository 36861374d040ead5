"""Pictures on their way in: what is read comes out upright and in colour, everything else is one sentence."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mezzotint import input_pictures
from mezzotint.errors import InvalidRequestError
from mezzotint.input_pictures import decode_text, output_size, read_mask, read_pictures, to_image
from mezzotint.spec import InputPicture
from tests.attacks import attack

RED, GREEN = (255, 0, 0), (0, 255, 0)


def file_of(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def half_red(width: int = 4, height: int = 2, mode: str = "RGB") -> Image.Image:
    """Red, its right half green."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height))
    return image.convert(mode)


def pixels(picture: InputPicture) -> Any:
    return np.frombuffer(picture.pixels, np.uint8).reshape(picture.height, picture.width, picture.channels)


def code_of(data: bytes) -> str:
    with pytest.raises(InvalidRequestError) as refused:
        read_pictures([data])
    assert refused.value.param == "image"
    return refused.value.code


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "RGB"), ("PNG", "P"), ("WEBP", "RGB"), ("JPEG", "RGB"), ("JPEG", "CMYK")]
)
def test_every_format_and_mode_comes_out_in_colour(form: str, mode: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {"quality": 95} if form == "JPEG" else {}
    (picture,) = read_pictures([file_of(half_red(64, 32, mode), form, **options)])
    assert (picture.size, picture.channels) == ((64, 32), 3)
    off = np.abs(pixels(picture).astype(int) - np.asarray(half_red(64, 32)))[:, [0, 63]]
    assert off.max() <= 4


def test_sixteen_bits_keep_their_upper_eight() -> None:
    image = Image.fromarray(np.array([[0, 0x80FF, 0xFFFF]], np.uint16))
    (picture,) = read_pictures([file_of(image)])
    assert pixels(picture)[0, :, 0].tolist() == [0, 0x80, 0xFF]


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    for data in (file_of(image), file_of(palette, transparency=1)):
        (picture,) = read_pictures([data])
        assert pixels(picture)[0].tolist() == [list(RED), [255, 255, 255]]


def test_a_picture_is_turned_upright_and_what_its_file_tells_is_dropped() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: the top is at the right
    (picture,) = read_pictures([file_of(half_red(64, 32), "JPEG", exif=exif, quality=95)])
    assert picture.size == (32, 64)
    top, bottom = pixels(picture)[4, 16], pixels(picture)[-4, 16]
    assert top[0] > 200 > bottom[0]
    assert bottom[1] > 200 > top[1]


def test_equal_pictures_have_equal_digests_whatever_their_files() -> None:
    one, other = half_red(), half_red()
    other.putpixel((0, 0), (254, 0, 0))
    files = [file_of(one), file_of(one, "WEBP", lossless=True), file_of(one, compress_level=0)]
    assert len({read_pictures([data])[0].digest for data in files}) == 1
    assert read_pictures([file_of(other)])[0].digest != read_pictures([file_of(one)])[0].digest
    assert InputPicture(2, 1, b"123456").digest != InputPicture(1, 2, b"123456").digest


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is that large, with rows of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(2**20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@attack("A decompression bomb as a picture", outcome="422 before it is decoded")
@pytest.mark.parametrize("side", [5793, 10_000, 20_000, 60_000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(side, side)
    assert len(data) < 10_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    assert code_of(data) == "image_too_large"


def test_large_pictures_are_made_smaller_together() -> None:
    data = file_of(Image.new("RGB", (4000, 3000), RED))
    (alone,) = read_pictures([data])
    assert alone.width * alone.height <= input_pictures.KEPT_PIXELS
    assert abs(alone.width / alone.height - 4 / 3) < 0.01
    three = read_pictures([data] * 3)
    assert sum(picture.width * picture.height for picture in three) <= input_pictures.KEPT_PIXELS


def test_each_fault_has_its_code() -> None:
    png, jpeg = file_of(half_red(64, 64)), file_of(half_red(64, 64), "JPEG")
    assert code_of(png[: len(png) // 2]) == "image_damaged"
    assert code_of(jpeg[: len(jpeg) // 2]) == "image_damaged"
    assert code_of(b"") == "image_format"
    assert code_of(file_of(half_red(), "GIF")) == "image_format"
    assert code_of(file_of(half_red(), "BMP")) == "image_format"
    assert code_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == "image_format"
    with pytest.raises(InvalidRequestError, match=r"at most 16 pictures \(got 300\)") as many:
        read_pictures([png] * 300)
    assert many.value.code == "too_many_images"
    with pytest.raises(InvalidRequestError, match="at least one picture"):
        read_pictures([])


@attack("Pictures with bytes changed at random", outcome="a picture or 422")
def test_damaged_files_give_a_picture_or_one_of_our_errors() -> None:
    chance = random.Random(0)
    image = Image.effect_noise((48, 40), 60)
    files = [
        file_of(image.convert("RGB")),
        file_of(image.convert("P")),
        file_of(image.convert("RGB"), "JPEG"),
        file_of(image.convert("RGB"), "WEBP"),
    ]
    refused = 0
    for _ in range(400):
        data = bytearray(chance.choice(files))
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            read_pictures([bytes(data[: chance.randint(1, len(data))])])
        except InvalidRequestError:
            refused += 1
    assert refused > 100


# ---------------------------------------------------------------- texts


def test_data_urls_and_bare_base64_are_the_file() -> None:
    text = base64.b64encode(b"a picture").decode()
    for spelling in (
        text,
        f"data:image/png;base64,{text}",
        f"DATA:;BASE64,{text}",
        f"{text[:4]}\n{text[4:]}",
    ):
        assert decode_text(spelling, "image") == b"a picture"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("not base64!", "image_not_base64"),
        ("YWJjZ", "image_not_base64"),
        ("ünïcode", "image_not_base64"),
        ("data:image/png,abc", "image_not_base64"),
        ("data:image/png;base64", "image_not_base64"),
        ("data:image/png;base64,%%%", "image_not_base64"),
        ("https://example.com/a.png", "image_url_refused"),
        ("HTTP://169.254.169.254/", "image_url_refused"),
    ],
)
def test_other_texts_are_refused(text: str, code: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        decode_text(text, "image")
    assert refused.value.code == code


# ---------------------------------------------------------------- masks

PICTURE = read_pictures([file_of(half_red(8, 8))])[0]


def test_white_is_repainted() -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste((255, 255, 255), (4, 0, 8, 8))
    mask = read_mask(file_of(image), PICTURE)
    assert (mask.channels, mask.size) == (1, (8, 8))
    assert pixels(mask)[0, :, 0].tolist() == [0] * 4 + [255] * 4
    assert read_mask(file_of(image.convert("1")), PICTURE) == mask


def test_with_alpha_the_transparent_part_is_repainted() -> None:
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    mask = read_mask(file_of(image), PICTURE, alpha=True)
    assert pixels(mask)[0, :, 0].tolist() == [255] * 4 + [0] * 4
    opaque = Image.new("L", (8, 8), 255)
    assert set(read_mask(file_of(opaque), PICTURE, alpha=True).pixels) == {255}


def test_a_mask_follows_its_picture_to_its_size_but_has_its_shape() -> None:
    assert read_mask(file_of(Image.new("L", (80, 80))), PICTURE).size == (8, 8)
    with pytest.raises(InvalidRequestError, match=r"the shape of the picture, 8x8 \(got 80x40\)") as refused:
        read_mask(file_of(Image.new("L", (80, 40))), PICTURE)
    assert (refused.value.code, refused.value.param) == ("mask_size", "mask")


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("picture", "asked", "expected"),
    [
        ((128, 128), (None, None), (128, 128)),
        ((512, 512), (None, None), (128, 128)),
        ((400, 100), (None, None), (256, 64)),
        ((60, 40), (None, None), (64, 48)),
        ((3, 3), (None, None), (16, 16)),
        ((400, 100), (64, None), (64, 16)),
        ((400, 100), (None, 32), (128, 32)),
        ((400, 100), (48, 64), (48, 64)),
    ],
)
def test_the_size_comes_from_the_picture_where_nobody_names_it(
    picture: Any, asked: Any, expected: Any
) -> None:
    given = InputPicture(picture[0], picture[1], b"")
    assert output_size(given, *asked, own=(128, 128), multiple=16) == expected


def test_a_picture_of_the_right_size_is_left_as_it_is() -> None:
    assert to_image(PICTURE, (8, 8)).tobytes() == PICTURE.pixels
    assert to_image(PICTURE, (4, 2)).size == (4, 2)
