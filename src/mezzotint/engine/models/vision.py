"""torchvision beside a torch that cannot load its compiled part.

Some processors of transformers need torchvision's transforms, which are plain Python. Its wheel is built for
torch with a GPU: beside another torch its import fails, because two of its operators are then unknown.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch

_OPERATORS = ("nms", "qnms")
"""What torchvision describes to torch at its import whether it is there or not."""


@functools.cache
def prepare() -> None:
    """Makes `import torchvision` work where torchvision is installed; call it before transformers does so."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    operators: Any = torch.ops
    try:
        operators.load_library(str(Path(found.origin).with_name("_C.so")))
    except OSError:
        for name in _OPERATORS:
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
