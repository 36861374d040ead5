"""What a run came to: percentiles, shares, rates, refusals, and whether the generator was fast enough."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mezzotint.load.generator import LAG_EVERY_S, Measured, Sent, Shape, lone_time

PERCENTS = (50, 95, 99)
WITHIN = 3.0
"""A request is in time within so many times its lone time."""
TOO_LATE_SHARE, TOO_LATE_S = 0.05, 0.005
"""The generator's own delays may be so much of the median latency, or so many seconds, before it warns."""
MAX_PROCESSOR = 0.8
"""Share of one core that the generator may use before it warns."""


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent do not exceed, interpolated; the values must not be empty."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p95, p99, mean and max; None without values."""
    if not values:
        return None
    found = {f"p{percent}": percentile(values, percent) for percent in PERCENTS}
    return found | {"mean": statistics.fmean(values), "max": max(values)}


def is_done(sent: Sent) -> bool:
    return 200 <= sent.status < 300


def summarize(measured: Measured, lone: Mapping[Shape, float]) -> dict[str, Any]:
    """The figures of one run; seconds throughout.

    `within_3x_lone` is a share of all requests that were answered or refused. `lone_work_per_s` is the use of
    capacity: lone seconds of the answered requests per second, above 1 where the server merges or has several
    workers.
    """
    done = [sent for sent in measured.sent if is_done(sent)]
    lone_s = [lone_time(lone, sent.arrival.shape) for sent in done]
    within = sum(sent.seconds <= WITHIN * alone for sent, alone in zip(done, lone_s, strict=True))
    by_steps: dict[str, Any] = {}
    for steps in sorted({sent.arrival.steps for sent in done}, key=lambda steps: steps or 0):
        group = [sent.seconds for sent in done if sent.arrival.steps == steps]
        by_steps[str(steps or "the server's own")] = {"requests": len(group)} | (percentiles(group) or {})
    statuses = Counter(str(sent.status) for sent in measured.sent if not is_done(sent))
    wall_s = measured.wall_s or 1.0
    return {
        "requests": len(measured.sent),
        "done": len(done),
        "refused": dict(sorted(statuses.items())),
        "unfinished": measured.unfinished,
        "stopped": measured.stopped,
        "seconds": measured.wall_s,
        "latency_s": percentiles([sent.seconds for sent in done]),
        "latency_by_steps_s": by_steps,
        "within_3x_lone": within / len(measured.sent) if measured.sent else None,
        "images_per_s": sum(sent.arrival.n for sent in done) / wall_s,
        "requests_per_s": len(done) / wall_s,
        "lone_work_per_s": sum(lone_s) / wall_s,
        "generator": {
            "late_s": percentiles([sent.late_s for sent in measured.sent]),
            "lag_s": percentiles(measured.lag_s),
            "processor": measured.processor_s / wall_s,
        },
    }


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """Why these figures may be the generator's own and not the server's."""
    found, generator = [], summary["generator"]
    allowed_s = max(TOO_LATE_S, TOO_LATE_SHARE * (summary["latency_s"] or {}).get("p50", 0.0))
    late, lag = generator["late_s"], generator["lag_s"]
    if late and late["p95"] > allowed_s:
        found.append(
            f"the generator was the bottleneck: 5 % of the requests were sent over {late['p95']:.3f} s late "
            f"(at most {allowed_s:.3f} s is harmless); run it on another machine, or lower the rate"
        )
    if lag and lag["p95"] > allowed_s:
        found.append(
            f"the generator may be the bottleneck: its event loop overslept {LAG_EVERY_S:g} s by more than "
            f"{lag['p95']:.3f} s in 5 % of the looks (at most {allowed_s:.3f} s is harmless); "
            "give it a core of its own"
        )
    if generator["processor"] > MAX_PROCESSOR:
        found.append(
            f"the generator may be the bottleneck: it used {generator['processor']:.0%} of one core (at most "
            f"{MAX_PROCESSOR:.0%} is harmless); lower the rate"
        )
    return found


def record(sent: Sent) -> dict[str, Any]:
    """One request as the JSON file has it; the first six names are those of a trace."""
    arrival = sent.arrival
    return {
        "seconds": arrival.at_s,
        "steps": arrival.steps,
        "n": arrival.n,
        "adapter": arrival.adapter,
        "size": "{}x{}".format(*arrival.size) if arrival.size else None,
        "seed": arrival.seed,
        "status": sent.status,
        "latency_s": sent.seconds,
        "late_s": sent.late_s,
        "error": sent.error,
    }
