"""Objects among a module's arguments: one that holds no tensor is a constant, equal to others with the same.

So an empty cache of keys and values does not keep calls apart, although each run has its own.
"""

from __future__ import annotations

from typing import Any

import torch

MAX_DEPTH = 6
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


def contents(value: Any, depth: int = 0) -> str | None:
    """What an object holds, as text; None for what is no such object, or holds a tensor or unknown things."""
    if depth == 0 and (callable(value) or not hasattr(value, "__dict__") or not _by_identity(value)):
        return None
    if isinstance(value, _PLAIN):
        return repr(value)
    if depth == MAX_DEPTH or isinstance(value, torch.Tensor):
        return None
    if isinstance(value, dict):
        parts = {repr(key): contents(entry, depth + 1) for key, entry in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {str(index): contents(entry, depth + 1) for index, entry in enumerate(value)}
    elif hasattr(value, "__dict__") and not callable(value):
        parts = {name: contents(entry, depth + 1) for name, entry in sorted(vars(value).items())}
    else:
        return None
    if None in parts.values():
        return None
    return f"{type(value).__qualname__}({', '.join(f'{name}={part}' for name, part in parts.items())})"


def _by_identity(value: Any) -> bool:
    """Whether two of the value's class are never equal, or cannot be asked."""
    hashed: Any = type(value).__hash__
    return hashed is None or hashed is object.__hash__
