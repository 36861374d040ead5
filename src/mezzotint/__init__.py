"""Mezzotint: image-generation models as dedicated endpoints on your own hardware.

The SDK's names are loaded when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pydantic import MISSING as MISSING

    from mezzotint.client import AsyncClient as AsyncClient
    from mezzotint.client import AsyncHandle as AsyncHandle
    from mezzotint.client import Client as Client
    from mezzotint.client import Completed as Completed
    from mezzotint.client import GeneratedImage as GeneratedImage
    from mezzotint.client import Generation as Generation
    from mezzotint.client import Handle as Handle
    from mezzotint.client import ImageFields as ImageFields
    from mezzotint.client import Preview as Preview
    from mezzotint.client import Progress as Progress
    from mezzotint.errors import MezzotintError as MezzotintError
    from mezzotint.schemas import DedicatedImageGenerationBody as DedicatedImageGenerationBody
    from mezzotint.schemas import (
        DedicatedImageGenerationBodyResponseFormat as DedicatedImageGenerationBodyResponseFormat,
    )

_HOMES = {
    "MISSING": "pydantic",
    "AsyncClient": "mezzotint.client",
    "AsyncHandle": "mezzotint.client",
    "Client": "mezzotint.client",
    "Completed": "mezzotint.client",
    "GeneratedImage": "mezzotint.client",
    "Generation": "mezzotint.client",
    "Handle": "mezzotint.client",
    "ImageFields": "mezzotint.client",
    "Preview": "mezzotint.client",
    "Progress": "mezzotint.client",
    "MezzotintError": "mezzotint.errors",
    "DedicatedImageGenerationBody": "mezzotint.schemas",
    "DedicatedImageGenerationBodyResponseFormat": "mezzotint.schemas",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
