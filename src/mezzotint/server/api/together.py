"""Together's own fields on OpenAI's route: pictures to begin from, and a LoRA, which is an adapter here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mezzotint.errors import InvalidRequestError
from mezzotint.schemas import shown
from mezzotint.server.work.resolve import Target
from mezzotint.spec import AdapterUse

PICTURES = ("image_url", "reference_images")
LORAS = "image_loras"
FIELDS = (*PICTURES, LORAS)
MAX_SCALE = 10.0


def schema() -> dict[str, dict[str, Any]]:
    """JSON Schemas of these fields."""
    text = {"type": "string", "description": "A picture to begin from, as a data URL or base64."}
    lora = {
        "type": "object",
        "required": ["path"],
        "properties": {
            "path": {"type": "string", "description": "The route of an adapter."},
            "scale": {"type": "number", "minimum": -MAX_SCALE, "maximum": MAX_SCALE},
        },
    }
    return {
        "image_url": text,
        "reference_images": {"type": "array", "items": text},
        LORAS: {"type": "array", "items": lora, "maxItems": 1},
    }


def pictures_of(values: Mapping[str, Any]) -> list[str]:
    """The texts of the pictures in a body; InvalidRequestError if they are none."""
    found: list[str] = []
    for name in PICTURES:
        value = values.get(name)
        entries = [value] if name == "image_url" and value is not None else value or []
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            text = f"{name} must be {_FORM[name]} (got {shown(value)})"
            raise InvalidRequestError(text, code="invalid_type", param=name)
        found += entries
    return found


_FORM = {"image_url": "a data URL or base64", "reference_images": "a list of data URLs or base64 texts"}


def adapter_of(values: Mapping[str, Any], target: Target) -> tuple[Target, AdapterUse | None]:
    """The target with the adapter that `image_loras` names, and its use; InvalidRequestError if bad."""
    loras = values.get(LORAS) or []
    fits = isinstance(loras, list) and all(
        isinstance(lora, dict) and isinstance(lora.get("path"), str) for lora in loras
    )
    if not fits:
        text = f"{LORAS} must be a list of objects with path, the route of an adapter (got {shown(loras)})"
        raise InvalidRequestError(text, code="invalid_type", param=LORAS)
    if not loras:
        return target, None
    if len(loras) > 1:
        text = f"{LORAS} names {len(loras)} LoRAs; send one of them, or several as adapters"
        raise InvalidRequestError(text, code="not_supported", param=LORAS)
    scale = loras[0].get("scale")
    if scale is not None and (not isinstance(scale, int | float) or isinstance(scale, bool)):
        text = f"{LORAS}: scale must be a number (got {shown(scale)})"
        raise InvalidRequestError(text, code="invalid_type", param=LORAS)
    if scale is not None and not -MAX_SCALE <= scale <= MAX_SCALE:
        text = f"{LORAS}: scale must be between {-MAX_SCALE:g} and {MAX_SCALE:g} (got {shown(scale)})"
        raise InvalidRequestError(text, code="out_of_range", param=LORAS)
    route = loras[0]["path"]
    return target.with_adapter(route), AdapterUse(route, None if scale is None else float(scale))
