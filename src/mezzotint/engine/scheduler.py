"""Pick: which parked calls run next. Plain Python over small objects; never imports torch.

Least remaining work first: a job with 4 steps left overtakes one with 40, and since the remaining work of a
running job only shrinks, it is carried on rather than rotated. Ageing: a job that has waited longer than
its bound for its next step goes first once. Then the batch is filled with calls that may run in the same
forward.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """One parked call, as the scheduler sees it."""

    job_id: str
    key: Hashable | None
    """Calls with equal keys may share a forward; None never shares."""
    rows: int
    remaining_s: float
    """Estimated seconds of work that the job has left, this call included."""
    waited_s: float
    """Seconds since the job's last call ended."""
    priority: int = 0
    """A job of higher priority goes before all of lower priority (but not before overdue ones)."""
    arrival: int = 0
    """Running number of the job; settles ties, so that nothing depends on chance."""


def pick(waiting: Sequence[Waiting], *, max_rows: int, max_wait_s: float) -> list[Waiting]:
    """The calls of the next forward, the most urgent first; empty only when nothing waits.

    The most urgent call leads. Calls with its key join, most urgent first, while the rows fit in
    `max_rows`. A leader with more than `max_rows` rows, or without a key, goes alone.
    """
    if not waiting:
        return []
    order = sorted(waiting, key=lambda call: _urgency(call, max_wait_s))
    leader = order[0]
    batch, rows = [leader], leader.rows
    if leader.key is None:
        return batch
    for call in order[1:]:
        if rows >= max_rows:
            break
        if call.key == leader.key and rows + call.rows <= max_rows:
            batch.append(call)
            rows += call.rows
    return batch


def _urgency(call: Waiting, max_wait_s: float) -> tuple[float, ...]:
    if call.waited_s > max_wait_s:
        return (0, -call.waited_s, call.arrival)
    return (1, -call.priority, call.remaining_s, call.arrival)


class StepTimes:
    """Measured seconds of one denoiser forward by shape, as a running average that follows slow changes."""

    def __init__(self, weight: float = 0.2) -> None:
        self._weight = weight
        self._seconds: dict[tuple[int, int], float] = {}

    def add(self, width: int, height: int, seconds: float) -> None:
        """Records one measured forward for pictures of this size."""
        known = self._seconds.get((width, height))
        change = 0.0 if known is None else self._weight * (seconds - known)
        self._seconds[width, height] = seconds if known is None else known + change

    def estimate(self, width: int, height: int) -> float:
        """Seconds of one forward; an unmeasured size is scaled by pixels from the nearest measured one."""
        known = self._seconds.get((width, height))
        if known is not None:
            return known
        pixels = width * height
        if not self._seconds:
            return pixels / _PIXELS_PER_S
        near = min(self._seconds, key=lambda size: abs(size[0] * size[1] - pixels))
        return self._seconds[near] * pixels / (near[0] * near[1])

    def table(self) -> Mapping[str, float]:
        """The averages by "WIDTHxHEIGHT"."""
        return {f"{width}x{height}": seconds for (width, height), seconds in self._seconds.items()}


_PIXELS_PER_S = 1e6
"""Only the ratios between jobs matter before anything has been measured."""
