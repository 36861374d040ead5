"""The checks behind the promise of `exact`: that in a forward of R rows a row's result depends on that row
alone, and which smaller forwards give a row the very same bytes. Layers that stand in the way run row by row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.engine.steps.batching import Call, Kind, Part, Rule, entries, merge, rebuilt, split
from mezzotint.engine.steps.laboratory import agrees
from mezzotint.engine.steps.probes import Probes
from mezzotint.engine.steps.traces import Trace
from mezzotint.engine.steps.unmerged import Finder, row_by_row

ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Row counts that forwards may have, beside R itself."""
DRAWS = 3
"""Draws of noise for a compiled forward, whose modules cannot be looked into; one is enough for others."""

AdapterContext = Callable[[Sequence[int]], contextlib.AbstractContextManager[None]]
"""Gives a forward of these rows (by index) their adapters."""


def _no_adapters(order: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def rows_are_independent(call: Call, num_rows: int, adapted: AdapterContext = _no_adapters) -> bool:
    """Whether in forwards of `num_rows` rows a row's result depends on that row alone, but for rounding."""
    return _Noise(call, num_rows, adapted, exactly=False).is_independent


def exact_row_counts(
    call: Call,
    num_rows: int,
    adapted: AdapterContext = _no_adapters,
    unmerged: Collection[nn.Module] = (),
) -> tuple[int, ...]:
    """Ascending row counts, `num_rows` the last, whose forwards give a row the same bytes; () if none do.

    In forwards of `num_rows` rows, in the shapes of `call`, bytes must depend on their own row alone: three
    forwards run on rows of noise: in some order, turned by one place, the first row with copies of itself.
    A smaller count qualifies if its forwards give the first and the last rows the bytes they had in those.
    Not only the result is compared, but what every module inside returned: rounding may hide a difference
    in the result of one row and show it in another's. The layers `unmerged` run row by row in all of this.
    Kernels are chosen by shape and never by values, so what is equal for noise is equal for every request.
    The noise is always the same: the answer depends on model, machine and shapes, not on who asked first.
    """
    smaller = _smaller(num_rows)
    may_be_compiled = _is_compiled(call) or hasattr(call.run, "as_loaded")  # see models/forms.py
    for draw in range(DRAWS if may_be_compiled else 1):
        noise = _Noise(call, num_rows, adapted, exactly=True, draw=draw, unmerged=unmerged)
        if not noise.is_independent:
            return ()
        everyone = noise.everyone
        smaller = [n for n in smaller if noise.agrees(everyone[:n]) and noise.agrees(everyone[-n:])]
    return (*smaller, num_rows)


@dataclass(frozen=True, slots=True)
class Merging:
    """How forwards of one shape may be merged so that a row keeps its bytes."""

    row_counts: tuple[int, ...] = ()
    """As `exact_row_counts` says."""
    unmerged: tuple[nn.Module, ...] = ()
    """Layers that run row by row in forwards of all these counts."""


def exact_merging(call: Call, num_rows: int, adapted: AdapterContext = _no_adapters) -> Merging:
    """How forwards of up to `num_rows` rows may be merged.

    A few layers that alone keep row counts from qualifying run row by row.
    """
    counts = exact_row_counts(call, num_rows, adapted)
    if len(counts) == len(_smaller(num_rows)) + 1 or _is_compiled(call):
        return Merging(counts)
    layers = _differing_layers(call, num_rows, adapted)
    repaired = exact_row_counts(call, num_rows, adapted, layers) if layers else ()
    return Merging(repaired, layers) if len(repaired) > len(counts) else Merging(counts)


def _smaller(num_rows: int) -> list[int]:
    return [count for count in ROW_COUNTS if count < num_rows]


def _differing_layers(call: Call, num_rows: int, adapted: AdapterContext) -> tuple[nn.Module, ...]:
    """The layers that give a row other bytes in a forward of some row count than alone; () if too many do."""
    noise = _Noise(call, num_rows, adapted, exactly=False)
    finder = Finder(noise.probes)
    for count in [num_rows, *_smaller(num_rows)[1:]]:
        with finder.watching(count):
            noise.rows_of(noise.everyone[:count])
        if finder.too_many:
            return ()
    return finder.found


def _is_compiled(call: Call) -> bool:
    """Whether the forward no longer calls its modules."""
    return hasattr(call.run, "_torchdynamo_orig_callable")


class _Noise:
    """Forwards of a call's shapes on rows of noise, and what each row gets in the first of them."""

    def __init__(
        self,
        call: Call,
        num_rows: int,
        adapted: AdapterContext,
        *,
        exactly: bool,
        draw: int = 0,
        unmerged: Collection[nn.Module] = (),
    ) -> None:
        """`exactly` compares bytes, also inside the forward; else results may differ by rounding.

        Each draw has other noise, four times as large as that of the one before. `unmerged` layers run row by
        row.
        """
        assert call.rule is not None, "only calls with a Rule merge"
        self._call, self._rule, self._adapted = call, call.rule, adapted
        self._unmerged = unmerged
        self._same = _same if exactly else agrees
        self._traced = exactly and not _is_compiled(call)
        noise = torch.Generator("cpu").manual_seed(draw)
        padded = merge([Part(call, 0, min(call.rows, num_rows))], num_rows)
        self._arguments = map_rows(
            padded, self._rule, lambda rows: _like_noise(rows, noise, 4.0**draw), equal=False
        )
        self.everyone = list(range(num_rows))
        self.probes = Probes(num_rows)
        self._wanted, self._trace = self.rows_of(self.everyone)
        self._inside = self._trace.comparable(self.rows_of([0])[1]) if self._traced else set()
        """What is compared inside the forwards: what has rows both in a forward of all and of one."""

    @property
    def is_independent(self) -> bool:
        """Whether a row keeps its result at the next place, among copies, and beside longer texts."""
        everyone = self.everyone
        turned = everyone[1:] + everyone[:1]
        return self.agrees(turned) and self.agrees([0] * len(everyone)) and self._ignores_masks()

    def agrees(self, order: Sequence[int]) -> bool:
        """Whether rows in this order get what they got in the first forward."""
        rows, trace = self.rows_of(order)
        return all(
            self._same(self._wanted[index], row) for index, row in zip(order, rows, strict=True)
        ) and self._trace.agrees(trace, self._inside)

    def _ignores_masks(self) -> bool:
        """Whether the first row keeps its result where the others have longer texts by their masks."""
        changed = map_rows(
            self._arguments, self._rule, lambda rows: [*rows[:1], *map(_full_mask, rows[1:])], equal=False
        )
        if _same(changed, self._arguments):
            return True
        return self._same(self._wanted[0], self._run(changed, self.everyone)[0][0])

    def rows_of(self, order: Sequence[int]) -> tuple[list[Any], Trace]:
        """What rows in this order get from a forward of so many, and its trace."""
        chosen = map_rows(self._arguments, self._rule, lambda rows: [rows[index] for index in order])
        return self._run(chosen, order)

    def _run(self, arguments: Mapping[str, Any], order: Sequence[int]) -> tuple[list[Any], Trace]:
        """What each row gets, and the trace of the forward: an empty one where that is not asked for."""
        trace = Trace(order, self.probes)
        recording = trace.recording() if self._traced else contextlib.nullcontext()
        with self._adapted(order), row_by_row(self._unmerged, len(order)), recording:
            result = self._call.run(**arguments)
        return split(result, [1] * len(order), self._rule.results), trace


def map_rows(
    arguments: Mapping[str, Any],
    rule: Rule,
    change: Callable[[list[Any]], list[Any]],
    *,
    equal: bool = True,
) -> Any:
    """The arguments with `change` applied to the list of rows of every argument that has rows.

    Not `equal`: but for those whose rows must be the same.
    """
    kinds = ("row", "scalar", "equal") if equal else ("row", "scalar")

    def changed(name: str, value: Any) -> Any:
        kind: Kind | None = rule.kind(name)
        if kind in kinds and isinstance(value, Tensor):
            dimension = rule.dimensions.get(name, 0)
            return torch.stack(change(list(value.unbind(dimension))), dimension).contiguous()
        if kind == "list" and isinstance(value, list):
            return change(value)
        if entries(value) is None:
            return value
        return rebuilt(value, lambda key, entry: changed(f"{name}.{key}", entry))

    return {name: changed(name, value) for name, value in arguments.items()}


def _full_mask(row: Any) -> Any:
    """A row of a mask (or of zeros and ones) that is one everywhere; any other row as it is.

    Some models read from the mask how long a text is, and cut the whole forward to the longest.
    """
    if not isinstance(row, Tensor) or row.is_floating_point() or not row.ndim:
        return row
    return torch.ones_like(row) if row.dtype == torch.bool or bool((row <= 1).all()) else row


def _like_noise(rows: list[Any], generator: torch.Generator, size: float) -> list[Any]:
    """Rows of noise of this size like these; masks, indices and what is no tensor stay as they are."""
    return [
        (size * torch.randn(row.shape, generator=generator)).to(row.dtype).to(row.device)
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
