"""How many workers an endpoint should have, by the work that waits. Pure: no clock, no event loop.

Up is by backlog: as many workers as each can finish its part of the outstanding work within the target, and
never more than there are jobs. Down is by backlog and by the work that came: workers that are busy all the
time have a small backlog, too. Either must hold for its whole delay, and the gap between the two keeps the
number still where the load is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

SLACK = 0.7
"""Workers are only taken away where those that stay would be this full at most."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What an endpoint's owner has set."""

    least: int
    """Fewest workers while the endpoint is awake; at least 1."""
    most: int
    target_backlog_s: float
    up_delay_s: float
    down_delay_s: float

    def clamp(self, wanted: int) -> int:
        return max(self.least, min(self.most, wanted))


@dataclass(frozen=True, slots=True)
class Load:
    """What one look finds."""

    replicas: int
    """Workers that are wanted now, ready or not."""
    backlog_s: float
    """Seconds that one worker alone would need for all that waits and runs."""
    num_jobs: int
    """Jobs that wait or run."""
    taken_s: float
    """Seconds that one worker alone would have needed for all that ever came."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The number of workers from now on, and why."""

    replicas: int
    reason: str


@dataclass(frozen=True, slots=True)
class Watch:
    """What has been so since when. A new one has seen nothing."""

    above_since: float | None = None
    """Since when more workers are needed than there are."""
    above: int = 0
    """The fewest that were needed since then."""
    below_since: float | None = None
    """Since when fewer would do."""
    below: int = 0
    """The most that were needed since then."""
    taken_before_s: float = 0.0
    """`Load.taken_s` at `below_since`."""


def decide(policy: Policy, watch: Watch, now: float, load: Load) -> tuple[Watch, Decision | None]:
    """What to watch from here on, and the change that is due, if any. A change begins with a new Watch."""
    needed = policy.clamp(min(load.num_jobs, math.ceil(load.backlog_s / policy.target_backlog_s)))
    if needed > load.replicas:
        watch = _above(watch, now, needed)
        assert watch.above_since is not None
        if now - watch.above_since < policy.up_delay_s:
            return watch, None
        reason = (
            f"backlog {load.backlog_s:.1f} s over {load.replicas * policy.target_backlog_s:g} s "
            f"for {now - watch.above_since:.0f} s: {load.replicas} -> {watch.above}"
        )
        return Watch(), Decision(watch.above, reason)
    enough = policy.clamp(math.ceil(load.backlog_s / (policy.target_backlog_s * SLACK)))
    if enough >= load.replicas:
        return Watch(), None
    watch = _below(watch, now, enough, load.taken_s)
    assert watch.below_since is not None
    for_s = now - watch.below_since
    if for_s < policy.down_delay_s:
        return watch, None
    demand = (load.taken_s - watch.taken_before_s) / max(for_s, 1e-9)
    fewer = max(watch.below, policy.clamp(math.ceil(demand / SLACK)))
    if fewer >= load.replicas:  # the load may have ended in between: watched anew from here
        return Watch(), None
    reason = (
        f"backlog under {policy.target_backlog_s * SLACK * load.replicas:g} s and work for {demand:.1f} "
        f"workers for {for_s:.0f} s: {load.replicas} -> {fewer}"
    )
    return Watch(), Decision(fewer, reason)


def _above(watch: Watch, now: float, needed: int) -> Watch:
    if watch.above_since is None:
        return Watch(above_since=now, above=needed)
    return replace(watch, above=min(watch.above, needed))


def _below(watch: Watch, now: float, enough: int, taken_s: float) -> Watch:
    if watch.below_since is None:
        return Watch(below_since=now, below=enough, taken_before_s=taken_s)
    return replace(watch, below=max(watch.below, enough))
