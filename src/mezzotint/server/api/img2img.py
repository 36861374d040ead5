"""What the web UI's `img2img` may say of its picture and mask, beyond the pictures themselves.

`resize_mode` and `mask_blur` are done to the pictures before they go on. `inpainting_fill` and
`inpaint_full_res` are other ways of painting, which this server has not: a warning says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image, ImageFilter

from mezzotint.errors import InvalidRequestError
from mezzotint.input_pictures import Size, from_image, to_image
from mezzotint.schemas import shown
from mezzotint.spec import ImageSpec

STRETCH, CROP, FILL, LATENT = range(4)
"""Of `resize_mode`. LATENT stretches latents instead of pixels."""
ORIGINAL = 1
"""Of `inpainting_fill`: what is repainted begins from what was there."""
MAX_BLUR = 64
"""Pixels."""


def warnings_of(values: Mapping[str, Any], *, mask: bool) -> list[str]:
    """A sentence for each wish that has no effect; InvalidRequestError for one that cannot be."""
    mode, fill = _integer(values, "resize_mode", STRETCH, 3), _integer(values, "inpainting_fill", ORIGINAL, 3)
    _integer(values, "mask_blur", 0, MAX_BLUR)
    found = []
    if mode == LATENT:
        found.append(f"resize_mode {LATENT} had no effect: the picture itself is stretched, as by {STRETCH}")
    if mask and fill != ORIGINAL:
        found.append(
            f"inpainting_fill {fill} had no effect: the masked part begins from the picture itself, as by "
            f"{ORIGINAL}"
        )
    if mask and values.get("inpaint_full_res"):
        found.append("inpaint_full_res had no effect: the whole picture is drawn, not the masked part alone")
    return found


def prepared(spec: ImageSpec, values: Mapping[str, Any]) -> ImageSpec:
    """The spec with its picture and mask cropped, filled up and blurred as asked; call it in a thread."""
    blur = _integer(values, "mask_blur", 0, MAX_BLUR)
    mode = _integer(values, "resize_mode", STRETCH, 3)
    picture, mask = spec.images[0], spec.mask
    if mode in (CROP, FILL) and spec.width and spec.height:
        size = (spec.width, spec.height)
        change = _cropped if mode == CROP else _filled
        picture = from_image(change(to_image(picture), size))
        mask = mask and from_image(change(to_image(mask), size))
    if mask is not None and blur:
        mask = from_image(to_image(mask).filter(ImageFilter.GaussianBlur(blur)))
    return replace(spec, images=(picture, *spec.images[1:]), mask=mask)


def _cropped(image: Image.Image, size: Size) -> Image.Image:
    """The middle of the image, in the shape of `size`."""
    width = min(image.width, max(1, round(image.height * size[0] / size[1])))
    height = min(image.height, max(1, round(image.width * size[1] / size[0])))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _filled(image: Image.Image, size: Size) -> Image.Image:
    """All of the image in the middle of the shape of `size`; its edges run on into what is left over."""
    width = max(image.width, round(image.height * size[0] / size[1]))
    height = max(image.height, round(image.width * size[1] / size[0]))
    left, top = (width - image.width) // 2, (height - image.height) // 2
    made = Image.new(image.mode, (width, height))
    for x, span, column in _stretches(left, image.width, width):
        for y, rise, row in _stretches(top, image.height, height):
            part = image.crop((column[0], row[0], column[1], row[1]))
            made.paste(part.resize((span, rise), Image.Resampling.NEAREST), (x, y))
    return made


def _stretches(before: int, inner: int, whole: int) -> list[tuple[int, int, tuple[int, int]]]:
    """Where each third goes, how long it is, and from which part of the image it is taken."""
    after = whole - before - inner
    thirds = [
        (0, before, (0, 1)),
        (before, inner, (0, inner)),
        (before + inner, after, (inner - 1, inner)),
    ]
    return [third for third in thirds if third[1]]


def _integer(values: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        text = f"{name} must be an integer (got {shown(value)})"
        raise InvalidRequestError(text, code="invalid_type", param=name)
    if not 0 <= value <= most:
        text = f"{name} must be between 0 and {most} (got {shown(value)})"
        raise InvalidRequestError(text, code="out_of_range", param=name)
    return value
