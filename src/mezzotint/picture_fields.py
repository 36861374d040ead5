"""The form that pictures have in a body of the dedicated routes: `{"image": X}`, or a list of such."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from mezzotint.spec import MAX_PICTURES


def _texts(value: Any) -> tuple[str, ...]:
    entries = value if isinstance(value, list) else [value]
    if len(entries) > MAX_PICTURES:
        limit = {"most": MAX_PICTURES, "got": len(entries)}
        raise PydanticCustomError("too_many_images", "must hold at most {most} pictures (got {got})", limit)
    for entry in entries:
        if not isinstance(entry, dict) or list(entry) != ["image"] or not isinstance(entry["image"], str):
            raise PydanticCustomError(
                "invalid_type",
                "must be {form} or a list of such, X a data URL or base64",
                {"form": '{"image": X}'},
            )
    return tuple(entry["image"] for entry in entries)


def _text(value: Any) -> str:
    if isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be one picture (got a list)")
    return _texts(value)[0]


_PICTURE: dict[str, Any] = {
    "type": "object",
    "properties": {"image": {"type": "string", "description": "A data URL or bare base64."}},
    "required": ["image"],
    "additionalProperties": False,
}
_LIST: dict[str, Any] = {"type": "array", "items": _PICTURE, "maxItems": MAX_PICTURES}

Picture = Annotated[str, PlainValidator(_text), WithJsonSchema(_PICTURE)]
"""One picture: its data URL or base64."""
Pictures = Annotated[tuple[str, ...], PlainValidator(_texts), WithJsonSchema({"anyOf": [_PICTURE, _LIST]})]
"""One picture or several."""
