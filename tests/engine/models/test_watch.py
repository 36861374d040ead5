from __future__ import annotations

import threading

from mezzotint.engine.models.watch import MOST, LoadWatch
from mezzotint.messages import LOADING


def test_the_share_of_the_weights_that_is_in_memory_is_told() -> None:
    told: list[float | None] = []
    whole = threading.Event()

    def progress(stage: str, fraction: float | None) -> None:
        assert stage == LOADING
        told.append(fraction)
        if fraction == MOST:
            whole.set()

    with LoadWatch(progress) as watch:
        watch.expected_bytes = 64 * 2**20
        weights = bytearray(b"x" * (96 * 2**20))
        assert whole.wait(30)
    assert len(weights) > watch.expected_bytes
    assert told[0] is None
    assert told[1:] == sorted(told[1:], key=lambda fraction: fraction or 0)


def test_nothing_is_told_of_weights_of_unknown_size() -> None:
    told: list[float | None] = []
    with LoadWatch(lambda _, fraction: told.append(fraction)):
        pass
    assert told == [None]
