"""At load: R, the rows of a merged forward, measured with the arguments of a real job; and the warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mezzotint.engine.arguments import PipelineProfile
from mezzotint.engine.previews import LatentPreview
from mezzotint.engine.steps.batching import Call, Part, merge
from mezzotint.engine.steps.exactness import ROW_COUNTS, exact_row_counts
from mezzotint.engine.steps.pipeline_run import PipelineRun
from mezzotint.spec import ImageSpec

NEAR_BEST = 0.9
"""The smallest row count with this share of the best throughput is enough."""
SLOW_FORWARD_S = 2.0
"""A model whose single forward takes longer is not measured further: merging gains it nothing."""
WARM_S = 0.5
"""How long the pictures made at load may take, once a preview can be drawn."""
_MEASURE_S = 0.2
_MIN_RUNS = 3
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

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.forward_s


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
    return rows if rows == 1 or exact_row_counts(call, rows) else 1


def first_call(pipe: Any, profile: PipelineProfile) -> Call | None:
    """The first denoiser call of a real job; the pipeline is ended there."""
    arguments, _ = profile.call_arguments(ImageSpec(prompt=_PROMPTS[0], num_inference_steps=2))
    run = PipelineRun(pipe, arguments, seed=0)
    run.start()
    while run.call is not None and run.call.name != profile.denoiser_name:
        run.resume(run.call.alone())
    call, error = run.call, run.error
    run.close()
    if error is not None:
        raise error
    return call


def measure(
    call: Call, *, max_rows: int, max_stretch: float, synchronize: Callable[[], None]
) -> list[Measurement]:
    """Seconds of the call as it came, then with copies of itself, up to `max_rows` or `max_stretch`."""
    measured = [Measurement(call.rows, _seconds(call.alone, synchronize))]
    if measured[0].forward_s > SLOW_FORWARD_S:
        return measured
    for count in ROW_COUNTS[1:]:
        rows = count * call.rows
        if call.key is None or rows > max_rows:
            break
        arguments = merge([Part(call, 0, call.rows)], rows)
        measured.append(Measurement(rows, _seconds(lambda: call.run(**arguments), synchronize)))  # noqa: B023
        if measured[-1].forward_s > max_stretch * measured[0].forward_s:
            break
    return measured


def _seconds(forward: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    """The shortest of a few runs, which is what an undisturbed one takes."""
    forward()
    times: list[float] = []
    while len(times) < _MIN_RUNS or (sum(times) < _MEASURE_S and len(times) < 20):
        synchronize()
        start = time.perf_counter()
        forward()
        synchronize()
        times.append(time.perf_counter() - start)
        if times[-1] > _MEASURE_S:
            break
    return min(times)


def warm_up(draw: Callable[[ImageSpec], object], preview: LatentPreview) -> None:
    """Draws a few pictures of two steps, for at most WARM_S or until `preview` has learned from them."""
    start = time.perf_counter()
    for seed, prompt in enumerate(_PROMPTS):
        draw(ImageSpec(prompt=prompt, num_inference_steps=2, seed=seed))
        late = time.perf_counter() - start > WARM_S
        if preview.learned or (preview.ready and late):
            return
