"""What the modules of a forward returned, as digests of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mezzotint.engine.steps.probes import Probes
from mezzotint.engine.steps.traces import Trace

MODULE = nn.Identity()


def trace(x: Tensor, module: nn.Module = MODULE, rows: list[int] | None = None) -> Trace:
    """Of a forward of `rows`, or of as many as `x` has, through a module that returns `x`."""
    found = Trace([*range(len(x))] if rows is None else rows, Probes(len(x)))
    with found.recording():
        module(x)
    return found


def same(one: Tensor, other: Tensor, rows: list[int] | None = None) -> bool:
    first, second = trace(one), trace(other, rows=rows)
    inside = first.comparable(second)
    assert inside
    return first.agrees(second, inside)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 7, 1])
def test_one_bit_of_one_row_makes_another_digest(dtype: torch.dtype, width: int) -> None:
    x = torch.randn(3, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same(x, x.clone())
    assert same(x, x[[2, 0]], [2, 0])
    assert not same(x, x[[0, 2]], [2, 0])
    for number in range(5 * width):
        changed = x.clone()
        bits = changed.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
        bits[1].view(-1)[number] ^= 1
        assert not same(x, changed)
        assert same(x[[0, 2]], changed[[0, 2]])


def test_two_differences_do_not_cancel_out() -> None:
    x = torch.ones(2, 6)
    changed = x.clone()
    changed[0, 1], changed[0, 4] = 1 + 2**-23, 1 - 2**-23
    assert not same(x, changed)
    assert not same(x.cumsum(1), x.cumsum(1).flip(1)), "values at other places"


def test_a_part_of_a_larger_tensor_has_the_digest_of_a_copy() -> None:
    whole = torch.arange(40, dtype=torch.bfloat16)
    part = whole[1:33].view(4, 8)
    assert same(part, part.clone())
    assert same(whole[:32].view(8, 4).T, whole[:32].view(8, 4).T.contiguous())


def test_what_has_no_rows_is_not_compared() -> None:
    ids = trace(torch.arange(4))
    assert not ids.comparable(ids)
    rows = trace(torch.ones(4, 3))
    assert not rows.comparable(trace(torch.ones(2, 5)))
    assert rows.comparable(trace(torch.ones(2, 3)))
    assert not rows.comparable(trace(torch.ones(4, 3), nn.Identity())), "another module"
