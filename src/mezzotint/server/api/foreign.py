"""Foreign dialects meet half way: their programs have fixed menus, and an endpoint may not.

With `foreign_values = "nearest"` a size or a number of steps that the endpoint cannot do becomes the nearest
one that it can, and a negative prompt that its model cannot use is left out. Each is said in a warning. The
dedicated route bends nothing.

Fields that have no meaning here are read all the same: a value that their own API knows passes, any other is
refused, as it would be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from mezzotint.errors import InvalidRequestError
from mezzotint.schemas import shown
from mezzotint.server.work.profiles import Profile
from mezzotint.spec import LIMITS

UNUSED: Mapping[str, tuple[str | bool, ...] | None] = {
    "user": None,
    "safety_identifier": None,
    "quality": ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"),
    "style": ("vivid", "natural"),
    "background": ("auto", "opaque", "transparent"),
    "moderation": ("auto", "low"),
    "complexity": ("low", "medium", "high"),
    "input_fidelity": ("low", "high"),
    "disable_safety_checker": (False, True),
}
"""Fields of OpenAI's and Together's APIs without a meaning here, with their values; None is any text."""


def unused_schema() -> dict[str, dict[str, Any]]:
    """JSON Schemas of the fields without a meaning."""
    said = {"description": "Accepted and not used."}
    return {name: said | ({"enum": list(v)} if v else {"type": "string"}) for name, v in UNUSED.items()}


def check_unused(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each field that a user would miss; InvalidRequestError for a value that it never has."""
    for name, choices in UNUSED.items():
        value = values.get(name)
        if value is None:
            continue
        if choices is None and not isinstance(value, str):
            text = f"{name} must be a string (got {shown(value)})"
            raise InvalidRequestError(text, code="invalid_type", param=name)
        if choices is not None and not any(type(value) is type(one) and value == one for one in choices):
            listed = ", ".join(str(one).lower() for one in choices)
            text = f"{name} must be one of {listed} (got {shown(value)})"
            raise InvalidRequestError(text, code="invalid_value", param=name)
    if values.get("background") == "transparent":
        return ["background had no effect: this server's pictures are opaque"]
    return []


def meet_half_way(fields: Mapping[str, Any], profile: Profile) -> tuple[dict[str, Any], list[str]]:
    """The fields of a body as this endpoint can take them, and a sentence for each change.

    Values of a wrong type stay, so that the body is refused for them as always.
    """
    bent, warnings = dict(fields), list[str]()
    steps = fields.get("num_inference_steps")
    low, high = LIMITS["num_inference_steps"]
    if _is_integer(steps) and not low <= steps <= high:
        bent["num_inference_steps"] = min(max(steps, low), high)
        warnings.append(
            f"num_inference_steps is {bent['num_inference_steps']}: {shown(steps)} is not between {low} "
            f"and {high}"
        )
    asked = [_at_most(fields.get(name), LIMITS[name][1]) for name in ("width", "height")]
    if all(value is None or (_is_integer(value) and value > 0) for value in asked) and any(asked):
        size = profile.size(*asked)
        nearest = profile.nearest_size(*size) if size else None
        if size and nearest and nearest != size:
            bent["width"], bent["height"] = nearest
            warnings.append(
                f"the picture is {nearest[0]}x{nearest[1]}: this endpoint cannot draw {size[0]}x{size[1]}"
            )
    if fields.get("negative_prompt") and profile.info and not profile.info.supports_negative_prompt:
        bent["negative_prompt"] = None
        warnings.append("negative_prompt had no effect: this model does not use it")
    return bent, warnings


def _at_most(value: Any, most: int) -> Any:
    return min(value, most) if _is_integer(value) else value


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
