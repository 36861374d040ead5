"""R: how it follows from measurements, and the check that a row's bytes are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.engine.steps.batching import Call, Rule
from mezzotint.engine.steps.exactness import Measurement, choose_rows, exact_row_counts, find_rows, measure

RULE = Rule({"x": "row", "t": "scalar", "words": "list", "mask": "row"})


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


def call(run: Any, rows: int = 1) -> Call:
    arguments = {
        "x": torch.ones(rows, 4),
        "t": torch.tensor(0.5),
        "mask": torch.ones(rows, 4, dtype=torch.bool),
    }
    return Call("transformer", run, (), arguments, RULE)


def clean(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (x * mask + t.reshape(-1, 1),)


def by_neighbours(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (x - x.mean(0),)


def by_position(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
    return (x + torch.arange(len(x)).reshape(-1, 1),)


def test_rows_that_mind_their_own_business_pass_the_check() -> None:
    assert exact_row_counts(call(clean), 4) == (1, 2, 4)
    assert exact_row_counts(call(clean, rows=2), 3) == (1, 2, 3)


def test_a_smaller_forward_that_gives_other_bytes_is_not_used() -> None:
    def by_size(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (x + (1e-6 if len(x) == 2 else 0.0),)

    assert exact_row_counts(call(by_size), 8) == (1, 4, 8)


@pytest.mark.parametrize("run", [by_neighbours, by_position])
def test_rows_that_depend_on_others_or_on_their_place_are_found_out(run: Any) -> None:
    assert exact_row_counts(call(run), 4) == ()
    assert find_rows(call(run), measured((1, 1.0), (4, 1.0)), 1.4, 2.5) == 1
    assert find_rows(call(clean), measured((1, 1.0), (4, 1.0)), 1.4, 2.5) == 4


def test_lists_of_rows_take_part_in_the_check() -> None:
    def mixing(words: list[Tensor]) -> tuple[list[Tensor]]:
        return ([word + words[0] for word in words],)

    def own(words: list[Tensor]) -> tuple[list[Tensor]]:
        return ([word * 2 for word in words],)

    words = {"words": [torch.ones(3)]}
    assert exact_row_counts(Call("transformer", mixing, (), words, RULE), 2) == ()
    assert exact_row_counts(Call("transformer", own, (), words, RULE), 2) == (1, 2)


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
