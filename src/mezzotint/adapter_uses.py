"""The field `adapters` of a request: which adapters an image uses together, and how strongly."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import MISSING, PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from mezzotint.errors import echo
from mezzotint.spec import ID_PATTERN, LIMITS, MAX_ADAPTERS, AdapterUse


def uses_of(route: str | None, listed: tuple[AdapterUse, ...] | MISSING | None) -> tuple[AdapterUse, ...]:
    """The adapters of a request: what `model` names, with its scale from the list, then the others."""
    uses = listed if isinstance(listed, tuple) else ()
    first = [use for use in uses if use.route == route] or [AdapterUse(route)] if route else []
    return (*first, *(use for use in uses if use.route != route))


def _adapter_uses(value: Any) -> tuple[AdapterUse, ...]:
    """The adapters in a list of `{route, scale}`; a scale that is absent or null is the adapter's own."""
    if not isinstance(value, list):
        raise PydanticCustomError("invalid_type", "must be a list of objects with route and scale")
    if len(value) > MAX_ADAPTERS:
        limit = {"most": MAX_ADAPTERS, "got": len(value)}
        raise PydanticCustomError("out_of_range", "must name at most {most} adapters (got {got})", limit)
    uses = tuple(_adapter_use(entry) for entry in value)
    routes = [use.route for use in uses]
    twice = next((route for route in routes if routes.count(route) > 1), None)
    if twice is not None:
        text = "must name each adapter once (got {route} twice)"
        raise PydanticCustomError("invalid_value", text, {"route": twice})
    return uses


def _adapter_use(entry: Any) -> AdapterUse:
    if not isinstance(entry, dict) or not {"route"} <= set(entry) <= {"route", "scale"}:
        raise PydanticCustomError("invalid_type", "must be a list of objects with route and scale")
    route, scale = entry["route"], entry.get("scale")
    if not isinstance(route, str) or not re.fullmatch(ID_PATTERN, route):
        text = "must have routes of letters, digits, '.', '_' or '-' (got {got})"
        raise PydanticCustomError("invalid_value", text, {"got": _shown(route)})
    if scale is None:
        return AdapterUse(route)
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        text = "must have scales that are numbers (got {got})"
        raise PydanticCustomError("invalid_type", text, {"got": _shown(scale)})
    low, high = LIMITS["adapter scale"]
    if not low <= scale <= high:
        limits = {"low": low, "high": high, "got": _shown(scale)}
        text = "must have scales between {low} and {high} (got {got})"
        raise PydanticCustomError("out_of_range", text, limits)
    return AdapterUse(route, float(scale))


_ADAPTERS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "maxItems": MAX_ADAPTERS,
    "items": {
        "type": "object",
        "properties": {
            "route": {"type": "string", "pattern": f"^{ID_PATTERN}$"},
            "scale": {
                "anyOf": [
                    {
                        "type": "number",
                        "minimum": LIMITS["adapter scale"][0],
                        "maximum": LIMITS["adapter scale"][1],
                    },
                    {"type": "null"},
                ]
            },
        },
        "required": ["route"],
        "additionalProperties": False,
    },
}


def _shown(value: Any) -> str:
    plain = isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() < 1000)
    return echo(value) if plain else type(value).__name__


AdaptersField = Annotated[
    tuple[AdapterUse, ...],
    PlainValidator(_adapter_uses),
    PlainSerializer(lambda uses: [{"route": use.route, "scale": use.scale} for use in uses]),
    WithJsonSchema(_ADAPTERS_SCHEMA),
]
"""The type of the field."""
