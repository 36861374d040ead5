"""Run: the forwards of picked calls, merged as the batching mode allows; a row that fails, fails alone."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mezzotint.engine.lora.bank import AdapterBank, Lease
from mezzotint.engine.steps.batching import Call, Part, join, merge, partition, split
from mezzotint.engine.steps.exactness import (
    AdapterContext,
    Merging,
    exact_merging,
    exact_row_counts,
    rows_are_independent,
)
from mezzotint.engine.steps.text_cache import TextCache
from mezzotint.engine.steps.unmerged import row_by_row
from mezzotint.spec import Batching

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward that succeeded: its rows, padding included, and its seconds."""

    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the calls of one `Runner.run`."""

    results: list[Any]
    """For each call its result, or the exception that it alone caused."""
    forwards: list[Forward]
    """Without the forwards that checked a new shape."""


def _no_wait() -> None:
    """For a device that never lags behind."""


class Runner:
    """Runs calls in one batching mode.

    `exact`: every merged forward has `num_rows` rows, or fewer where this machine was seen to give a row the
    same bytes in a forward of that many, padded with copies; a call of more rows goes through in chunks;
    with `num_rows` 1 every call runs as the pipeline asked for it. A few layers that would give a row other
    bytes run row by row. A shape whose rows are still found to depend on their neighbours is not merged.
    `fast`: what is there, up to `num_rows`, but for shapes whose rows depend on their neighbours by more than
    rounding. `off`: never merged.
    """

    def __init__(
        self,
        mode: Batching,
        num_rows: int,
        counted: str = "",
        synchronize: Callable[[], None] = _no_wait,
        texts: TextCache | None = None,
    ) -> None:
        """`counted` names the component whose forwards and rows are counted.

        `synchronize` waits for the device: then times are true, and errors show in their own forward.
        `texts` remembers the results of text encoders; None remembers nothing.
        """
        self.mode = mode
        self.num_rows = 1 if mode == "off" else num_rows
        """Most rows of a forward; in `exact` mode R, set again by calibration before the first job."""
        self.adapters: AdapterBank | None = None
        """Set by the engine when the first adapter is added."""
        self.texts = TextCache(0) if texts is None else texts
        """Read by the engine for the worker's Stats."""
        self.counted = counted
        self.num_forwards = 0
        self.num_real_rows = 0
        self.num_padded_rows = 0
        # The three counters are of the `counted` component and read by the worker's Stats.
        self._synchronize = synchronize
        self._merging: dict[int, Merging] = {}
        """By the hash of a shape, how forwards of it may be merged."""

    def run(self, calls: Sequence[Call]) -> Outcome:
        """Runs calls that share one key, and alone those that fail together."""
        forwards: list[Forward] = []
        try:
            return Outcome(self._run(calls, forwards), forwards)
        except Exception as error:
            free_memory(error)
            if len(calls) == 1:
                return Outcome([error], forwards)
            _log.warning("a merged forward of %d calls failed; running each alone", len(calls), exc_info=True)
        alone = [self.run([call]) for call in calls]
        for each in alone:
            forwards += each.forwards
        return Outcome([each.results[0] for each in alone], forwards)

    def _run(self, calls: Sequence[Call], forwards: list[Forward]) -> list[Any]:
        if self.mode != "exact":
            if len(calls) > 1 and self._rows_are_independent(calls[0]):
                return self._together(calls, Merging(), forwards)
            return [self._alone(call, forwards) for call in calls]
        found = [self._exact_merging(call) for call in calls]
        merging = [call for call, each in zip(calls, found, strict=True) if each.row_counts]
        common = _common([each for each in found if each.row_counts], self.num_rows)
        together = iter(self._together(merging, common, forwards))
        return [
            next(together) if each.row_counts else self._alone(call, forwards)
            for call, each in zip(calls, found, strict=True)
        ]

    def _together(self, calls: Sequence[Call], allowed: Merging, forwards: list[Forward]) -> list[Any]:
        """Results of calls in shared forwards, as is `allowed`; no row counts allow what there is."""
        if not calls:
            return []
        rule = calls[0].rule
        assert rule is not None, "only calls with a Rule merge"
        pieces: dict[int, list[Any]] = {id(call): [] for call in calls}
        for parts in partition(calls, self.num_rows):
            sizes = [part.stop - part.start for part in parts]
            rows = next((count for count in allowed.row_counts if count >= sum(sizes)), sum(sizes))
            result = self._merged(parts, sizes, rows, allowed.unmerged, forwards)
            for part, piece in zip(parts, split(result, sizes, rule.results), strict=True):
                pieces[id(part.call)].append(piece)
        return [join(pieces[id(call)], rule.results) for call in calls]

    def _exact_merging(self, call: Call) -> Merging:
        """How forwards of such calls may be merged; what is unmerged does not depend on their adapters."""
        if self.num_rows == 1 or call.key is None:
            return _NEVER

        def settle(call: Call, num_rows: int, adapted: AdapterContext) -> Merging:
            unmerged = self._settled(call, None, num_rows, exact_merging).unmerged
            return Merging(exact_row_counts(call, num_rows, adapted, unmerged), unmerged)

        return self._settled(call, call.lease, self.num_rows, settle if call.lease else exact_merging)

    def _rows_are_independent(self, call: Call) -> bool:
        """Whether such calls may share a forward in `fast` mode."""
        rows = max(2, min(self.num_rows, 2 * call.rows))
        return bool(self._settled(call, call.lease, rows, _all_or_none).row_counts)

    def _settled(
        self,
        call: Call,
        lease: Lease | None,
        num_rows: int,
        settle: Callable[[Call, int, AdapterContext], Merging],
    ) -> Merging:
        """What `settle` says, once for each shape and each set of adapted layers.

        It runs forwards of noise in which every other row has the adapter of `lease`.
        """
        packed = None if lease is None else lease.resident.packed.get(call.name)
        shape = hash((call.key, num_rows, packed and packed.layout))
        known = self._merging.get(shape)
        if known is None:
            if len(self._merging) >= _MAX_SHAPES:
                self._merging.clear()

            def adapted(order: Sequence[int]) -> contextlib.AbstractContextManager[None]:
                return self._adapted(call.name, [None if index % 2 else lease for index in order])

            try:
                known = settle(call, num_rows, adapted)
            except Exception as error:  # of a call that takes or returns something else than the proven ones
                if is_out_of_memory(error):
                    raise
                _log.info("%s is not merged in this shape", call.name, exc_info=error)
                known = _NEVER
            self._merging[shape] = known
            if not known.row_counts:
                _log.warning("rows of %s depend on their neighbours in this shape: not merged", call.name)
        return known

    def _alone(self, call: Call, forwards: list[Forward]) -> Any:
        self._count(call, call.rows, call.rows)
        with self._adapted(call.name, [call.lease]):
            return self._timed(call.rows, lambda: self.texts.result(call), forwards)

    def _merged(
        self,
        parts: Sequence[Part],
        sizes: Sequence[int],
        rows: int,
        unmerged: Collection[nn.Module],
        forwards: list[Forward],
    ) -> Any:
        call = parts[0].call
        self._count(call, sum(sizes), rows)
        leases = [part.call.lease for part, size in zip(parts, sizes, strict=True) for _ in range(size)]
        leases += leases[-1:] * (rows - len(leases))
        one_by_one = row_by_row(unmerged, rows) if unmerged else _AS_IT_IS
        with self._adapted(call.name, leases), one_by_one:
            return self._timed(rows, lambda: call.run(**merge(parts, rows)), forwards)

    def _timed(self, rows: int, forward: Callable[[], Any], forwards: list[Forward]) -> Any:
        start = time.perf_counter()
        result = forward()
        self._synchronize()
        forwards.append(Forward(rows, time.perf_counter() - start))
        return result

    def _adapted(self, name: str, leases: Sequence[Lease | None]) -> contextlib.AbstractContextManager[None]:
        return _AS_IT_IS if self.adapters is None else self.adapters.rows(name, leases)

    def _count(self, call: Call, real: int, rows: int) -> None:
        if call.name == self.counted:
            self.num_forwards += 1
            self.num_real_rows += real
            self.num_padded_rows += rows - real


_AS_IT_IS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_NEVER = Merging()
_MAX_SHAPES = 1024
"""Shapes whose check is remembered."""


def _all_or_none(call: Call, num_rows: int, adapted: AdapterContext) -> Merging:
    return Merging((num_rows,)) if rows_are_independent(call, num_rows, adapted) else _NEVER


def _common(found: Sequence[Merging], num_rows: int) -> Merging:
    """How calls of one key merge with one another, each of which merges with its like as was found."""
    first = found[0] if found else _NEVER
    if all(each is first for each in found):
        return first
    counts = [n for n in range(1, num_rows + 1) if all(n in each.row_counts for each in found)]
    return Merging(tuple(counts), first.unmerged)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device ran out of memory."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def free_memory(error: BaseException) -> None:
    """After an out-of-memory error: gives cached device memory back, so that what comes next has a chance."""
    if is_out_of_memory(error) and torch.cuda.is_available():
        torch.cuda.empty_cache()
