"""What a load must come to, and the fewest workers with which it does."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mezzotint.config import EndpointSettings
from mezzotint.errors import InvalidRequestError
from mezzotint.load import results
from mezzotint.load.arrivals import Arrival
from mezzotint.load.generator import Shape
from mezzotint.sizing.simulation import Simulated, fixed, simulate
from mezzotint.sizing.speed import Speed

P95_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Objective:
    """All that is set must hold. A request that is refused or reaches its deadline counts as too late."""

    p95_s: float | None = None
    within_3x: float | None = None
    """Share of the requests that are done within three times their lone time."""
    done: float | None = None
    """Share of the requests that are done before their deadline, and not refused."""

    def is_met(self, summary: Mapping[str, Any], run: Simulated) -> bool:
        sent = run.measured.sent
        if self.p95_s is not None:
            in_time = sum(results.is_done(each) and each.seconds <= self.p95_s for each in sent)
            if in_time < P95_SHARE * len(sent):
                return False
        if self.within_3x is not None and summary["within_3x_lone"] < self.within_3x:
            return False
        return self.done is None or summary["done"] >= self.done * len(sent)


def outcome(
    spec: EndpointSettings,
    arrivals: Sequence[Arrival],
    speed: Speed,
    lone: Mapping[Shape, float],
    objective: Objective,
) -> dict[str, Any]:
    """The figures of one simulated run with these settings, as `mezzotint bench` names them, and its cost."""
    run = simulate(arrivals, speed, spec)
    summary = results.summarize(run.measured, lone)
    for about_the_sender in ("generator", "unfinished", "stopped"):
        del summary[about_the_sender]
    least, most = spec.num_replicas
    return {
        "min_workers": 0 if spec.sleep_after_s is not None else least,
        "max_workers": most,
        **summary,
        "worker_hours": run.worker_s / 3600,
        "mean_workers": run.worker_s / run.measured.wall_s,
        "most_workers": run.most_workers,
        "starts": run.num_starts,
        "met": objective.is_met(summary, run),
    }


def search(
    spec: EndpointSettings,
    arrivals: Sequence[Arrival],
    speed: Speed,
    lone: Mapping[Shape, float],
    objective: Objective,
    most: int,
) -> Iterator[dict[str, Any]]:
    """Outcomes with more and more workers, the last one the first that meets the objective.

    It begins where the workers could just do all the work. InvalidRequestError after `most` workers.
    """
    first = min(max(1, int(offered(arrivals, speed))), most)
    for workers in range(first, most + 1):
        found = outcome(fixed(spec, workers), arrivals, speed, lone, objective)
        yield found
        if found["met"]:
            return
    raise InvalidRequestError(
        f"{most} workers do not meet the objective; allow more with --max-workers, ask for less, or look at "
        f"what one request takes alone ({statistics.fmean(lone.values()):.3g} s on average)",
        param="max_workers",
    )


def offered(arrivals: Sequence[Arrival], speed: Speed) -> float:
    """Workers that these arrivals keep busy where every forward is full."""
    full_s = speed.forward_s[speed.most_jobs] / speed.most_jobs
    work_s = sum(
        arrival.n
        * ((arrival.steps or 0) * full_s + speed.picture_s)
        * speed.ratio(arrival.size or speed.own_size)
        for arrival in arrivals
    )
    span_s = arrivals[-1].at_s - arrivals[0].at_s
    return work_s / span_s if span_s else 0.0
