"""The checks behind the promise of `exact`: that in a forward of R rows a row's result depends on that row
alone, and which smaller forwards give a row the very same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mezzotint.engine.steps.batching import Call, Kind, Part, Rule, entries, merge, rebuilt, split

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Row counts that forwards may have, beside R itself."""

AdapterContext = Callable[[Sequence[int]], contextlib.AbstractContextManager[None]]
"""Gives a forward of these rows (by index) their adapters."""


def _no_adapters(order: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def exact_row_counts(call: Call, num_rows: int, adapted: AdapterContext = _no_adapters) -> tuple[int, ...]:
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
    arguments = map_rows(padded, rule, lambda rows: _like_noise(rows, noise))

    def rows_of(order: Sequence[int]) -> list[Any]:
        chosen = map_rows(arguments, rule, lambda rows: [rows[index] for index in order])
        with adapted(order):
            return split(call.run(**chosen), [1] * len(order), rule.results)

    everyone = list(range(num_rows))
    wanted = rows_of(everyone)

    def agrees(order: Sequence[int]) -> bool:
        return all(_same(wanted[index], row) for index, row in zip(order, rows_of(order), strict=True))

    if not (agrees(everyone[1:] + everyone[:1]) and agrees([0] * num_rows)):
        return ()
    smaller = [count for count in ROW_COUNTS if count < num_rows]
    return (*(each for each in smaller if agrees(everyone[:each]) and agrees(everyone[-each:])), num_rows)


def map_rows(arguments: Mapping[str, Any], rule: Rule, change: Callable[[list[Any]], list[Any]]) -> Any:
    """The arguments with `change` applied to the list of rows of every argument that has rows."""

    def changed(name: str, value: Any) -> Any:
        kind: Kind | None = rule.kind(name)
        if kind in ("row", "scalar") and isinstance(value, Tensor):
            dimension = rule.dimensions.get(name, 0)
            return torch.stack(change(list(value.unbind(dimension))), dimension).contiguous()
        if kind == "list" and isinstance(value, list):
            return change(value)
        if entries(value) is None:
            return value
        return rebuilt(value, lambda key, entry: changed(f"{name}.{key}", entry))

    return {name: changed(name, value) for name, value in arguments.items()}


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
