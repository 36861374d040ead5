"""How many rows a merged forward should have, measured with the arguments of a real job.

Also the checks behind the promise of `exact`: that in a forward of R rows a row's result depends on that row
alone, and which smaller forwards give a row the very same bytes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mezzotint.engine.arguments import PipelineFacts
from mezzotint.engine.steps.batching import Call, Kind, Part, Rule, merge, split
from mezzotint.engine.steps.jobs import Job
from mezzotint.spec import ImageSpec

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
NEAR_BEST = 0.9
"""The smallest row count with this share of the best throughput is enough."""
SLOW_FORWARD_S = 2.0
"""A model whose single forward takes longer is not measured further: merging gains it nothing."""
_MEASURE_S = 0.2
_MIN_RUNS = 3


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


def _bare(order: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def find_rows(call: Call, measured: Sequence[Measurement], min_gain: float, max_stretch: float) -> int:
    """R for `exact` mode: what the measurements show, if the promise can be kept with it."""
    rows = choose_rows(measured, min_gain=min_gain, max_stretch=max_stretch)
    return rows if rows == 1 or exact_row_counts(call, rows) else 1


def first_call(pipe: Any, facts: PipelineFacts, request: ImageSpec) -> Call | None:
    """The first denoiser call of a real job; the job itself ends there."""
    arguments, _ = facts.call_arguments(request)
    job = Job(pipe, arguments, seed=0)
    job.start()
    while job.call is not None and job.call.name != facts.denoiser_name:
        job.resume(job.call.alone())
    call, error = job.call, job.error
    job.close()
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


Around = Callable[[Sequence[int]], contextlib.AbstractContextManager[None]]
"""What a forward of these rows (by index) must run in: their adapters."""


def exact_row_counts(call: Call, num_rows: int, around: Around = _bare) -> tuple[int, ...]:
    """Ascending row counts, `num_rows` the last, whose forwards give a row the same bytes; () if none do.

    In forwards of `num_rows` rows, in the shapes of `call`, bytes must depend on their own row alone: three
    forwards run on rows of noise: in some order, turned by one place, the first row with copies of itself.
    A smaller count qualifies if its forwards give the first and the last rows the bytes they had in those.
    Kernels are chosen by shape and never by values, so what is equal for noise is equal for every request.
    The noise is always the same: the answer depends on model, machine and shapes, not on who asked first.
    """
    assert call.rule is not None, "only calls with a Rule merge"
    rule = call.rule
    noise = torch.Generator("cpu").manual_seed(0)
    padded = merge([Part(call, 0, min(call.rows, num_rows))], num_rows)
    arguments = _map_rows(padded, rule, lambda rows: _like_noise(rows, noise))

    def rows_of(order: Sequence[int]) -> list[Any]:
        chosen = _map_rows(arguments, rule, lambda rows: [rows[index] for index in order])
        with around(order):
            return split(call.run(**chosen), [1] * len(order))

    everyone = list(range(num_rows))
    wanted = rows_of(everyone)

    def agrees(order: Sequence[int]) -> bool:
        return all(_same(wanted[index], row) for index, row in zip(order, rows_of(order), strict=True))

    if not (agrees(everyone[1:] + everyone[:1]) and agrees([0] * num_rows)):
        return ()
    smaller = [count for count in ROW_COUNTS if count < num_rows]
    return (*(each for each in smaller if agrees(everyone[:each]) and agrees(everyone[-each:])), num_rows)


def _map_rows(
    arguments: Mapping[str, Any], rule: Rule, change: Callable[[list[Any]], list[Any]], prefix: str = ""
) -> dict[str, Any]:
    """The arguments with `change` applied to the list of rows of every argument that has rows."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        kind: Kind | None = rule.arguments.get(prefix + name)
        if isinstance(value, dict):
            result[name] = _map_rows(value, rule, change, f"{prefix}{name}.")
        elif kind in ("row", "scalar") and isinstance(value, Tensor):
            result[name] = torch.stack(change(list(value.unbind()))).contiguous()
        elif kind == "list" and isinstance(value, list):
            result[name] = change(value)
        else:
            result[name] = value
    return result


def _like_noise(rows: list[Any], generator: torch.Generator) -> list[Any]:
    """Rows of noise like these; masks, indices and what is no tensor stay as they are."""
    return [
        torch.randn(row.shape, generator=generator).to(row.dtype).to(row.device)
        if isinstance(row, Tensor) and row.is_floating_point()
        else row
        for row in rows
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return all(_same(left, right) for left, right in zip(one, other, strict=True))
    return bool(one == other)
