"""R: how it follows from measurements, and how they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.engine.calibration import Measurement, choose_rows, find_rows, measure
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


def test_measuring_stops_where_a_forward_is_stretched_too_far() -> None:
    seen: list[int] = []
    clock = {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.01, 16: 0.01}

    def run(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
        seen.append(len(x))
        for _ in range(2000 if clock[len(x)] else 1):
            x = x + 1
        return (x,)

    found = measure(call(run), max_rows=16, max_stretch=2.5, synchronize=lambda: None)
    assert [each.rows for each in found] == [1, 2, 4, 8]
    assert max(seen) == 8


def test_a_call_that_cannot_merge_is_measured_alone() -> None:
    alone = Call(
        "transformer", clean, (), {"x": torch.ones(1, 4), "t": torch.tensor(1.0), "mask": torch.ones(1, 4)}
    )
    found = measure(alone, max_rows=16, max_stretch=2.5, synchronize=lambda: None)
    assert [each.rows for each in found] == [1]
