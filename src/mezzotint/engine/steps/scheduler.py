"""Pick: which parked calls run next. Plain Python over small objects; never imports torch.

Least remaining work first: a job with 4 steps left overtakes one with 40, and since the remaining work of a
running job only shrinks, it is carried on rather than rotated. Between owners it is in turn: everyone's
most urgent job comes before anyone's second, so that nobody's many jobs hold up another's one, and an owner
who is far ahead in seconds of forwards lets the others pass. Ageing: a job that has waited longer than its
bound for its next step goes first once. Then the batch is filled with calls that may run in the same forward.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low


@dataclass(frozen=True, slots=True)
class Candidate:
    """One parked call, as the scheduler sees it."""

    job_id: str
    key: Hashable | None
    """Calls with equal keys may share a forward; None never shares."""
    rows: int
    remaining_s: float
    """Estimated seconds of work that the job has left, this call included."""
    waited_s: float
    """Seconds since the job's last call ended."""
    owner: str = ""
    """Whose job it is: any name, the same for all jobs of one payer."""
    owner_lead_s: float = 0.0
    """Seconds of forwards that its owner has had beyond the least served one (see FairShares)."""
    priority: int = 0
    """A job of higher priority goes before all of lower priority (but not before overdue ones).

    The engine raises a job that was overdue to the highest priority there is, for the rest of its run.
    """
    arrival: int = 0
    """Running number of the job; settles ties, so that nothing depends on chance."""


def pick(candidates: Sequence[Candidate], *, max_rows: int, max_wait_s: float) -> list[Candidate]:
    """The calls of the next forward, the most urgent first; empty only when there are none.

    The most urgent call leads. Calls with its key join, most urgent first, while the rows fit in
    `max_rows`. A leader with more than `max_rows` rows, or without a key, goes alone.
    """
    if not candidates:
        return []
    order = _by_urgency(candidates, max_wait_s)
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


def _by_urgency(candidates: Sequence[Candidate], max_wait_s: float) -> list[Candidate]:
    """The overdue, who waited longest first; then by priority, owners in turn, least work left first."""
    overdue = [call for call in candidates if call.waited_s > max_wait_s]
    in_time = [call for call in candidates if call.waited_s <= max_wait_s]
    overdue.sort(key=lambda call: (-call.waited_s, call.arrival))
    in_time.sort(key=lambda call: (-call.priority, call.remaining_s, call.arrival))
    seen: Counter[tuple[int, str]] = Counter()
    ranked: list[tuple[int, bool, int, int]] = []
    for place, call in enumerate(in_time):  # by work within a turn
        turn = seen[call.priority, call.owner]
        seen[call.priority, call.owner] += 1
        ranked.append((-call.priority, call.owner_lead_s > max_wait_s, turn, place))
    ranked.sort()
    return overdue + [in_time[place] for *_, place in ranked]


class FairShares:
    """Seconds of forwards that each owner has had while others had jobs too.

    An owner that comes or comes back starts level with the least served owner present, or keeps what it had
    if that is more: neither absence nor small pieces earn credit (start-time fair queueing, Goyal 1996).
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        """By owner; filled by `add`, levelled by `leads`."""
        self._present: frozenset[str] = frozenset()
        """Owners with jobs at the latest call of `leads`."""

    def leads(self, owners: frozenset[str]) -> Mapping[str, float]:
        """For each owner that has jobs now, how many seconds it is ahead of the least served of them."""
        least = min((self._served[owner] for owner in owners & self._present), default=0.0)
        for owner in owners - self._present:
            self._served[owner] = max(self._served.get(owner, 0.0), least)
        self._present = owners
        least = min((self._served[owner] for owner in owners), default=0.0)
        return {owner: self._served[owner] - least for owner in owners}

    def add(self, owners: Sequence[str], seconds: float) -> None:
        """Books a forward; `owners` are those of its calls."""
        for owner in owners:
            self._served[owner] += seconds / len(owners)

    def forget(self) -> None:
        """For when no owner has jobs any more: none is owed anything."""
        self._served.clear()
        self._present = frozenset()


MAX_SIZES = 64
"""Sizes of pictures whose times are remembered: those measured last."""
NUM_LATEST = 9
"""Forwards of a size that its estimate follows."""


class StepTimes:
    """Seconds of one denoiser forward of one job, by size: the median of the latest ones measured.

    So a few slow forwards change nothing, and a change that lasts shows after half of NUM_LATEST.
    """

    def __init__(self) -> None:
        self._latest: dict[tuple[int, int], deque[float]] = {}
        """By (width, height), the size measured last at the end."""

    def add(self, width: int, height: int, seconds: float) -> None:
        """Records one measured forward for pictures of this size."""
        latest = self._latest.pop((width, height), deque(maxlen=NUM_LATEST))
        latest.append(seconds)
        self._latest[width, height] = latest
        if len(self._latest) > MAX_SIZES:
            del self._latest[next(iter(self._latest))]

    def restart(self, width: int, height: int, seconds: float) -> None:
        """Begins anew with a measurement that replaces all earlier ones of this size."""
        self._latest.pop((width, height), None)
        self.add(width, height, seconds)

    def estimate(self, width: int, height: int) -> float:
        """Seconds of one forward; an unmeasured size is scaled by pixels from the nearest measured one."""
        known = self._latest.get((width, height))
        if known is not None:
            return median_low(known)
        pixels = width * height
        if not self._latest:
            return pixels / _PIXELS_PER_S
        near = min(self._latest, key=lambda size: abs(size[0] * size[1] - pixels))
        return median_low(self._latest[near]) * pixels / (near[0] * near[1])

    def table(self) -> Mapping[str, float]:
        """The estimates by "WIDTHxHEIGHT"."""
        return {f"{width}x{height}": median_low(known) for (width, height), known in self._latest.items()}


_PIXELS_PER_S = 1e6
"""Only the ratios between jobs matter before anything has been measured."""
