"""Text of different length in one forward: padded to a common length where a mask makes that exact.

Every call is padded, alone or not, to the next multiple of BUCKET tokens. So a request's bytes depend on its
own text alone. inference.py finds which arguments have the text's length, and proves that what the padding
holds never reaches the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUCKET = 64
"""Tokens."""

Fill = Callable[[Tensor], Tensor]
"""Gives the padding of a tensor, from zeros of its shape."""


@dataclass(frozen=True, slots=True)
class Text:
    """Which arguments of a module have the length of the text."""

    dimensions: Mapping[str, int]
    """By (dotted) name, the dimension that is as long as the text."""
    mask: str | None = None
    """The argument that is true, or 1, at each token; made where a call leaves it None."""


def zeros(padding: Tensor) -> Tensor:
    return padding


def padded(
    arguments: Mapping[str, Any], text: Text, rows: Mapping[str, int], fill: Fill = zeros
) -> dict[str, Any]:
    """`arguments` with every text argument at a multiple of BUCKET tokens; the mask says what is text.

    `rows` has the dimension of the rows where that is not 0.
    """
    made = dict(arguments)
    num_rows, length = 0, 0
    for name, dimension in text.dimensions.items():
        if name == text.mask:
            continue
        value = _at(made, name)
        if isinstance(value, Tensor):
            num_rows, length = value.shape[rows.get(name, 0)], value.shape[dimension]
            device = value.device
            _put(made, name, _longer(value, dimension, fill))
    if text.mask is not None and length:
        mask = _at(made, text.mask)
        if not isinstance(mask, Tensor):
            mask = torch.ones(num_rows, length, dtype=torch.bool, device=device)
        _put(made, text.mask, _longer(mask, text.dimensions.get(text.mask, 1), zeros))
    return made


def _longer(value: Tensor, dimension: int, fill: Fill) -> Tensor:
    missing = -value.shape[dimension] % BUCKET
    if not missing:
        return value
    shape = (*value.shape[:dimension], missing, *value.shape[dimension + 1 :])
    return torch.cat([value, fill(value.new_zeros(shape))], dimension)


def _at(arguments: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name."""
    value: Any = arguments
    for part in name.split("."):
        if isinstance(value, Mapping):
            value = next((entry for key, entry in value.items() if str(key) == part), None)
        elif isinstance(value, (list, tuple)) and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _put(arguments: dict[str, Any], name: str, value: Any) -> None:
    """Sets a dotted name, in copies of what holds it."""
    head, _, rest = name.partition(".")
    if not rest:
        key: Any = next((key for key in arguments if str(key) == head), head)
        arguments[key] = value
        return
    key = next(key for key in arguments if str(key) == head)
    inner = arguments[key]
    if isinstance(inner, (list, tuple)):
        numbered = {str(index): entry for index, entry in enumerate(inner)}
        _put(numbered, rest, value)
        arguments[key] = type(inner)(numbered.values())
    else:
        arguments[key] = dict(inner)
        _put(arguments[key], rest, value)
