"""What a user gives for a picture, as the text that the wire has for it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint.errors import InvalidRequestError, echo

if TYPE_CHECKING:
    from PIL.Image import Image

_ADDRESSES = ("data:", "http://", "https://")


def picture_text(source: str | Path | bytes | Image, param: str = "image") -> str:
    """The file in base64; an address as it is. InvalidRequestError if a path cannot be read."""
    if isinstance(source, str) and source.lower().startswith(_ADDRESSES):
        return source
    return base64.b64encode(_file_of(source, param)).decode()


def _file_of(source: str | Path | bytes | Image, param: str) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, str | Path):
        try:
            return Path(source).read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InvalidRequestError(
                f"{param}: {echo(str(source))} cannot be read ({reason})", code="invalid_image", param=param
            ) from None
    if not hasattr(source, "save"):
        raise InvalidRequestError(
            f"{param} must be a path, bytes, a picture of Pillow's or a URL (got {type(source).__name__})",
            code="invalid_type",
            param=param,
        )
    file = io.BytesIO()
    source.save(file, "PNG")
    return file.getvalue()
