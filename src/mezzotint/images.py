"""Pixels to files and back: PNG, JPEG and raw, with the generation parameters inside.

Pixels are uint8 red, green, blue and perhaps alpha, row-major, height x width x 3 or 4. PNG, WebP and raw
keep the alpha; JPEG, which has none, shows the picture on white. A file depends on pixels and parameters
alone, so the same request gives the same bytes. Encoding leaves the interpreter lock free most of the time:
call it in a thread. A new response format is one entry in FORMATS.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter

from mezzotint.errors import InvalidRequestError
from mezzotint.spec import AdapterUse, ImageSpec

JPEG_QUALITY = 95
DEFLATE_LEVEL = 1
_FULL_COLOUR_QUALITY = 90
"""From this JPEG quality on, colour keeps the full resolution: saturated edges show it."""
_MAX_SEGMENT = 65_000
"""A JPEG segment holds at most 64 KiB; longer parameters are left out."""
_EXIF_IFD, _USER_COMMENT, _MAKER_NOTE = 0x8769, 0x9286, 0x927C
_UNICODE = b"UNICODE\0"

_SPEC = TypeAdapter(ImageSpec)
_NOT_STORED = ("adapters", "extra", "images", "mask", "control_images")
_STORED = [name for name in ImageSpec.__dataclass_fields__ if name not in _NOT_STORED]

Pixels = bytes | bytearray | memoryview | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Parameters:
    """What made a picture; as written into the file, and enough to make it again.

    Pictures that the request brought along are nowhere in it.
    """

    model: str
    """`ENDPOINT_ID` or `ENDPOINT_ID:ADAPTER_ROUTE`."""
    spec: ImageSpec
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    """How the endpoint runs its model: dtype, and where they are set scheduler and fixed arguments."""

    @property
    def adapters(self) -> list[dict[str, Any]] | None:
        """The adapters as a request lists them; None where `model` says it all."""
        uses = self.spec.adapters
        if len(uses) < 2 and all(use.scale is None for use in uses):
            return None
        return [{"route": use.route} | ({} if use.scale is None else {"scale": use.scale}) for use in uses]

    def request_fields(self) -> dict[str, Any]:
        """The fields of the request that gives this picture again, without those that are None."""
        fields = {name: getattr(self.spec, name) for name in _STORED}
        values = {"model": self.model, **fields, "adapters": self.adapters}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def to_dict(self) -> dict[str, Any]:
        """As `request_fields`, and what the endpoint adds to every request."""
        return self.request_fields() | ({"pipeline": dict(self.pipeline)} if self.pipeline else {})

    def to_json(self) -> str:
        """The `mezzotint` text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, separators=(",", ":"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Parameters:
        """The opposite of `to_dict`; ValueError for unknown names and wrong types.

        `adapter_scale`, the strength of the only adapter, is what earlier versions wrote.
        """
        fields = dict(values)
        model, scale = fields.pop("model", None), fields.pop("adapter_scale", None)
        adapters, pipeline = fields.pop("adapters", None), fields.pop("pipeline", {})
        if not isinstance(model, str) or not isinstance(pipeline, dict):
            raise ValueError("model must be a string and pipeline a table")
        _, _, route = model.partition(":")
        if fields.keys() - set(_STORED):
            raise ValueError(f"unknown fields: {', '.join(fields.keys() - set(_STORED))}")
        if adapters is None:
            adapters = [{"route": route, "scale": scale}] if route else []
        spec = _SPEC.validate_json(json.dumps({**fields, "adapters": adapters}), strict=True)
        return cls(model, spec, pipeline)

    def to_infotext(self) -> str:
        """The `parameters` text, in the form that AUTOMATIC1111's web UI writes and many tools read."""
        spec = self.spec
        lines = [spec.prompt]
        if spec.negative_prompt:
            lines.append(f"Negative prompt: {spec.negative_prompt}")
        size = f"{spec.width}x{spec.height}" if spec.width and spec.height else None
        last = {
            "Steps": spec.num_inference_steps,
            "Sampler": self.pipeline.get("scheduler"),
            "CFG scale": _number(spec.guidance_scale),
            "Seed": spec.seed,
            "Size": size,
            "Model": self.model,
            "Denoising strength": _number(spec.strength),
        }
        if len(spec.adapters) > 1:
            last["Adapters"] = ", ".join(_adapter_text(use) for use in spec.adapters)
        elif spec.adapters:
            last["Adapter scale"] = _number(spec.adapters[0].scale)
        lines.append(
            ", ".join(f"{key}: {_quoted(value)}" for key, value in last.items() if value is not None)
        )
        return "\n".join(lines)


def _adapter_text(use: AdapterUse) -> str:
    return use.route if use.scale is None else f"{use.route} {_number(use.scale)}"


def _number(value: float | None) -> str | None:
    return None if value is None else str(value).removesuffix(".0")


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


# ---------------------------------------------------------------- encoding


@dataclass(frozen=True, slots=True)
class Format:
    """One response format: how its bytes are made and read, and what the answer's item says about it."""

    mime_type: str
    suffix: str
    encode: Callable[[NDArray[np.uint8], Parameters | None, int], bytes]
    decode: Callable[[bytes, int | None, int | None], Image.Image]
    bare: bool = False
    """Whether the bytes are the pixels alone, so that the answer must say how they lie."""

    def item_fields(self, channels: int) -> dict[str, Any]:
        """What an answer's item says beside width and height."""
        return {"channels": channels, "dtype": "uint8", "layout": "HWC"} if self.bare else {}


def encode(
    response_format: str,
    pixels: Pixels,
    width: int,
    height: int,
    *,
    parameters: Parameters | None = None,
    quality: int = JPEG_QUALITY,
) -> bytes:
    """The file (for `raw` the bare pixels) of a picture; `parameters` None writes none; `quality` is JPEG's.

    ValueError if the number of bytes is not width x height x 3 or 4.
    """
    array = np.frombuffer(pixels, dtype=np.uint8)
    channels = array.size // (width * height) if width > 0 and height > 0 else 0
    if channels not in (3, 4) or array.size != width * height * channels:
        raise ValueError(f"{array.size} bytes are not {width} x {height} pixels of 3 or 4 bytes")
    return FORMATS[response_format].encode(array.reshape(height, width, channels), parameters, quality)


def decode(
    response_format: str, data: bytes, width: int | None = None, height: int | None = None
) -> Image.Image:
    """The picture in `data`; `raw` needs its width and height. ValueError if it does not decode."""
    image = FORMATS[response_format].decode(data, width, height)
    image.load()
    return image


def _encode_png(array: NDArray[np.uint8], parameters: Parameters | None, quality: int) -> bytes:
    """PNG with filter Sub on every row: far quicker than choosing per row, and hardly larger."""
    height, width, channels = array.shape
    rows = array.reshape(height, width * channels)
    filtered = np.empty((height, width * channels + 1), dtype=np.uint8)
    filtered[:, 0] = 1
    filtered[:, 1 : channels + 1] = rows[:, :channels]
    np.subtract(rows[:, channels:], rows[:, :-channels], out=filtered[:, channels + 1 :])
    colour_type = 2 if channels == 3 else 6
    texts = {"parameters": parameters.to_infotext(), "mezzotint": parameters.to_json()} if parameters else {}
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)),
            *(_chunk(b"iTXt", key.encode() + bytes(5) + text.encode()) for key, text in texts.items()),
            _chunk(b"IDAT", isal_zlib.compress(filtered, DEFLATE_LEVEL)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return b"".join(
        (struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind))))
    )


