"""Whether a worker that has exited gets a successor, and when: counting, without processes or clocks.

A worker that was of use and then dies is no sign of a crash loop, whatever killed it. A replica is given up
where another start would fail again: at once when the worker says so, and after `max_restarts` workers in a
row that died before they were of any use. A process that could not be started at all says nothing about the
worker: the machine lacks something for the moment, and the start is tried again for as long as that lasts.
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass

from mezzotint.messages import EXIT_PERMANENT, EXIT_UNPLACED

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
STEADY_S = 10.0
"""A worker that nobody asked for a picture has been of use when it was ready for this long."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How one worker ended."""

    code: int | None = None
    started: bool = True
    """False when there never was a process."""
    ready_s: float | None = None
    """Seconds for which it was ready; None when it never was."""
    asked: bool = False
    """Whether it was asked for a picture."""
    delivered: bool = False
    """Whether it made one."""
    failure: str = ""
    """What is known beyond the exit code: what the worker said, or why it was killed."""
    permanent: bool = False
    """The worker said that another start would fail again."""

    @property
    def reason(self) -> str:
        return self.failure or f"the worker process ended ({_cause(self.code)})"

    @property
    def useful(self) -> bool:
        return self.delivered or (not self.asked and self.ready_s is not None and self.ready_s >= STEADY_S)


@dataclass(frozen=True, slots=True)
class Restart:
    """Start another worker after this pause."""

    pause_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Start no other worker until somebody asks for it."""

    reason: str


@dataclass(slots=True)
class RestartPolicy:
    """The account of one replica's workers. `on_exit` fills the counters; nobody else reads them."""

    max_restarts: int
    num_useless: int = 0
    """Workers in a row that died before they were of any use."""
    num_not_started: int = 0
    """Starts in a row that gave no process."""

    def on_exit(self, exit: Exit, forgiven: int = 0) -> Restart | GiveUp:
        """The verdict on a worker's exit.

        `forgiven` workers, this one among them, died of a job that has been given up: they are not counted.
        """
        if not exit.started or exit.code == EXIT_UNPLACED:
            self.num_not_started += 1
            return Restart(_pause_s(self.num_not_started), exit.reason)
        self.num_not_started = 0
        if exit.ready_s is None and (exit.permanent or exit.code == EXIT_PERMANENT):
            return GiveUp(exit.failure or "the worker said that another start would fail again")
        if exit.useful:
            self.num_useless = 0
        elif forgiven:
            self.num_useless = max(0, self.num_useless - (forgiven - 1))
        else:
            self.num_useless += 1
        if self.num_useless > self.max_restarts:
            return GiveUp(
                f"{self.num_useless} workers in a row died before they had made a picture, "
                f"the last because: {exit.reason}"
            )
        return Restart(_pause_s(self.num_useless - 1), exit.reason)


def _pause_s(num_failures: int) -> float:
    """Nothing before the first new try, then twice as long each time."""
    if num_failures < 1:
        return 0.0
    return float(min(FIRST_PAUSE_S * 2 ** min(num_failures - 1, 32), LONGEST_PAUSE_S))


def _cause(code: int | None) -> str:
    if code is None:
        return "exit status unknown"
    if code >= 0:
        return f"exit status {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
