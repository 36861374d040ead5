"""How far the reading of a model's weights has come, by how much this process has grown."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

from mezzotint.engine.models.sources import OnProgress
from mezzotint.messages import LOADING

EVERY_S = 0.5
MOST = 0.99
"""The fraction that is told at most: only the end is the end."""


class LoadWatch:
    """Tells `progress` the fraction of `expected_bytes` that are in memory, while the block runs.

    diffusers tells nobody how far it has come. Weights that a file keeps until they are first used count only
    then, so the fraction may be too small; it never falls.
    """

    def __init__(self, progress: OnProgress) -> None:
        self.expected_bytes: int | None = None
        """Set by whoever knows what the weights will take; nothing is told before."""
        self._progress = progress
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="load-watch", daemon=True)

    def __enter__(self) -> Self:
        self._progress(LOADING, None)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        told = 0.0
        while not self._ended.wait(EVERY_S):
            if self.expected_bytes:
                grown = self._process.memory_info().rss - self._before
                told = max(told, min(MOST, grown / self.expected_bytes))
                self._progress(LOADING, told)
