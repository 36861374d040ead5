"""The field `adapters`: what it may say, what it becomes, and what a picture's file keeps of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mezzotint.errors import InvalidRequestError
from mezzotint.images import Parameters, encode, parse_infotext, read_parameters
from mezzotint.schemas import parse_body
from mezzotint.spec import MAX_ADAPTERS, AdapterUse

LIST = "be a list of objects with route and scale"


def body(model: str, adapters: Any) -> Any:
    values = {"model": model, "prompt": "a cat", "num_inference_steps": 4, "adapters": adapters}
    return parse_body(json.dumps(values).encode())


@pytest.mark.parametrize(
    ("model", "adapters", "uses"),
    [
        ("one", None, ()),
        ("one", [], ()),
        ("one:a", None, (AdapterUse("a"),)),
        ("one", [{"route": "b"}, {"route": "a", "scale": 2}], (AdapterUse("b"), AdapterUse("a", 2.0))),
        ("one:a", [{"route": "b", "scale": None}], (AdapterUse("a"), AdapterUse("b"))),
        ("one:a", [{"route": "b"}, {"route": "a", "scale": -0.5}], (AdapterUse("a", -0.5), AdapterUse("b"))),
    ],
)
def test_the_adapter_that_model_names_comes_first(
    model: str, adapters: Any, uses: tuple[AdapterUse, ...]
) -> None:
    asked = body(model, adapters)
    assert asked.spec.adapters == uses
    again = asked.model_dump(mode="json")
    assert parse_body(json.dumps(again).encode()).spec.adapters == uses


@pytest.mark.parametrize(
    ("adapters", "code", "message"),
    [
        ({}, "invalid_type", LIST),
        ([3], "invalid_type", LIST),
        ([{"scale": 1}], "invalid_type", LIST),
        ([{"route": "a", "weight": 1}], "invalid_type", LIST),
        ([{"route": "a b"}], "invalid_value", "have routes of letters, digits, '.', '_' or '-' (got 'a b')"),
        ([{"route": "a", "scale": True}], "invalid_type", "have scales that are numbers (got True)"),
        ([{"route": "a", "scale": 11}], "out_of_range", "have scales between -10 and 10 (got 11)"),
        ([{"route": "a"}, {"route": "a"}], "invalid_value", "name each adapter once (got a twice)"),
        (
            [{"route": f"a{n}"} for n in range(MAX_ADAPTERS + 1)],
            "out_of_range",
            f"name at most {MAX_ADAPTERS} adapters (got {MAX_ADAPTERS + 1})",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(adapters: Any, code: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        body("one", adapters)
    assert (refused.value.code, refused.value.param, refused.value.message) == (
        code,
        "adapters",
        f"adapters must {message}",
    )


@pytest.mark.parametrize(
    ("model", "adapters"),
    [
        ("one:a", [{"route": "a", "scale": 0.5}, {"route": "b"}]),
        ("one", [{"route": "b"}, {"route": "a", "scale": -2.0}]),
        ("one:a", [{"route": "a", "scale": 0.5}]),
    ],
)
def test_a_pictures_file_keeps_them(model: str, adapters: list[dict[str, Any]]) -> None:
    spec = body(model, adapters).spec
    made = Parameters(model, spec)
    assert body(model, made.request_fields()["adapters"]).spec == spec
    for form in ("png", "jpeg", "webp"):
        assert read_parameters(encode(form, bytes(3), 1, 1, parameters=made)) == made
    if len(adapters) > 1:
        text = parse_infotext(made.to_infotext() + ", ")
        assert text is None or text.spec.adapters == spec.adapters


def test_the_strength_that_earlier_versions_wrote_is_read() -> None:
    old = {"model": "one:a", "prompt": "a cat", "num_inference_steps": 4, "seed": 1, "adapter_scale": 0.5}
    assert Parameters.from_dict(old).spec.adapters == (AdapterUse("a", 0.5),)
