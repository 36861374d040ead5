"""At load: R, the rows of a merged forward, measured with the arguments of a real job; and the warm-up.

Other programs on the machine must not decide R. So each row count runs several times, in turn with the
others; the shortest run counts, and measuring goes on, within a bound, until the two shortest agree. Where
one thread computes on the CPU, its own seconds are measured: they do not grow while it waits for a core.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mezzotint.engine.previews import LatentPreview
from mezzotint.engine.steps.batching import Call, Part, merge
from mezzotint.engine.steps.exactness import ROW_COUNTS, exact_merging
from mezzotint.spec import ImageSpec

NEAR_BEST = 0.9
"""The smallest row count with this share of the best throughput is enough."""
SLOW_FORWARD_S = 2.0
"""A model whose single forward takes longer is not measured further: merging gains it nothing."""
WARM_S, MAX_WARM_S = 0.5, 3.0
"""How long the pictures made at load may take, once a preview can be drawn and at most."""
SURE = 0.1
"""A measurement as uncertain as this, or less, is taken for true."""
MIN_ROUNDS, MAX_ROUNDS = 3, 30
MAX_S = 3.0
"""Seconds after which measuring ends once everything was measured twice; the first round does not count."""
PAUSE_S = 0.05
"""Between the rounds of a machine that is not quiet."""
_COMPILED = ("as_loaded", "_torchdynamo_orig_callable")
"""Attributes of forwards that were compiled, by us or beforehand."""
_PROMPTS = (
    "a red apple on a blue table",
    "a yellow duck on a green meadow",
    "a white cat in the snow",
    "a black car at night",
    "a pink flower on a white background",
    "an orange sunset",
    "a brown dog on a grey street",
    "a purple umbrella",
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """A forward of `rows` rows takes `forward_s`."""

    rows: int
    forward_s: float
    uncertainty: float = 0.0
    """How far runs of it disagree, relative to `forward_s`."""

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.forward_s

    def facts(self) -> dict[str, float]:
        """As ModelInfo reports it."""
        return asdict(self) | {"rows_per_s": self.rows_per_s}


def choose_rows(measured: Sequence[Measurement], *, min_gain: float, max_stretch: float) -> int:
    """R for `exact` mode; `measured` starts with the call as one job makes it.

    1 unless merging raises throughput `min_gain` times; otherwise the smallest count near the best
    throughput among those whose forward takes at most `max_stretch` times the single one's.
    """
    single = measured[0]
    allowed = [each for each in measured[1:] if each.forward_s <= max_stretch * single.forward_s]
    if not allowed:
        return 1
    best = max(each.rows_per_s for each in allowed)
    if best < min_gain * single.rows_per_s:
        return 1
    return min(each.rows for each in allowed if each.rows_per_s >= NEAR_BEST * best)


def find_rows(call: Call, measured: Sequence[Measurement], min_gain: float, max_stretch: float) -> int:
    """R for `exact` mode: what the measurements show, if the promise can be kept with it."""
    rows = choose_rows(measured, min_gain=min_gain, max_stretch=max_stretch)
    return rows if rows == 1 or exact_merging(call, rows).row_counts else 1


@dataclass(frozen=True, slots=True)
class Timing:
    """One run of a forward."""

    wall_s: float
    cpu_s: float | None = None
    """Seconds that the computing thread had a core; None where that is not what the run needs of a clock."""


class Interrupted(Exception):
    """There is something better to do than to measure."""


def never() -> bool:
    """Nothing interrupts."""
    return False


class Stopwatch:
    """Times forwards on `device`; `synchronize` waits for it.

    `interrupted` is asked before each; Interrupted once it says so.
    """

    def __init__(
        self,
        device: torch.device,
        synchronize: Callable[[], None],
        interrupted: Callable[[], bool] = never,
    ) -> None:
        self.device = device
        self._synchronize = synchronize
        self._interrupted = interrupted

    def time(self, forward: Callable[[], Any]) -> Timing:
        if self._interrupted():
            raise Interrupted
        self._synchronize()
        start, start_cpu = time.perf_counter(), time.thread_time()
        forward()
        self._synchronize()
        wall_s, cpu_s = time.perf_counter() - start, time.thread_time() - start_cpu
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1
        return Timing(wall_s, cpu_s if alone else None)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)


class _Runs:
    """What was measured of one row count."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.seconds: list[float] = []
        """CPU seconds where a Timing has them, else wall seconds."""

    def add(self, timing: Timing) -> None:
        self.wall_s.append(timing.wall_s)
        self.seconds.append(timing.wall_s if timing.cpu_s is None else timing.cpu_s)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def uncertainty(self) -> float:
        """Small if the two best runs agree, and the best wall time with them."""
        return max(sorted(self.seconds)[:2][-1], min(self.wall_s)) / max(self.best, 1e-9) - 1


