"""Run: the forwards of picked calls, merged as the batching mode allows, with one failing row failing alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from mezzotint.engine.batching import Call, join, merge, plan, split

Mode = Literal["exact", "fast", "off"]

_log = logging.getLogger(__name__)


class Runner:
    """Runs calls in one batching mode.

    `exact`: every merged forward has exactly `num_rows` rows, padded with copies; a call of more rows goes through in
    chunks; with `num_rows` 1 every call runs as the pipeline asked for it. `fast`: what is there, up to `num_rows`.
    `off`: never merged.
    """

    def __init__(self, mode: Mode, num_rows: int) -> None:
        self.mode = mode
        self.num_rows = 1 if mode == "off" else num_rows
        self.num_forwards = 0
        self.num_real_rows = 0
        self.num_padded_rows = 0

    def run(self, calls: Sequence[Call]) -> list[Any]:
        """For each call its result, or the exception that it alone caused. All calls have one key, or there is one."""
        try:
            return self._forward(calls)
        except Exception as error:
            free_memory(error)
            if len(calls) == 1:
                return [error]
            _log.warning(
                "a merged forward of %d calls failed; running them one by one", len(calls), exc_info=True
            )
        return [self.run([call])[0] for call in calls]

    def _forward(self, calls: Sequence[Call]) -> list[Any]:
        exact = self.mode == "exact" and self.num_rows > 1 and calls[0].key is not None
        if not exact and len(calls) == 1:
            self._count(calls[0].rows, calls[0].rows)
            return [calls[0].alone()]
        pieces: list[list[Any]] = [[] for _ in calls]
        for parts in plan(calls, self.num_rows):
            sizes = [part.stop - part.start for part in parts]
            rows = self.num_rows if exact else sum(sizes)
            self._count(sum(sizes), rows)
            result = parts[0].call.run(**merge(parts, rows))
            for part, piece in zip(parts, split(result, sizes), strict=True):
                pieces[calls.index(part.call)].append(piece)
        return [join(piece) for piece in pieces]

    def _count(self, real: int, rows: int) -> None:
        self.num_forwards += 1
        self.num_real_rows += real
        self.num_padded_rows += rows - real


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device ran out of memory."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def free_memory(error: BaseException) -> None:
    """After an out-of-memory error: gives cached device memory back, so that what comes next has a chance."""
    if is_out_of_memory(error) and torch.cuda.is_available():
        torch.cuda.empty_cache()
