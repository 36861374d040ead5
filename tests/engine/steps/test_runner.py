"""Forwards in the three batching modes, and failures that stay with the row that caused them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.engine.steps.batching import Call, Rule
from mezzotint.engine.steps.exactness import Merging
from mezzotint.engine.steps.runner import Runner, is_out_of_memory

RULE = Rule({"x": "row"})


class Model:
    """Doubles its rows, remembers how many came at once, and fails where a row is very negative.

    With `rows` given, forwards of any other number of rows come out a little different.
    """

    def __init__(self, rows: int | None = None) -> None:
        self.batches: list[int] = []
        self.rows = rows

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        self.batches.append(len(x))
        if bool((x < -100).any()):
            raise ZeroDivisionError("a bad row")
        return (x * 2 + (0.5 if self.rows not in (None, len(x)) else 0),)


def call(model: Model, *values: float, rule: Rule | None = RULE) -> Call:
    return Call("transformer", model, (), {"x": torch.tensor(values).reshape(-1, 1)}, rule)


def values(outcome: Any) -> Any:
    return outcome if isinstance(outcome, Exception) else outcome[0].flatten().tolist()


def checked(runner: Runner, model: Model) -> Runner:
    """The runner after it has settled that rows of this shape are independent."""
    runner.run([call(model, 0.0)])
    model.batches.clear()
    runner.num_forwards = runner.num_real_rows = runner.num_padded_rows = 0
    return runner


def test_exact_runs_every_forward_with_the_same_number_of_rows() -> None:
    model = Model(rows=4)
    runner = checked(Runner("exact", 4, "transformer"), model)
    assert [values(each) for each in runner.run([call(model, 1.0), call(model, 2.0, 3.0)]).results] == [
        [2.0],
        [4.0, 6.0],
    ]
    assert values(runner.run([call(model, 5.0)]).results[0]) == [10.0]
    assert model.batches == [4, 4]
    assert (runner.num_forwards, runner.num_real_rows, runner.num_padded_rows) == (2, 4, 4)


def test_exact_takes_the_smallest_forward_that_gives_the_same_bytes() -> None:
    model = Model()
    runner = checked(Runner("exact", 8, "transformer"), model)
    runner.run([call(model, 1.0)])
    runner.run([call(model, 1.0), call(model, 2.0), call(model, 3.0)])
    assert model.batches == [1, 4]
    assert (runner.num_real_rows, runner.num_padded_rows) == (4, 1)


class Adapters:
    """Adds a little to the rows that have an adapter: a different little in forwards of `odd_rows` rows."""

    def __init__(self, odd_rows: int) -> None:
        self.odd_rows = odd_rows
        self.model = Model()

    @contextlib.contextmanager
    def rows(self, name: str, leases: Sequence[object]) -> Iterator[None]:
        little = 0.5 if len(leases) == self.odd_rows else 0.25
        self.added = torch.tensor([[little if lease else 0.0] for lease in leases])
        yield
        del self.added

    def __call__(self, x: Tensor) -> tuple[Tensor]:
        return (self.model(x)[0] + self.added,)

    def call(self, value: float, layout: str = "") -> Any:
        lease: Any = SimpleNamespace(
            resident=SimpleNamespace(packed={"transformer": SimpleNamespace(layout=layout)})
        )
        arguments = {"x": torch.tensor([[value]])}
        return Call("transformer", self, (), arguments, RULE, lease=lease if layout else None)


@pytest.mark.parametrize(("odd_rows", "expected"), [(8, [1]), (1, [2])])
def test_rows_with_adapters_are_checked_with_their_adapters(odd_rows: int, expected: list[int]) -> None:
    adapters = Adapters(odd_rows)
    runner = Runner("exact", 4)
    runner.adapters = adapters  # type: ignore[assignment]
    runner.run([adapters.call(0.0)])
    runner.run([adapters.call(0.0, "a")])
    adapters.model.batches.clear()
    runner.run([adapters.call(1.0)])
    assert adapters.model.batches == [1]
    adapters.model.batches.clear()
    assert values(runner.run([adapters.call(1.0, "a")]).results[0]) == [2.25]
    assert adapters.model.batches == expected
    together = runner.run([adapters.call(1.0), adapters.call(1.0, "a"), adapters.call(2.0)]).results
    assert [values(each) for each in together] == [[2.0], [2.25], [4.0]]


def test_calls_that_may_not_merge_run_beside_those_that_may() -> None:
    adapters = Adapters(odd_rows=4)
    runner = Runner("exact", 4)
    runner.adapters = adapters  # type: ignore[assignment]
    runner.run([adapters.call(0.0)])
    runner._merging[hash((adapters.call(0.0, "b").key, 4, "b"))] = Merging()
    adapters.model.batches.clear()
    together = runner.run([adapters.call(1.0), adapters.call(1.0, "b"), adapters.call(3.0)]).results
    assert [values(each) for each in together] == [[2.0], [2.25], [6.0]]
    assert sorted(adapters.model.batches) == [1, 2]


def test_exact_sends_a_call_with_many_rows_through_in_chunks() -> None:
    model = Model()
    runner = checked(Runner("exact", 2), model)
    assert values(runner.run([call(model, 1.0, 2.0, 3.0, 4.0, 5.0)]).results[0]) == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert model.batches == [2, 2, 1]


def test_exact_with_one_row_runs_each_call_as_it_came() -> None:
    model = Model()
    runner = Runner("exact", 1)
    assert values(runner.run([call(model, 1.0, 2.0)]).results[0]) == [2.0, 4.0]
    assert model.batches == [2]


def test_exact_never_merges_rows_that_depend_on_each_other() -> None:
    batches: list[int] = []

    def mixing(x: Tensor) -> tuple[Tensor]:
        batches.append(len(x))
        return (x - x.mean(0),)

    runner = Runner("exact", 4)
    arguments = {"x": torch.tensor([[1.0], [3.0]])}
    calls = [Call("transformer", mixing, (), arguments, RULE) for _ in range(2)]
    assert [values(each) for each in runner.run(calls).results] == [[-1.0, 1.0]] * 2
    assert batches[-2:] == [2, 2]


def test_a_shape_is_checked_once() -> None:
    model = Model(rows=4)
    runner = checked(Runner("exact", 4), model)
    for value in range(5):
        runner.run([call(model, float(value))])
    assert model.batches == [4] * 5


def test_fast_merges_what_is_there_and_runs_one_call_as_it_came() -> None:
    model = Model()
    runner = Runner("fast", 8)
    assert [values(each) for each in runner.run([call(model, 1.0), call(model, 2.0)]).results] == [
        [2.0],
        [4.0],
    ]
    assert model.batches == [2] * 4, "three forwards of noise show that rows are independent"
    runner.run([call(model, 1.0)])
    runner.run([call(model, 1.0), call(model, 2.0)])
    assert model.batches[4:] == [1, 2]


def test_fast_merges_no_shape_whose_rows_depend_on_their_neighbours() -> None:
    def mixing(x: Tensor) -> tuple[Tensor]:
        batches.append(len(x))
        return (x - x.mean(),)

    batches: list[int] = []
    calls = [Call("transformer", mixing, (), {"x": torch.tensor([[1.0], [3.0]])}, RULE) for _ in range(2)]
    outcomes = Runner("fast", 8).run(calls).results
    assert [values(each) for each in outcomes] == [[-1.0, 1.0]] * 2
    assert batches[-2:] == [2, 2]


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_call_whose_result_cannot_be_split_runs_alone(mode: Any) -> None:
    cache = object()
    calls = [
        Call("transformer", lambda x: (x * 2, cache), (), {"x": torch.tensor([[value]])}, RULE)
        for value in (1.0, 2.0)
    ]
    assert [result[0].item() for result in Runner(mode, 4).run(calls).results] == [2.0, 4.0]
    assert Runner(mode, 4).run(calls[:1]).results[0][1] is cache


def test_off_has_room_for_one_row() -> None:
    assert Runner("off", 16).num_rows == 1


def test_a_class_without_a_rule_runs_as_it_came() -> None:
    model = Model()
    runner = Runner("exact", 4)
    assert values(runner.run([call(model, 1.0, 2.0, rule=None)]).results[0]) == [2.0, 4.0]
    assert model.batches == [2]


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_bad_row_fails_alone_and_the_others_keep_their_bytes(mode: Any) -> None:
    model = Model(rows=4 if mode == "exact" else None)
    runner = Runner(mode, 4)
    outcomes = [
        values(each) for each in runner.run([call(model, 1.0), call(model, -500.0), call(model, 3.0)]).results
    ]
    assert outcomes[0] == [2.0]
    assert isinstance(outcomes[1], ZeroDivisionError)
    assert outcomes[2] == [6.0]
    if mode == "exact":
        assert set(model.batches[-3:]) == {4}


def test_the_time_of_a_run_is_that_of_its_forwards_without_the_check_of_a_new_shape() -> None:
    waited: list[int] = []
    model = Model()
    runner = Runner("exact", 4, synchronize=lambda: waited.append(len(model.batches)))
    forwards = runner.run([call(model, 1.0)]).forwards
    checks = len(model.batches) - 1
    assert checks >= 3
    assert waited == [checks + 1]
    assert [each.rows for each in forwards] == [1]
    assert forwards[0].seconds > 0


def test_only_the_named_component_is_counted() -> None:
    model = Model()
    runner = Runner("exact", 1, "transformer")
    runner.run([call(model, 1.0)])
    runner.run([Call("text_encoder", model, (), {"x": torch.ones(1, 1)})])
    assert runner.num_forwards == 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
