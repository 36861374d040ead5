"""Pictures on their way in: from the text or file that a request brings along to upright pixels.

Only PNG, JPEG and WebP are read, and a picture's number of pixels is known before it is decoded. Orientation
from EXIF is applied, all other metadata is dropped. Decoding takes time: call it in a thread.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps

from mezzotint.errors import InvalidRequestError, echo
from mezzotint.spec import LIMITS, MAX_PICTURES, ImageSpec, InputPicture

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 2**25
"""Most pixels of a picture that is decoded at all."""
KEPT_PIXELS = 2**22
"""Most pixels that the pictures of one request keep together; larger ones are made smaller at once."""

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_DAMAGE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError,
    struct.error, zlib.error, MemoryError,
)  # fmt: skip
"""What Pillow raises on files that are not what they say."""
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)

Size = tuple[int, int]
"""Width and height in pixels."""


def decode_text(text: str, param: str) -> bytes:
    """The file in a data URL or in bare base64; InvalidRequestError if it is neither."""
    if text[:8].lower().startswith(("http://", "https://")):
        raise InvalidRequestError(
            f"{param} is a URL, and this server fetches no pictures; send the picture itself, as a data URL "
            "or as base64 (a server with allow_image_urls = true fetches them)",
            code="image_url_refused",
            param=param,
        )
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise _not_base64(param, f"is a data URL without base64 ({echo(head)})")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _not_base64(param, f"is not base64 ({error})") from None


def read_pictures(files: Sequence[bytes], param: str = "image") -> tuple[InputPicture, ...]:
    """The pictures in these files, transparent parts on white; InvalidRequestError says what is wrong."""
    if not files:
        raise InvalidRequestError(
            f"{param} is required: send at least one picture", code="missing_field", param=param
        )
    if len(files) > MAX_PICTURES:
        raise InvalidRequestError(
            f"{param} must hold at most {MAX_PICTURES} pictures (got {len(files)}); send fewer",
            code="too_many_images",
            param=param,
        )
    kept = KEPT_PIXELS // len(files)
    return tuple(from_image(_shrunk(_on_white(_open(data, param)), kept).convert("RGB")) for data in files)


def read_mask(
    data: bytes, picture: InputPicture, param: str = "mask", *, alpha: bool = False, invert: bool = False
) -> InputPicture:
    """The mask in this file for `picture`: one channel, 255 where the picture is repainted.

    In the file white is repainted. With `alpha` what is transparent is repainted instead, if the file has
    transparency. With `invert` everything else is. InvalidRequestError for a mask of another shape.
    """
    image = _open(data, param)
    if alpha and image.has_transparency_data:
        mask = ImageOps.invert(image.convert("RGBA").getchannel("A"))
    else:
        mask = _on_white(image).convert("L")
    if invert:
        mask = ImageOps.invert(mask)
    if abs(mask.width * picture.height - mask.height * picture.width) > max(*mask.size, *picture.size):
        raise InvalidRequestError(
            f"{param} must have the shape of the picture, {picture.width}x{picture.height} "
            f"(got {mask.width}x{mask.height})",
            code="mask_size",
            param=param,
        )
    if mask.size != picture.size:
        mask = mask.resize(picture.size, Image.Resampling.BILINEAR)
    return from_image(mask)


def require_pictures(
    spec: ImageSpec, who: str, *, min_pictures: int, max_pictures: int, masks: bool, strength: bool
) -> None:
    """InvalidRequestError, which names what `who` can do, unless it can do what `spec` asks of pictures."""
    if spec.mask is not None and not spec.images:
        raise InvalidRequestError(
            "mask says which part of a picture is repainted; send image too",
            code="missing_field",
            param="image",
        )
    if len(spec.images) < min_pictures:
        raise InvalidRequestError(
            f"{who} edits pictures and makes none from words only; send image too",
            code="missing_field",
            param="image",
        )
    if len(spec.images) > max_pictures:
        can = f"works from {max_pictures} picture{'s' * (max_pictures > 1)} a request"
        raise InvalidRequestError(
            f"{who} {can} (got {len(spec.images)}); send fewer"
            if max_pictures
            else f"{who} makes pictures from words only; leave image out, or name another endpoint",
            code="not_supported",
            param="image",
        )
    if spec.mask is not None and not masks:
        raise InvalidRequestError(
            f"{who} works from a whole picture and repaints no part of one; leave mask out",
            code="not_supported",
            param="mask",
        )
    low, high = LIMITS["strength"]
    if spec.strength is not None and not low <= spec.strength <= high:
        raise InvalidRequestError(
            f"strength must be between {low} and {high} (got {spec.strength})",
            code="out_of_range",
            param="strength",
        )
    steps = spec.num_inference_steps * (1.0 if spec.strength is None else spec.strength)
    if strength and spec.images and steps < 1:
        raise InvalidRequestError(
            "strength x num_inference_steps is how many steps run and must be at least 1 "
            f"(got {spec.strength} x {spec.num_inference_steps}); raise one of them",
            code="out_of_range",
            param="strength",
        )


def require_controls(
    num_images: int, weights: Sequence[float], who: str, routes: Sequence[str], *, edits: bool = False
) -> None:
    """InvalidRequestError, which names the ControlNets of `who`, unless they can follow so many pictures.

    `edits`: the request has a picture to begin from, too.
    """
    if not num_images and not weights:
        return
    if not routes:
        raise InvalidRequestError(
            f"{who} has no ControlNet; leave control_images and controlnet_weights out",
            code="not_supported",
            param="control_images" if num_images else "controlnet_weights",
        )
    if num_images > len(routes):
        raise InvalidRequestError(
            f"control_images: {who} follows {', '.join(routes)}, in this order (got {num_images} pictures); "
            "send at most one for each",
            code="not_supported",
            param="control_images",
        )
    if weights and len(weights) != num_images:
        raise InvalidRequestError(
            f"controlnet_weights must have one weight for each of control_images ({num_images}; "
            f"got {len(weights)})",
            code="invalid_value",
            param="controlnet_weights",
        )
    low, high = LIMITS["controlnet_weights"]
    if wrong := [weight for weight in weights if not low <= weight <= high]:
        raise InvalidRequestError(
            f"controlnet_weights must be between {low} and {high} (got {wrong[0]})",
            code="out_of_range",
            param="controlnet_weights",
        )
    if edits:
        raise InvalidRequestError(
            "a request has image or control_images, not both; leave one of them out",
            code="not_supported",
            param="control_images",
        )


def to_image(picture: InputPicture, size: Size | None = None) -> Image.Image:
    """The picture for Pillow, in another size if `size` says so."""
    mode, resample = (
        ("RGB", Image.Resampling.LANCZOS) if picture.channels == 3 else ("L", Image.Resampling.BILINEAR)
    )
    image = Image.frombytes(mode, picture.size, picture.pixels)
    return image if size in (None, picture.size) else image.resize(size, resample)


def output_size(
    picture: InputPicture, width: int | None, height: int | None, *, own: Size, multiple: int
) -> Size:
    """The size of what is made from `picture` where the request does not name all of it.

    The shape is the picture's. The area is the picture's too, but at most that of the model's `own` size.
    Both sides are multiples of `multiple`.
    """
    if width is not None and height is not None:
        return width, height
    if width is not None:
        return width, _rounded(width * picture.height / picture.width, multiple)
    if height is not None:
        return _rounded(height * picture.width / picture.height, multiple), height
    scale = min(1.0, math.sqrt(own[0] * own[1] / (picture.width * picture.height)))
    return _rounded(picture.width * scale, multiple), _rounded(picture.height * scale, multiple)


def _rounded(pixels: float, multiple: int) -> int:
    return max(1, int(pixels / multiple + 0.5)) * multiple


def _open(data: bytes, param: str) -> Image.Image:
    """The decoded, upright picture in a file."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise _too_large(param, f"{image.width}x{image.height}")
        image.load()
        return ImageOps.exif_transpose(image)
    except _TOO_LARGE:
        raise _too_large(param, "far more") from None
    except InvalidRequestError:
        raise
    except _DAMAGE as error:
        if data.startswith(_SIGNATURES):
            raise InvalidRequestError(
                f"{param} is damaged or cut short ({echo(str(error))}); send the file again as it was saved",
                code="image_damaged",
                param=param,
            ) from None
        raise InvalidRequestError(
            f"{param} must be a PNG, JPEG or WebP file (got {len(data)} bytes of something else)",
            code="image_format",
            param=param,
        ) from None


def _on_white(image: Image.Image) -> Image.Image:
    """8 bits a channel, without transparency."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8), "L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image)
    return image


def _shrunk(image: Image.Image, max_pixels: int) -> Image.Image:
    """The picture, made smaller if it has more pixels than that."""
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale >= 1:
        return image
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def from_image(image: Image.Image) -> InputPicture:
    """The picture (RGB) or mask (L) that `to_image` gives back."""
    return InputPicture(image.width, image.height, image.tobytes(), channels=len(image.getbands()))


def _too_large(param: str, got: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param} must have at most {MAX_PIXELS} pixels (got {got}); make it smaller",
        code="image_too_large",
        param=param,
    )


def _not_base64(param: str, text: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param} {text}; send a picture as data:image/png;base64,... or as bare base64",
        code="image_not_base64",
        param=param,
    )
