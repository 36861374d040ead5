"""What all tests of the engine share: one torch thread, and silence on what diffusers warns of by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from mezzotint.engine import Engine, Request
from mezzotint.engine.results import Image

_DIFFUSERS_OWN = (
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:`FluxPosEmbed` is deprecated:FutureWarning",
)
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.no_cover)  # coverage is of the part without torch, and slows the rest
            for pattern in _DIFFUSERS_OWN:
                item.add_marker(pytest.mark.filterwarnings(pattern))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The thread count is part of what the bytes depend on."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_alone_and_together(engine: Engine, requests: Sequence[Request]) -> list[Image]:
    """The pictures of the requests one by one; all at once they must have the same bytes."""
    alone = [engine.generate([request])[0].image for request in requests]
    together = [result.image for result in engine.generate(requests)]
    pictures = []
    for one, other in zip(alone, together, strict=True):
        assert one is not None
        assert other is not None
        assert (one.shape, one.tobytes()) == (other.shape, other.tobytes())
        pictures.append(one)
    return pictures
