"""Calls: what must agree, how rows merge, and how results are split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mezzotint.engine.steps.batching import Call, NotMergeable, Part, Rule, join, merge, partition, split

RULE = Rule(
    {
        "x": "row",
        "t": "scalar",
        "ids": "shared",
        "texts": "list",
        "extra.pooled": "row",
    }
)
PARAMETERS = ("x", "t", "ids", "texts", "extra", "mode")


def forward(**arguments: Any) -> Any:
    return arguments


def call(*args: Any, **kwargs: Any) -> Call:
    return Call("transformer", forward, args, kwargs, RULE, PARAMETERS)


def whole(each: Call) -> Part:
    return Part(each, 0, each.rows)


def merged(*calls: Call, rows: int) -> dict[str, Any]:
    return merge([whole(each) for each in calls], rows)


def test_positional_and_named_arguments_are_the_same_call() -> None:
    x = torch.ones(2, 3)
    assert call(x, torch.tensor(5)).key == call(x=x, t=torch.tensor(5)).key
    assert call(x).key is not None


def test_calls_that_differ_only_in_their_number_of_rows_merge() -> None:
    assert call(torch.ones(1, 3)).key == call(torch.zeros(4, 3)).key


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(1, 4)},
        {"x": torch.ones(1, 3, dtype=torch.bfloat16)},
        {"mode": True},
        {"mode": 1.0},
        {"ids": torch.tensor([1, 2, 4])},
        {"t": None},
        {"extra": {"pooled": torch.ones(1, 2), "scale": 2.0}},
        {"extra": {}},
        {"texts": [torch.ones(5)]},
    ],
    ids=str,
)
def test_calls_that_differ_in_anything_else_do_not(other: dict[str, Any]) -> None:
    same: dict[str, Any] = {
        "x": torch.ones(1, 3),
        "t": torch.tensor(0.5),
        "ids": torch.tensor([1, 2, 3]),
        "texts": [torch.ones(4)],
        "extra": {"pooled": torch.ones(1, 2), "scale": 1.0},
        "mode": 1,
    }
    copy = {**same, "ids": same["ids"].clone()}
    assert call(**same).key == call(**copy).key is not None
    assert call(**same).key != call(**{**same, **other}).key


@pytest.mark.parametrize(
    "arguments",
    [
        {"x": torch.ones(1, 3), "mode": torch.ones(1)},  # a tensor that no rule names
        {"x": torch.ones(2, 3), "t": torch.ones(3)},  # neither one value nor one for each row
        {"x": torch.ones(2, 3), "texts": [torch.ones(4)]},
        {"x": torch.ones(1, 3), "mode": {1, 2}},  # cannot be compared
        {"mode": 1},  # no rows at all
    ],
    ids=str,
)
def test_what_the_rule_does_not_cover_is_never_merged(arguments: dict[str, Any]) -> None:
    assert call(**arguments).key is None


def test_rows_of_different_length_merge_only_with_the_like_in_the_same_order() -> None:
    def texts(*lengths: int) -> Call:
        return call(x=torch.ones(2, 3), texts=[torch.ones(length) for length in lengths])

    assert texts(4, 5).key == texts(4, 5).key
    assert texts(4, 5).key != texts(5, 4).key
    assert texts(4, 4).key != texts(4, 5).key


def test_a_class_without_a_rule_is_never_merged() -> None:
    assert Call("transformer", forward, (), {"x": torch.ones(1, 3)}).key is None


def test_rows_are_put_one_after_the_other_and_padded_with_copies_of_the_last() -> None:
    a = call(x=torch.tensor([[1.0]]), t=torch.tensor(0.1), texts=["a"], mode="m")
    b = call(x=torch.tensor([[2.0], [3.0]]), t=torch.tensor(0.2), texts=["a", "a"], mode="m")
    assert a.key == b.key
    arguments = merged(a, b, rows=5)
    assert arguments["x"].tolist() == [[1.0], [2.0], [3.0], [3.0], [3.0]]
    assert torch.equal(arguments["t"], torch.tensor([0.1, 0.2, 0.2, 0.2, 0.2]))
    assert arguments["texts"] == ["a"] * 5
    assert arguments["mode"] == "m"


def test_entries_of_dict_arguments_merge_by_their_dotted_name() -> None:
    calls = [call(x=torch.ones(1, 1), extra={"pooled": torch.full((1, 2), float(i)), "n": 3}) for i in (1, 2)]
    arguments = merged(*calls, rows=2)
    assert arguments["extra"]["pooled"].tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert arguments["extra"]["n"] == 3


def test_a_shared_argument_is_passed_once() -> None:
    ids = torch.tensor([[7, 8]])
    arguments = merged(call(x=torch.ones(1, 1), ids=ids), call(x=torch.ones(1, 1), ids=ids.clone()), rows=2)
    assert arguments["ids"] is ids


def test_merged_rows_are_contiguous_whatever_they_were() -> None:
    expanded = torch.ones(1, 1, 1, 1).expand(1, 4, 2, 2)
    striped = torch.ones(1, 4, 2, 2).to(memory_format=torch.channels_last)
    for each in (expanded, striped):
        assert merged(call(x=each), rows=1)["x"].is_contiguous()
        assert merged(call(x=each), call(x=each), rows=3)["x"].is_contiguous()


def test_calls_that_fit_share_a_forward_and_a_big_one_goes_in_chunks() -> None:
    one, two, five = call(x=torch.ones(1, 1)), call(x=torch.ones(2, 1)), call(x=torch.ones(5, 1))

    def rows(calls: list[Call]) -> list[list[int]]:
        return [[part.stop - part.start for part in forward] for forward in partition(calls, 3)]

    assert rows([one, two]) == [[1, 2]]
    assert rows([two, two]) == [[2], [2]]
    assert rows([five]) == [[3], [2]]


def test_a_call_in_chunks_gets_its_rows_back_in_order() -> None:
    big = call(x=torch.arange(5.0).reshape(5, 1))
    pieces = []
    for parts in partition([big], 2):
        result = (merge(parts, 2)["x"] * 10,)
        pieces += split(result, [part.stop - part.start for part in parts])
    assert join(pieces)[0].tolist() == [[0.0], [10.0], [20.0], [30.0], [40.0]]


class Output(dict[str, Any]):
    """Stands for diffusers' BaseOutput: a dict with a constructor of keywords."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: Output(sample=x)])
