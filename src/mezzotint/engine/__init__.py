"""The engine as a library: many requests through one pipeline, one denoising step at a time.

    from mezzotint.engine import Engine, Request

    engine = Engine.load("emoji")
    results = engine.generate([Request(prompt="a happy cat", num_inference_steps=8, seed=1)])

The names are loaded on first use, so that importing a torch-free module of this package loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezzotint.engine.arguments import Request as Request
    from mezzotint.engine.engine import Engine as Engine
    from mezzotint.engine.engine import Event as Event
    from mezzotint.engine.results import Result as Result

_HOMES = {"Engine": "engine", "Event": "engine", "Request": "arguments", "Result": "results"}

__all__ = ["Engine", "Event", "Request", "Result"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
