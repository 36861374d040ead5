"""Foreign dialects meet half way: their programs have fixed menus, and an endpoint may not.

With `foreign_values = "nearest"` a size or a number of steps that the endpoint cannot do becomes the nearest
one that it can, and a negative prompt that its model cannot use is left out. Each is said in a warning. The
dedicated route bends nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from mezzotint.server.work.profiles import Profile
from mezzotint.spec import LIMITS


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
            f"num_inference_steps is {bent['num_inference_steps']}: {steps} is not between {low} and {high}"
        )
    asked = fields.get("width"), fields.get("height")
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


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
