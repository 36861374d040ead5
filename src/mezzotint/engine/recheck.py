"""When an idle worker measures its speed again: a quiet moment may contradict what a busy one has shown."""

from __future__ import annotations

import time
from collections.abc import Callable

from mezzotint.engine.calibration import SLOW_FORWARD_S, SURE, Interrupted, uncertainty
from mezzotint.engine.engine import Engine
from mezzotint.messages import ModelInfo
from mezzotint.spec import EngineSettings

FIRST_S = 10.0
"""Seconds without a job after which it measures; each time doubles them, up to MAX_S."""
MAX_S = 3600.0
CONTRADICTION = 1.5
"""Steps that take so many times less, or more, than was measured contradict it."""


class Recheck:
    """Measures again while there is reason to doubt; R stays as it is, for bytes are promised."""

    def __init__(
        self,
        engine: Engine,
        settings: EngineSettings,
        interrupted: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`interrupted` says whether a message waits for the worker; measuring then ends."""
        self._engine = engine
        self._settings = settings
        self._interrupted = interrupted
        self._clock = clock
        self._pause_s = FIRST_S
        self._idle_since = clock()

    def worked(self) -> None:
        """The worker has just done something else."""
        self._idle_since = self._clock()

    def due_s(self) -> float | None:
        """Seconds until it should measure; None while there is no reason to."""
        if not self._doubtful():
            return None
        return max(0.0, self._idle_since + self._pause_s - self._clock())

    def measure(self) -> ModelInfo | None:
        """What has been found, if it is new; None also where it was interrupted."""
        engine, settings = self._engine, self._settings
        known = engine.best_rows
        try:
            found = engine.measure_again(
                self._interrupted,
                min_gain=settings.min_batch_gain,
                max_stretch=settings.max_batch_stretch,
            )
        except Interrupted:
            self.worked()
            return None
        self._pause_s = min(2 * self._pause_s, MAX_S)
        self.worked()
        before, now = engine.measured[0].forward_s, found[0].forward_s
        surer = uncertainty(found) < uncertainty(engine.measured)
        if surer or _differ(before, now) or known != engine.best_rows:
            engine.measured = found
            engine.times.restart(engine.profile.width, engine.profile.height, now)
            return engine.info()
        return None

    def _doubtful(self) -> bool:
        engine = self._engine
        if not engine.measured or min(self._latest(), engine.measured[0].forward_s) > SLOW_FORWARD_S:
            return False  # a request would wait for the forward that is being measured
        if engine.runner.mode == "exact" and engine.merges and engine.best_rows is None:
            return True  # a start that took R over has not seen what the others would give
        return uncertainty(engine.measured) > SURE or _differ(self._latest(), engine.measured[0].forward_s)

    def _latest(self) -> float:
        """Seconds of a step as the latest ones took."""
        return self._engine.times.estimate(self._engine.profile.width, self._engine.profile.height)


def _differ(one: float, other: float) -> bool:
    return max(one, other) > CONTRADICTION * min(one, other)