def _encode_jpeg(array: NDArray[np.uint8], parameters: Parameters | None, quality: int) -> bytes:
    options: dict[str, Any] = {}
    if parameters:
        exif = Image.Exif()
        exif.endian = ">"
        exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _UNICODE + parameters.to_infotext().encode("utf-16-be")
        texts = {"exif": exif.tobytes(), "comment": parameters.to_json().encode()}
        options = {name: text for name, text in texts.items() if len(text) <= _MAX_SEGMENT}
    file = io.BytesIO()
    Image.fromarray(on_white(array)).save(
        file,
        format="JPEG",
        quality=max(1, quality),
        subsampling="4:4:4" if quality >= _FULL_COLOUR_QUALITY else "4:2:0",
        **options,
    )
    return file.getvalue()


def on_white(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """height x width x 3: a picture with alpha as a white page shows it, any other as it is."""
    if array.shape[2] == 3:
        return array
    alpha = array[:, :, 3:].astype(np.uint16)
    shown: NDArray[np.uint8] = ((array[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return shown


def _encode_webp(array: NDArray[np.uint8], parameters: Parameters | None, quality: int) -> bytes:
    """WebP; its infotext is in EXIF's UserComment as in a JPEG, and the JSON is in MakerNote."""
    options: dict[str, Any] = {}
    if parameters:
        exif = Image.Exif()
        exif.endian = ">"
        fields = exif.get_ifd(_EXIF_IFD)
        fields[_USER_COMMENT] = _UNICODE + parameters.to_infotext().encode("utf-16-be")
        fields[_MAKER_NOTE] = parameters.to_json().encode()
        options = {"exif": exif.tobytes()}
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="WEBP", quality=max(1, quality), method=2, **options)
    return file.getvalue()


def _encode_raw(array: NDArray[np.uint8], parameters: Parameters | None, quality: int) -> bytes:
    return array.tobytes()


def _decode_file(data: bytes, width: int | None, height: int | None) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _decode_raw(data: bytes, width: int | None, height: int | None) -> Image.Image:
    if width is None or height is None:
        raise ValueError("raw pixels need their width and height, and the answer does not give them")
    return Image.frombytes("RGBA" if len(data) == width * height * 4 else "RGB", (width, height), data)


_PNG = Format("image/png", ".png", _encode_png, _decode_file)
_JPEG = Format("image/jpeg", ".jpg", _encode_jpeg, _decode_file)
FORMATS: Mapping[str, Format] = {
    "url": _PNG,
    "png": _PNG,
    "jpeg": _JPEG,
    "jpg": _JPEG,
    "webp": Format("image/webp", ".webp", _encode_webp, _decode_file),
    "raw": Format("application/octet-stream", ".rgb", _encode_raw, _decode_raw, bare=True),
}
"""By the names of the contract; `url` is the file behind the URL."""
MEDIA_TYPES: Mapping[str, str] = {kind.suffix: kind.mime_type for kind in FORMATS.values()}
"""By the suffix of a file."""


# ---------------------------------------------------------------- reading parameters back


MAX_HEAD_BYTES = 2**20
"""How far into a PNG or JPEG its texts are looked for."""
MAX_TEXT = 2**17
"""Most characters of parameters that are read: two of the longest prompts, and to spare."""


def read_parameters(data: bytes) -> Parameters | None:
    """What made this picture file, None if it does not say; InvalidRequestError if it is no picture."""
    texts = _read_texts(data)
    return _from_json(texts.get("mezzotint", "")) or parse_infotext(texts.get("parameters", ""))


def read_infotext(data: bytes) -> str | None:
    """The `parameters` text of a picture file, whoever wrote it; InvalidRequestError if it is no picture."""
    text = _read_texts(data).get("parameters")
    return None if text is None or len(text) > MAX_TEXT else text


def _read_texts(data: bytes) -> dict[str, str]:
    try:
        head = data if data.startswith(b"RIFF") else data[:MAX_HEAD_BYTES]  # WebP has its texts at the end
        image = Image.open(io.BytesIO(head), formats=("PNG", "JPEG", "WEBP"))
        if image.format == "PNG":
            return {name: str(image.info[name]) for name in ("parameters", "mezzotint") if name in image.info}
        texts = {"mezzotint": image.info.get("comment", b"").decode("utf-8", "replace")}
        exif = image.getexif().get_ifd(_EXIF_IFD)
        comment, note = exif.get(_USER_COMMENT, b""), exif.get(_MAKER_NOTE, b"")
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        raise InvalidRequestError(
            "not a readable PNG, JPEG or WebP; send the file as it was saved", code="invalid_image"
        ) from None
    if image.format == "WEBP" and isinstance(note, bytes):
        texts["mezzotint"] = note.decode("utf-8", "replace")
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        texts["parameters"] = comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
    return texts


def _from_json(text: str) -> Parameters | None:
    if len(text) > MAX_TEXT:
        return None
    try:
        return Parameters.from_dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None


_PAIR = re.compile(r'([\w ]{1,40}): ("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parse_infotext(text: str) -> Parameters | None:
    """The parameters in a `parameters` text, None if it lacks steps or seed; unknown settings are skipped.

    A text of more than MAX_TEXT characters is not read.
    """
    if len(text) > MAX_TEXT:
        return None
    *lines, last = text.strip().split("\n")
    values = {key.strip(): _unquoted(value) for key, value in _PAIR.findall(last)}
    if not all(re.fullmatch(r"\d{1,20}", values.get(name, "")) for name in ("Steps", "Seed")):
        return None
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", values.get("Size", ""))
    return Parameters.from_dict(
        {
            "model": values.get("Model", ""),
            "prompt": prompt,
            "num_inference_steps": int(values["Steps"]),
            "seed": int(values["Seed"]),
            "guidance_scale": _parse_number(values.get("CFG scale", "")),
            "negative_prompt": negative or None,
            "width": int(size[1]) if size else None,
            "height": int(size[2]) if size else None,
            "strength": _parse_number(values.get("Denoising strength", "")),
            "adapter_scale": _parse_number(values.get("Adapter scale", "")),
            "adapters": _parse_adapters(values.get("Adapters", "")),
        }
    )


def _parse_adapters(text: str) -> list[dict[str, Any]] | None:
    uses = [part.partition(" ") for part in text.split(", ") if part]
    return [{"route": route, "scale": _parse_number(scale)} for route, _, scale in uses] or None


def _parse_number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"-?\d{1,6}(\.\d{1,20})?(e-\d{1,3})?", text) else None


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value
