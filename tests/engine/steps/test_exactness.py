"""The check that a row's bytes are its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.engine.steps.batching import Call, Rule
from mezzotint.engine.steps.exactness import exact_row_counts

RULE = Rule({"x": "row", "t": "scalar", "words": "list", "mask": "row"})


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


def test_lists_of_rows_take_part_in_the_check() -> None:
    def mixing(words: list[Tensor]) -> tuple[list[Tensor]]:
        return ([word + words[0] for word in words],)

    def own(words: list[Tensor]) -> tuple[list[Tensor]]:
        return ([word * 2 for word in words],)

    words = {"words": [torch.ones(3)]}
    assert exact_row_counts(Call("transformer", mixing, (), words, RULE), 2) == ()
    assert exact_row_counts(Call("transformer", own, (), words, RULE), 2) == (1, 2)


def test_rows_that_depend_on_a_longer_text_beside_them_are_found_out() -> None:
    def cut_to_the_longest(x: Tensor, t: Tensor, mask: Tensor) -> tuple[Tensor]:
        return (x + 1e-6 * int(mask.sum(1).max()),)

    short = torch.tensor([[True, True, False, False]])
    arguments = {"x": torch.ones(1, 4), "t": torch.tensor(0.5), "mask": short}
    assert exact_row_counts(Call("transformer", cut_to_the_longest, (), arguments, RULE), 4) == ()
