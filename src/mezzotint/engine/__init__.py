"""The engine as a library: many requests through one pipeline, one denoising step at a time.

    from mezzotint.engine import Engine, Request

    engine = Engine.load("emoji")
    results = engine.generate([Request(prompt="a happy cat", num_inference_steps=8, seed=1)])

The names are loaded on first use, so that importing a torch-free module of this package loads no torch.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezzotint.engine.engine import Engine as Engine
    from mezzotint.engine.engine import Event as Event
    from mezzotint.engine.results import Result as Result
    from mezzotint.spec import AdapterUse as AdapterUse
    from mezzotint.spec import EngineSettings as EngineSettings
    from mezzotint.spec import ImageSpec as Request

_HOMES = {
    "Engine": ("mezzotint.engine.engine", "Engine"),
    "EngineSettings": ("mezzotint.spec", "EngineSettings"),
    "Event": ("mezzotint.engine.engine", "Event"),
    "AdapterUse": ("mezzotint.spec", "AdapterUse"),
    "Request": ("mezzotint.spec", "ImageSpec"),
    "Result": ("mezzotint.engine.results", "Result"),
}

if importlib.util.find_spec("torchvision") is not None:  # before anything imports transformers
    from mezzotint.engine.models.vision import prepare

    prepare()

__all__ = ["AdapterUse", "Engine", "EngineSettings", "Event", "Request", "Result"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
