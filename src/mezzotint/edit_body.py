"""The body of `POST /dedicated/v1/images/edits`: a generation's fields, and the pictures as text."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import MISSING, ConfigDict, Field, JsonValue, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from mezzotint.schemas import DedicatedImageGenerationBody, make_body, parse_json
from mezzotint.spec import MAX_PICTURES, ImageSpec, between

EDIT_STEPS = 20
"""Steps of an edit on the dedicated route that names none, as Friendli's API has it."""
_EDIT_EXAMPLES: list[JsonValue] = [
    {
        "model": "emoji",
        "image": {"image": "data:image/png;base64,iVBORw0KGgo="},
        "prompt": "a smiling cat",
        "strength": 0.6,
        "response_format": "png",
    },
]


def _picture_texts(value: Any) -> tuple[str, ...]:
    """The texts in `{"image": X}` or in a list of such."""
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


def _picture_text(value: Any) -> str:
    if isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be one picture (got a list)")
    return _picture_texts(value)[0]


_PICTURE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"image": {"type": "string", "description": "A data URL or bare base64."}},
    "required": ["image"],
    "additionalProperties": False,
}
_PICTURES_SCHEMA = {
    "anyOf": [_PICTURE_SCHEMA, {"type": "array", "items": _PICTURE_SCHEMA, "maxItems": MAX_PICTURES}]
}


class DedicatedImageEditBody(DedicatedImageGenerationBody):
    """Body of `POST /dedicated/v1/images/edits`."""

    model_config = ConfigDict(json_schema_extra={"examples": _EDIT_EXAMPLES})

    num_inference_steps: Annotated[int, between("num_inference_steps")] = Field(
        default=EDIT_STEPS,
        description="Number of inference steps; supported range [1, 50]. 20 when unset.",
        examples=[20],
    )
    image: Annotated[tuple[str, ...], PlainValidator(_picture_texts), WithJsonSchema(_PICTURES_SCHEMA)] = (
        Field(description="The picture to edit: PNG, JPEG or WebP. Some models take several.")
    )
    mask: Annotated[str, PlainValidator(_picture_text), WithJsonSchema(_PICTURE_SCHEMA)] | MISSING | None = (
        Field(
            default=MISSING,
            description="White is repainted; everything else keeps its pixels. It has the picture's shape.",
        )
    )
    strength: Annotated[float, between("strength")] | MISSING | None = Field(
        default=MISSING,
        description="How much is made anew, and the share of the steps that run. When unset 0.8, with a mask "
        "1. Models that edit by themselves do not use it; the answer then has a warning.",
        examples=[0.6],
    )

    @property
    def spec(self) -> ImageSpec:
        """Without the pictures, which are not decoded yet."""
        words = super().spec
        return replace(words, strength=self.strength if isinstance(self.strength, float) else None)


def parse_edit_body(raw: bytes) -> DedicatedImageEditBody:
    """As `parse_body`, for a request with pictures."""
    body = make_body(parse_json(raw), DedicatedImageEditBody)
    assert isinstance(body, DedicatedImageEditBody), "it is of the kind asked for"
    return body