def uncertainty(measured: Sequence[Measurement]) -> float:
    """That of the least certain one."""
    return max((each.uncertainty for each in measured), default=0.0)


def row_counts(call: Call, *, rows: int | None, max_rows: int) -> list[int]:
    """What to measure: the rows of `call`, then R if it is known (`rows`), else all that it might be."""
    if call.key is None:
        return [call.rows]
    more = [count * call.rows for count in ROW_COUNTS] if rows is None else [rows]
    return [call.rows, *(each for each in more if call.rows < each <= max(max_rows, rows or 0))]


def measure(
    call: Call, counts: Sequence[int], *, max_stretch: float, stopwatch: Stopwatch
) -> list[Measurement]:
    """Forwards of `counts` rows, the first as the call came, up to the first beyond `max_stretch`.

    Several threads on a machine without as many free cores are slower than one, many times so. Where that
    shows, what one thread measures is the better estimate, though an uncertain one.
    """
    threads = torch.get_num_threads() if stopwatch.device.type == "cpu" else 1
    compiled = any(hasattr(call.run, mark) for mark in _COMPILED)  # for this number of threads
    if threads == 1 or compiled:
        return _measure(call, counts, max_stretch, stopwatch)
    measured = None if _is_crowded(call, stopwatch) else _measure(call, counts, max_stretch, stopwatch)
    if measured is not None and all(each.uncertainty <= SURE for each in measured):
        return measured
    with _one_thread():
        single = _measure(call, counts, max_stretch, stopwatch)
    if measured is not None and measured[0].forward_s <= single[0].forward_s:
        return measured
    return [Measurement(each.rows, each.forward_s, max(threads - 1, each.uncertainty)) for each in single]


def _is_crowded(call: Call, stopwatch: Stopwatch) -> bool:
    """Whether one thread is faster than all of them."""

    def best() -> float:
        runs = _Runs()
        for _ in range(MIN_ROUNDS):
            runs.add(stopwatch.time(call.alone))
        return runs.best

    together = best()
    with _one_thread():
        return best() < together


def _measure(
    call: Call, counts: Sequence[int], max_stretch: float, stopwatch: Stopwatch
) -> list[Measurement]:
    runs = {rows: _Runs() for rows in counts}
    single = runs[counts[0]]
    spent_s, rounds = 0.0, 0
    while True:
        reached = []
        for rows in counts:
            timing = stopwatch.time(_forward(call, rows))
            runs[rows].add(timing)
            reached.append(rows)
            spent_s += timing.wall_s if rounds else 0.0
            if single.best > SLOW_FORWARD_S or runs[rows].best > max_stretch * single.best:
                break
        rounds += 1
        if rounds >= MIN_ROUNDS and all(runs[rows].uncertainty <= SURE for rows in reached):
            break
        if (spent_s > MAX_S or rounds >= MAX_ROUNDS) and all(len(runs[rows].seconds) > 1 for rows in reached):
            break
        if rounds >= MIN_ROUNDS:
            stopwatch.pause(PAUSE_S)
            spent_s += PAUSE_S
    return [Measurement(rows, runs[rows].best, runs[rows].uncertainty) for rows in reached]


def _forward(call: Call, rows: int) -> Callable[[], Any]:
    if rows == call.rows:
        return call.alone
    return functools.partial(call.run, **merge([Part(call, 0, call.rows)], rows))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stretch(measured: Sequence[Measurement], rows: int) -> float:
    """How many times as long as a single call's a forward of `rows` rows takes.

    Between measured row counts in a straight line, beyond them in proportion; 1 if nothing was measured.
    """
    if not measured:
        return 1.0
    single_s, last = measured[0].forward_s, measured[-1]
    for below, above in itertools.pairwise(measured):
        if rows <= above.rows:
            share = max(0, rows - below.rows) / (above.rows - below.rows)
            return (below.forward_s + share * (above.forward_s - below.forward_s)) / single_s
    return max(1.0, last.forward_s * rows / last.rows / single_s)


def warm_up(draw: Callable[[ImageSpec], bool], preview: LatentPreview, default_steps: int) -> None:
    """Draws a few pictures, until `preview` has learned from them or the time is up.

    Two steps each, or as many as are usual where the model cannot draw in two; `draw` says whether it could.
    """
    start = time.perf_counter()
    steps = 2
    for seed, prompt in enumerate(_PROMPTS):
        spec = ImageSpec(prompt=prompt, num_inference_steps=steps, seed=seed)
        if not draw(spec):
            if steps == default_steps:
                return
            steps = default_steps
        seconds = time.perf_counter() - start
        if preview.learned or seconds > (WARM_S if preview.ready else MAX_WARM_S):
            return
