"""How fast one worker is: by hand, as an endpoint has measured it, or from a file of `mezzotint bench`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.errors import InvalidRequestError
from mezzotint.load.arrivals import Size, read_size
from mezzotint.load.generator import Shape

NEAR_BEST = 0.9
"""The fewest jobs of a forward with this share of the best throughput are how many it takes."""
LEAST_GAIN = 1.1
"""Merging that raises throughput less than this many times is noise of the measurement."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One worker's times, all in seconds."""

    forward_s: Mapping[int, float]
    """Of one denoising step by how many jobs share it, from 1 to the most that do."""
    picture_s: float
    """Of a worker for each picture beside its steps: text encoder and decoder."""
    request_s: float = 0.0
    """Of a request outside workers: HTTP and the picture's file. It holds up no other request."""
    load_s: float = 0.0
    """From the start of a worker until it is ready."""
    own_size: tuple[int, int] = (512, 512)
    """Pixels of a request that names no size."""
    ratios: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """How many times longer pictures of other sizes take, where that was measured."""

    @property
    def most_jobs(self) -> int:
        """Jobs that one forward can serve."""
        return max(self.forward_s)

    def step_s(self, num_jobs: int, size: tuple[int, int]) -> float:
        """One step of so many jobs; between measured numbers of jobs in a straight line."""
        seconds = self.forward_s.get(num_jobs)
        if seconds is None:
            jobs = sorted(self.forward_s)
            seconds = float(np.interp(num_jobs, jobs, [self.forward_s[each] for each in jobs]))
        return seconds * self.ratio(size)

    def ratio(self, size: tuple[int, int]) -> float:
        """How many times longer than its own size; by pixels where it was not measured."""
        wide, high = self.own_size
        return self.ratios.get(size, size[0] * size[1] / (wide * high))


def of_endpoint(shown: Mapping[str, Any], id: str) -> Speed:
    """From what the managing API shows of an endpoint: its calibration and its workers' start times.

    InvalidRequestError where nothing has been measured yet.
    """
    info = shown["info"]
    table = info["calibration"] if info else []
    if not table:
        raise InvalidRequestError(
            f"endpoint {id} has measured no step yet; start it, or give --times FILE or --step-s S",
            param="endpoint",
        )
    alone = table[0]["rows"]  # with guidance, a job may have two rows
    most = info["rows"] if info["mergeable"] and info["batching"] == "exact" else table[-1]["rows"]
    if not info["mergeable"] or info["batching"] == "off":
        most = alone
    forward_s = {int(each["rows"] // alone): each["forward_s"] for each in table if each["rows"] <= most}
    return Speed(
        _never_less(forward_s or {1: table[0]["forward_s"]}),
        picture_s=table[0]["forward_s"],  # the server counts them as one step, too
        load_s=max((replica["load_s"] for replica in shown["replicas"]), default=0.0),
        own_size=(info["width"], info["height"]),
    )


class _Lone(BaseModel):
    model_config = ConfigDict(allow_inf_nan=False)
    steps: int | None
    n: int = Field(ge=1)
    size: Annotated[str, Field(pattern=r"^\d{1,5}x\d{1,5}$")] | None
    seconds: float = Field(gt=0)


class _Bench(BaseModel):
    """What is read of a file of `mezzotint bench`."""

    lone_s: list[_Lone]


def of_bench(file: Path) -> Speed:
    """From the lone times in a file of `mezzotint bench` against one worker.

    By least squares over the numbers of steps: the slope is a step, the rest is picture and request.
    InvalidRequestError where the file has too few.
    """
    try:
        lines = _Bench.model_validate(json.loads(file.read_text(encoding="utf-8"))).lone_s
    except OSError as error:
        raise InvalidRequestError(
            f"--times {file}: cannot be read ({error.strerror})", param="times"
        ) from None
    except (ValueError, ValidationError):
        text = f"--times {file}: is no JSON file of `mezzotint bench`; make one with --out NAME"
        raise InvalidRequestError(text, param="times") from None
    lone: dict[Shape, float] = {(line.steps, line.n, read_size(line.size)): line.seconds for line in lines}
    sizes: list[Size] = sorted({size for _, _, size in lone}, key=lambda size: size or (0, 0))
    fits = {size: _fits(lone, size) for size in sizes}
    own = next((size for size in sizes if 1 in fits[size]), None)
    if 1 not in fits.get(own, {}):
        raise InvalidRequestError(
            f"--times {file}: has no lone times of one picture with two numbers of steps; measure them with "
            "`mezzotint bench --steps 4,28 --n 1,2,4`",
            param="times",
        )
    return _speed(lone, fits[own], own)


def _fits(lone: Mapping[Shape, float], size: Size) -> dict[int, tuple[float, float]]:
    """By number of pictures: seconds a step, and the rest, of requests of this size."""
    found = {}
    for n in sorted({n for _, n, its in lone if its == size}):
        points = sorted(
            (steps, s) for (steps, num, its), s in lone.items() if (num, its) == (n, size) and steps
        )
        if len(points) > 1:
            slope, rest = np.polyfit([steps for steps, _ in points], [seconds for _, seconds in points], 1)
            found[n] = max(float(slope), 1e-6), max(float(rest), 0.0)
    return found


def _speed(lone: Mapping[Shape, float], fits: Mapping[int, tuple[float, float]], own: Size) -> Speed:
    picture_s, request_s = fits[1][1], 0.0
    if len(fits) > 1:
        slope, rest = np.polyfit(list(fits), [rest for _, rest in fits.values()], 1)
        picture_s = min(max(float(slope), 0.0), fits[1][1])
        request_s = max(0.0, min(float(rest), fits[1][1] - picture_s))
    step_s = {n: step for n, (step, _) in fits.items()}
    best = max(n / seconds for n, seconds in step_s.items())
    most = next(n for n, seconds in step_s.items() if n / seconds >= NEAR_BEST * best)
    if best * step_s[1] < LEAST_GAIN:
        most = 1
    ratios: dict[tuple[int, int], list[float]] = {}
    for (steps, n, size), seconds in lone.items():
        if size is not None and (steps, n, own) in lone:
            alike = (seconds - request_s) / max(lone[steps, n, own] - request_s, 1e-9)
            ratios.setdefault(size, []).append(max(alike, 1e-6))
    return Speed(
        _never_less({n: seconds for n, seconds in step_s.items() if n <= most}),
        picture_s,
        request_s,
        own_size=own or (512, 512),
        ratios={size: float(np.median(found)) for size, found in ratios.items()},
    )


def _never_less(forward_s: Mapping[int, float]) -> dict[int, float]:
    """A forward for more jobs takes no less time, whatever noise says."""
    jobs = sorted(forward_s)
    return dict(zip(jobs, accumulate((forward_s[each] for each in jobs), max), strict=True))