def test_results_of_every_shape_are_split_and_joined(wrap: Any) -> None:
    def tensor(result: Any) -> Tensor:
        found = (
            result["sample"]
            if isinstance(result, dict)
            else result[0]
            if isinstance(result, tuple)
            else result
        )
        assert isinstance(found, Tensor)
        return found

    rows = torch.arange(8.0).reshape(4, 2)
    one, two = split(wrap(rows), [1, 2])
    assert torch.equal(tensor(one), rows[:1])
    assert torch.equal(tensor(two), rows[1:3])
    assert torch.equal(tensor(join([one, two])), rows[:3])


def test_lists_of_rows_are_split_into_lists() -> None:
    first, second = split(([torch.zeros(1), torch.ones(1), torch.ones(1)],), [1, 1])
    assert first[0][0].item() == 0
    assert len(second[0]) == 1
    assert len(join([first, second])[0]) == 2


def test_a_split_row_does_not_keep_the_whole_batch_in_memory() -> None:
    (row,) = split(torch.ones(64, 1000), [1])
    assert row.untyped_storage().nbytes() == 4000


@pytest.mark.parametrize("result", [torch.tensor(1.0), torch.ones(1, 2), "text"])
def test_a_result_without_the_rows_asked_for_is_refused(result: Any) -> None:
    with pytest.raises(NotMergeable):
        split(result, [1, 1])
