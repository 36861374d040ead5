"""The body of `POST /dedicated/v1/images/edits`: a generation's fields, and the pictures as text."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import MISSING, ConfigDict, Field, JsonValue

from mezzotint.picture_fields import Picture, Pictures
from mezzotint.schemas import DedicatedImageGenerationBody, make_body, parse_json
from mezzotint.spec import ImageSpec, between

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


class DedicatedImageEditBody(DedicatedImageGenerationBody):
    """Body of `POST /dedicated/v1/images/edits`."""

    model_config = ConfigDict(json_schema_extra={"examples": _EDIT_EXAMPLES})

    num_inference_steps: Annotated[int, between("num_inference_steps")] = Field(
        default=EDIT_STEPS,
        description="Number of inference steps; supported range [1, 50]. 20 when unset.",
        examples=[20],
    )
    image: Pictures = Field(description="The picture to edit: PNG, JPEG or WebP. Some models take several.")
    mask: Picture | MISSING | None = Field(
        default=MISSING,
        description="White is repainted; everything else keeps its pixels. It has the picture's shape.",
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
