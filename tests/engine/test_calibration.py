"""R: how it follows from measurements, and how they are made."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

from mezzotint.engine.calibration import (
    MAX_S,
    MIN_ROUNDS,
    SURE,
    Measurement,
    Stopwatch,
    Timing,
    choose_rows,
    find_rows,
    measure,
    row_counts,
    stretch,
)
from mezzotint.engine.steps.batching import Call
from tests.engine.steps.test_exactness import by_neighbours, by_position, call, clean


def measured(*pairs: tuple[int, float]) -> list[Measurement]:
    return [Measurement(rows, seconds) for rows, seconds in pairs]


def choose(*pairs: tuple[int, float]) -> int:
    return choose_rows(measured(*pairs), min_gain=1.4, max_stretch=2.5)


def test_one_row_where_merging_gains_too_little() -> None:
    assert choose((1, 1.0), (2, 1.6), (4, 3.1)) == 1  # at most 1.25 times


def test_the_smallest_count_near_the_best_throughput_wins() -> None:
    assert choose((1, 1.0), (2, 1.1), (4, 1.2), (8, 2.3)) == 4  # 3.33 is within a tenth of 3.48


def test_a_forward_that_takes_too_long_is_not_considered() -> None:
    assert choose((1, 1.0), (2, 1.2), (4, 1.5), (8, 2.6)) == 4
    assert choose((1, 1.0), (2, 2.6)) == 1


def test_rows_are_counted_from_those_of_a_single_call() -> None:
    assert choose((2, 1.0), (4, 1.2), (8, 2.0)) == 8  # two rows each, as with classifier-free guidance


@pytest.mark.parametrize("run", [by_neighbours, by_position])
def test_rows_that_depend_on_others_or_on_their_place_are_not_merged(run: Any) -> None:
    assert find_rows(call(run), measured((1, 1.0), (4, 1.0)), 1.4, 2.5) == 1
    assert find_rows(call(clean), measured((1, 1.0), (4, 1.0)), 1.4, 2.5) == 4


class ScriptedClock(Stopwatch):
    """Says that a forward of n rows took what its script has for n, run by run, the last entry for ever."""

    def __init__(
        self, script: Mapping[int, Sequence[float]], *, cpu_s: Mapping[int, float] | None = None
    ) -> None:
        super().__init__(torch.device("cpu"), lambda: None)
        self.script = {rows: list(times) for rows, times in script.items()}
        self.cpu_s = cpu_s
        self.seen: list[int] = []
        self.paused_s = 0.0

    def time(self, forward: Callable[[], Any]) -> Timing:
        (result,) = forward()
        rows, times = len(result), self.script[len(result)]
        self.seen.append(rows)
        wall_s = times.pop(0) if len(times) > 1 else times[0]
        return Timing(wall_s, None if self.cpu_s is None else self.cpu_s[rows])

    def pause(self, seconds: float) -> None:
        self.paused_s += seconds

    def measure(self, *counts: int) -> list[Measurement]:
        return measure(call(clean), counts, max_stretch=2.5, stopwatch=self)


QUIET = {1: [0.010], 2: [0.012], 4: [0.016], 8: [0.030], 16: [0.060]}


def seconds(found: Sequence[Measurement]) -> dict[int, float]:
    return {each.rows: each.forward_s for each in found}


def test_a_quiet_machine_is_measured_in_three_rounds_up_to_the_first_stretch() -> None:
    clock = ScriptedClock(QUIET)
    found = clock.measure(1, 2, 4, 8, 16)
    assert seconds(found) == {1: 0.010, 2: 0.012, 4: 0.016, 8: 0.030}
    assert max(each.uncertainty for each in found) == 0
    assert clock.seen == [1, 2, 4, 8] * 3
    assert clock.paused_s == 0


@pytest.mark.parametrize("slow_run", range(6))
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_one_slow_run_of_any_row_count_decides_nothing(rows: int, slow_run: int) -> None:
    script = {**QUIET, rows: [*[QUIET[rows][0]] * slow_run, 2.24, QUIET[rows][0]]}
    found = ScriptedClock(script).measure(1, 2, 4, 8, 16)
    assert {rows: seconds(found)[rows] for rows in (1, 2, 4)} == {1: 0.010, 2: 0.012, 4: 0.016}
    assert choose_rows(found, min_gain=1.4, max_stretch=2.5) == 4


def test_a_start_that_is_disturbed_throughout_waits_for_quiet() -> None:
    noise = [0.9, 0.2, 0.1, 0.15]
    script = {rows: [*noise, quiet[0]] for rows, quiet in QUIET.items()}
    clock = ScriptedClock(script)
    found = clock.measure(1, 2, 4, 8, 16)
    assert choose_rows(found, min_gain=1.4, max_stretch=2.5) == 4
    assert seconds(found)[1] == 0.010
    assert clock.paused_s > 0


def test_noise_without_end_is_given_up_within_a_bound_and_said_to_be_uncertain() -> None:
    never_twice_the_same = [0.8**run for run in range(99)]
    clock = ScriptedClock({1: never_twice_the_same, 2: never_twice_the_same})
    found = clock.measure(1, 2)
    num_rounds = len(clock.seen) // 2
    before_the_last = 2 * sum(never_twice_the_same[1 : num_rounds - 1]) + clock.paused_s
    assert num_rounds >= MIN_ROUNDS
    assert before_the_last <= MAX_S
    assert min(each.uncertainty for each in found) > SURE


def test_processor_time_counts_where_the_clock_is_disturbed_and_the_doubt_is_said() -> None:
    busy = {rows: [0.4, 0.3, 0.5] for rows in QUIET}
    found = ScriptedClock(busy, cpu_s={rows: quiet[0] for rows, quiet in QUIET.items()}).measure(1, 2, 4, 8)
    assert seconds(found) == {1: 0.010, 2: 0.012, 4: 0.016, 8: 0.030}
    assert min(each.uncertainty for each in found) > SURE


def test_a_slow_model_is_run_twice_and_not_merged() -> None:
    clock = ScriptedClock({1: [5.0], 2: [5.1]})
    assert seconds(clock.measure(1, 2)) == {1: 5.0}
    assert clock.seen == [1, 1]


def test_several_threads_without_cores_of_their_own_are_measured_as_one(two_threads: None) -> None:
    class TwoThreads(ScriptedClock):
        def time(self, forward: Callable[[], Any]) -> Timing:
            timing = super().time(forward)
            if torch.get_num_threads() == 1:
                return Timing(timing.wall_s, QUIET[self.seen[-1]][0])
            return timing

    chance = random.Random(5)
    noise = {rows: [chance.uniform(0.1, 2.0) for _ in range(9999)] for rows in QUIET}
    found = TwoThreads(noise).measure(1, 2, 4, 8, 16)
    assert seconds(found) == {1: 0.010, 2: 0.012, 4: 0.016, 8: 0.030}
    assert min(each.uncertainty for each in found) > SURE
    assert torch.get_num_threads() == 2
    late = {rows: [0.005] * 3 + times if rows == 1 else times for rows, times in noise.items()}
    assert seconds(TwoThreads(late).measure(1, 2)) == {1: 0.010, 2: 0.012}, "noise that begins later is seen"
    quiet = TwoThreads({rows: [times[0] / 2] for rows, times in QUIET.items()}).measure(1, 2)
    assert seconds(quiet) == {1: 0.005, 2: 0.006}, "quiet threads count as they are"


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)


def test_what_is_measured_depends_on_whether_r_is_known() -> None:
    assert row_counts(call(clean), rows=None, max_rows=16) == [1, 2, 4, 8, 16]
    assert row_counts(call(clean, rows=2), rows=None, max_rows=9) == [2, 4, 8]
    assert row_counts(call(clean), rows=5, max_rows=4) == [1, 5]
    assert row_counts(call(clean), rows=1, max_rows=4) == [1]


def test_a_call_that_cannot_merge_is_measured_alone() -> None:
    alone = Call(
        "transformer", clean, (), {"x": torch.ones(1, 4), "t": torch.tensor(1.0), "mask": torch.ones(1, 4)}
    )
    assert row_counts(alone, rows=None, max_rows=16) == [1]


def test_a_merged_forward_tells_what_a_lone_one_would_take() -> None:
    found = measured((1, 0.010), (2, 0.012), (4, 0.016))
    assert [stretch(found, rows) for rows in (1, 2, 3, 4)] == pytest.approx([1.0, 1.2, 1.4, 1.6])
    assert stretch(found, 8) == pytest.approx(3.2)
    assert stretch(found[:1], 1) == stretch([], 4) == 1.0
