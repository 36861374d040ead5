"""The contract's rules: which bodies are taken, and what the others are told."""

from __future__ import annotations

import json
from typing import Any, get_args

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import MISSING, ValidationError

from mezzotint.errors import MAX_ECHO, InvalidRequestError, MezzotintError, QueueFullError, nearest
from mezzotint.schemas import (
    KNOWN_FIELDS,
    DedicatedImageGenerationBody,
    DedicatedImageGenerationBodyResponseFormat,
    ErrorBody,
    ImageGenerationAnswer,
    ImageItem,
    RequestState,
    make_body,
    parse_body,
    parse_json,
    split_model,
)
from mezzotint.spec import MAX_SEED

GOOD: dict[str, Any] = {"model": "emoji", "num_inference_steps": 8, "prompt": "a cat"}


def body(**changes: Any) -> str:
    """A valid body with some fields changed; `...` takes the field out."""
    return json.dumps({name: value for name, value in (GOOD | changes).items() if value is not ...})


STEPS, GUIDANCE, FORMAT = "num_inference_steps", "guidance_scale", "response_format"
NEGATIVE = "negative_prompt"

# body, status, code, param
BODIES: list[tuple[str | bytes, int, str | None, str | None]] = [
    # ---- taken
    (body(), 200, None, None),
    (body(model="a"), 200, None, None),
    (body(model="emoji:noto"), 200, None, None),
    (body(model="9.b-c_d:E.f-g_h"), 200, None, None),
    (body(model="a" * 64 + ":" + "b" * 64), 200, None, None),
    (body(num_inference_steps=1), 200, None, None),
    (body(num_inference_steps=50), 200, None, None),
    (body(prompt="x"), 200, None, None),
    (body(prompt="x" * 10_000), 200, None, None),
    (body(prompt=" \n" + "x" * 10_000 + "\t "), 200, None, None),
    (body(prompt="🐱" * 10_000), 200, None, None),
    (body(prompt="line\nline\x01\u202e"), 200, None, None),
    (body(guidance_scale=None), 200, None, None),
    (body(guidance_scale=0), 200, None, None),
    (body(guidance_scale=100), 200, None, None),
    (body(guidance_scale=7.5), 200, None, None),
    (body(guidance_scale=1e-300), 200, None, None),
    (body(response_format=None), 200, None, None),
    (body(response_format="url"), 200, None, None),
    (body(response_format="raw"), 200, None, None),
    (body(response_format="png"), 200, None, None),
    (body(response_format="jpeg"), 200, None, None),
    (body(response_format="jpg"), 200, None, None),
    (body(seed=None), 200, None, None),
    (body(seed=0), 200, None, None),
    (body(seed=MAX_SEED), 200, None, None),
    (body(n=None), 200, None, None),
    (body(n=1, seed=MAX_SEED), 200, None, None),
    (body(n=8, seed=MAX_SEED - 7), 200, None, None),
    (body(n=8), 200, None, None),
    (body(width=8, height=16384), 200, None, None),
    (body(width=None, height=None), 200, None, None),
    (body(negative_prompt=""), 200, None, None),
    (body(negative_prompt="x" * 10_000), 200, None, None),
    (body(negative_prompt=None), 200, None, None),
    (body(control_images=None, controlnet_weights=None), 200, None, None),
    (body(control_images=[], controlnet_weights=[]), 200, None, None),
    (body(control_images=[{"image": "aGk="}] * 2, controlnet_weights=[0, 0.5]), 200, None, None),
    (b"\xef\xbb\xbf" + body().encode(), 200, None, None),
    (" \n" + body() + "\n ", 200, None, None),
    # ---- the JSON itself
    ("", 422, "invalid_json", None),
    (" \n", 422, "invalid_json", None),
    ("{", 422, "invalid_json", None),
    ("model=emoji", 422, "invalid_json", None),
    (body() + "x", 422, "invalid_json", None),
    ("{'model': 'emoji'}", 422, "invalid_json", None),
    (b"\xff\xfe", 422, "invalid_json", None),
    (body(prompt="é").encode("utf-16"), 422, "invalid_json", None),
    (b'{"prompt": "\xed\xa0\x80"}', 422, "invalid_json", None),
    ('{"guidance_scale": NaN}', 422, "invalid_json", None),
    ('{"guidance_scale": Infinity}', 422, "invalid_json", None),
    ('{"guidance_scale": -Infinity}', 422, "invalid_json", None),
    ("NaN", 422, "invalid_json", None),
    ('{"seed": ' + "1" * 5000 + "}", 422, "invalid_json", None),
    ("[" * 100_000, 422, "invalid_json", None),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, 422, "invalid_json", None),
    ("[]", 422, "invalid_type", None),
    ("null", 422, "invalid_type", None),
    ('"emoji"', 422, "invalid_type", None),
    ("3", 422, "invalid_type", None),
    ("true", 422, "invalid_type", None),
    ('{"seed": 1, "seed": 2}', 422, "duplicate_key", "seed"),
    ('{"seed": 1, "seed": 1}', 422, "duplicate_key", "seed"),
    ('{"x": {"y": 1, "y": 2}}', 422, "duplicate_key", "y"),
    # ---- fields that nobody knows come before everything else
    (body(steps=8), 422, "unknown_field", "steps"),
    (body(Prompt="x"), 422, "unknown_field", "Prompt"),
    (body(model=..., modle="emoji"), 422, "unknown_field", "modle"),
    (body(num_inference_steps=99, size="1x1"), 422, "unknown_field", "size"),
    (body(**{"": 1}), 422, "unknown_field", ""),
    (body(**{"x" * 500: 1}), 422, "unknown_field", "x" * MAX_ECHO),
    (body(**{"\ud800": 1}), 422, "unknown_field", "\\ud800"),
    # ---- model
    ("{}", 422, "missing_field", "model"),
    (body(model=...), 422, "missing_field", "model"),
    (body(model=None), 422, "invalid_type", "model"),
    (body(model=5), 422, "invalid_type", "model"),
    (body(model=["emoji"]), 422, "invalid_type", "model"),
    (body(model=""), 422, "invalid_value", "model"),
    (body(model=":"), 422, "invalid_value", "model"),
    (body(model="emoji:"), 422, "invalid_value", "model"),
    (body(model=":noto"), 422, "invalid_value", "model"),
    (body(model="a:b:c"), 422, "invalid_value", "model"),
    (body(model="emoji\n"), 422, "invalid_value", "model"),
    (body(model=" emoji"), 422, "invalid_value", "model"),
    (body(model=".emoji"), 422, "invalid_value", "model"),
    (body(model="../etc"), 422, "invalid_value", "model"),
    (body(model="émoji"), 422, "invalid_value", "model"),
    (body(model="a" * 65), 422, "invalid_value", "model"),
    (body(model="\ud800"), 422, "invalid_value", "model"),
    # ---- num_inference_steps
    (body(num_inference_steps=...), 422, "missing_field", STEPS),
    (body(num_inference_steps=None), 422, "invalid_type", STEPS),
    (body(num_inference_steps="20"), 422, "invalid_type", STEPS),
    (body(num_inference_steps=20.5), 422, "invalid_type", STEPS),
    (body(num_inference_steps=20.0), 422, "invalid_type", STEPS),
    (body(num_inference_steps=True), 422, "invalid_type", STEPS),
    (body(num_inference_steps=[20]), 422, "invalid_type", STEPS),
    (body(num_inference_steps={}), 422, "invalid_type", STEPS),
    (body(num_inference_steps=0), 422, "out_of_range", STEPS),
    (body(num_inference_steps=51), 422, "out_of_range", STEPS),
    (body(num_inference_steps=-1), 422, "out_of_range", STEPS),
    (body(num_inference_steps=10**30), 422, "out_of_range", STEPS),
    # ---- prompt
    (body(prompt=...), 422, "missing_field", "prompt"),
    (body(prompt=None), 422, "invalid_type", "prompt"),
    (body(prompt=1), 422, "invalid_type", "prompt"),
    (body(prompt=["a", "b"]), 422, "invalid_type", "prompt"),
    (body(prompt=""), 422, "out_of_range", "prompt"),
    (body(prompt=" \n\t\u2003"), 422, "out_of_range", "prompt"),
    (body(prompt="x" * 10_001), 422, "out_of_range", "prompt"),
    (body(prompt="a\0b"), 422, "invalid_value", "prompt"),
    (body(prompt="a\ud800b"), 422, "invalid_value", "prompt"),
    (body(prompt="a\udfff"), 422, "invalid_value", "prompt"),
    # ---- guidance_scale
    (body(guidance_scale="7"), 422, "invalid_type", GUIDANCE),
    (body(guidance_scale=True), 422, "invalid_type", GUIDANCE),
    (body(guidance_scale=[7]), 422, "invalid_type", GUIDANCE),
    (body(guidance_scale=-0.1), 422, "out_of_range", GUIDANCE),
    (body(guidance_scale=100.1), 422, "out_of_range", GUIDANCE),
    (body()[:-1] + ', "guidance_scale": 1e999}', 422, "out_of_range", GUIDANCE),
    # ---- response_format
    (body(response_format="webp"), 422, "invalid_value", FORMAT),
    (body(response_format="PNG"), 422, "invalid_value", FORMAT),
    (body(response_format=""), 422, "invalid_value", FORMAT),
    (body(response_format="b64_json"), 422, "invalid_value", FORMAT),
    (body(response_format="\ud800"), 422, "invalid_value", FORMAT),
    (body(response_format=1), 422, "invalid_type", FORMAT),
    (body(response_format=["png"]), 422, "invalid_type", FORMAT),
    # ---- seed
    (body(seed="1"), 422, "invalid_type", "seed"),
    (body(seed=1.5), 422, "invalid_type", "seed"),
    (body(seed=False), 422, "invalid_type", "seed"),
    (body(seed=-1), 422, "out_of_range", "seed"),
    (body(seed=MAX_SEED + 1), 422, "out_of_range", "seed"),
    (body(seed=10**4000), 422, "out_of_range", "seed"),
    (body(seed=MAX_SEED, n=2), 422, "out_of_range", "seed"),
    # ---- our own fields
    (body(n=0), 422, "out_of_range", "n"),
    (body(n=9), 422, "out_of_range", "n"),
    (body(n="2"), 422, "invalid_type", "n"),
    (body(n=True), 422, "invalid_type", "n"),
    (body(width=7), 422, "out_of_range", "width"),
    (body(width=16385), 422, "out_of_range", "width"),
    (body(height="128"), 422, "invalid_type", "height"),
    (body(height=128.5), 422, "invalid_type", "height"),
    (body(negative_prompt=1), 422, "invalid_type", NEGATIVE),
    (body(negative_prompt="a\0"), 422, "invalid_value", NEGATIVE),
    (body(negative_prompt="\udc00"), 422, "invalid_value", NEGATIVE),
    (body(negative_prompt="x" * 10_001), 422, "out_of_range", NEGATIVE),
    (body(control_images=["aGk="]), 422, "invalid_type", "control_images"),
    (body(control_images=[{"image": "aGk="}] * 17), 422, "too_many_images", "control_images"),
    (body(controlnet_weights=1.0), 422, "invalid_type", "controlnet_weights"),
    (body(controlnet_weights=["1"]), 422, "invalid_type", "controlnet_weights"),
    (body(controlnet_weights=[0.5, 1.5]), 422, "out_of_range", "controlnet_weights"),
    # ---- the first fault in the contract's order is the one that is told
    (body(seed=-1, prompt="", model=5), 422, "invalid_type", "model"),
    (body(seed=-1, prompt="", num_inference_steps=0), 422, "out_of_range", STEPS),
    (body(control_images=[], seed=-1), 422, "out_of_range", "seed"),
]


@pytest.mark.parametrize(("raw", "status", "code", "param"), BODIES)
def test_each_body_is_answered_as_the_table_says(
    raw: str | bytes, status: int, code: str | None, param: str | None
) -> None:
    try:
        parse_body(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))
        answer: tuple[int, str | None, str | None] = (200, None, None)
    except InvalidRequestError as error:
        answer = (error.status, error.code, error.param)
        error.message.encode()
        json.dumps(error.param, ensure_ascii=False).encode()
    assert answer == (status, code, param)


def test_the_table_has_at_least_eighty_bodies_of_either_outcome() -> None:
    assert len(BODIES) == len({raw for raw, *_ in BODIES}) >= 80
    assert {status for _, status, *_ in BODIES} == {200, 422}


# body, message
MESSAGES = [
    (body(num_inference_steps=99), "num_inference_steps must be between 1 and 50 (got 99)"),
    (body(num_inference_steps="20"), "num_inference_steps must be an integer (got '20')"),
    (body(num_inference_steps=True), "num_inference_steps must be an integer (got true)"),
    (body(num_inference_steps=[[[]]]), "num_inference_steps must be an integer (got an array)"),
    (body(prompt=None), "prompt must be a string (got null)"),
    (body(prompt={"a": 1}), "prompt must be a string (got an object)"),
    (body(prompt=...), "prompt is required"),
    (body(prompt=" "), "prompt must have at least 1 character after trimming (got 0)"),
    (body(prompt="x" * 10_002), "prompt must have at most 10000 characters after trimming (got 10002)"),
    (body(prompt="\0"), "prompt must not contain a NUL character; remove it"),
    (body(guidance_scale="high"), "guidance_scale must be a number (got 'high')"),
    (body(guidance_scale=100.5), "guidance_scale must be between 0 and 100 (got 100.5)"),
    (body(seed=10**400), f"seed must be between 0 and {MAX_SEED} (got a huge integer)"),
    (body(seed=MAX_SEED, n=2), f"seed with n = 2 must be at most {MAX_SEED - 1} (got {MAX_SEED})"),
    (body(seed=True), "seed must be an integer (got true)"),
    (
        body(response_format="jpge"),
        "response_format must be one of url, raw, png, jpeg, jpg (got 'jpge'); did you mean jpg?",
    ),
    (
        body(model="a:b:c"),
        "model must be ENDPOINT_ID or ENDPOINT_ID:ADAPTER_ROUTE, with one colon at most (got 'a:b:c')",
    ),
    (body(n=9), "n must be between 1 and 8 (got 9)"),
    (body(steps=8), "unknown field 'steps'; did you mean num_inference_steps?"),
    (body(guidance=8), "unknown field 'guidance'; did you mean guidance_scale?"),
    (body(respons_format="png"), "unknown field 'respons_format'; did you mean response_format?"),
    (body(promt="x"), "unknown field 'promt'; did you mean prompt?"),
    (body(**{"seed ": 1}), "unknown field 'seed '; did you mean seed?"),
    (
        body(control_images=["x"]),
        """control_images must be {"image": X} or a list of such, X a data URL or base64""",
    ),
    ("[1]", "the body must be a JSON object (got an array)"),
    ("", "the body is empty; send a JSON object"),
    ('{"a": 1, "a": 2}', "the key 'a' stands twice in the body; send it once"),
    ('{"a": NaN}', "the body has NaN, which is not JSON; send a finite number or null"),
    ('{"a": }', "the body is not valid JSON: Expecting value at line 1, column 7"),
]


@pytest.mark.parametrize(("raw", "message"), MESSAGES)
def test_messages_say_what_was_wrong_the_value_and_the_limit(raw: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(raw.encode())
    assert caught.value.message == message


@pytest.mark.parametrize(
    "field", ["model", "response_format", "num_inference_steps", "guidance_scale", "seed"]
)
def test_no_more_than_two_hundred_characters_of_a_value_come_back(field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(body(**{field: "z" * 5000}).encode())
    assert "z" * 150 in caught.value.message
    assert "z" * (MAX_ECHO + 1) not in caught.value.message


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(KNOWN_FIELDS) | st.text(max_size=8), JSON_VALUES))
def test_any_object_is_either_taken_or_refused_in_words(values: dict[str, Any]) -> None:
    raw = json.dumps(values).replace("Infinity", "1e999").encode()
    try:
        taken = parse_body(raw)
    except InvalidRequestError as error:
        assert error.message  # noqa: PT017 - either outcome is right
        return
    assert parse_body(taken.model_dump_json().encode()) == taken


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_in_words(raw: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        parse_body(raw)


# ---------------------------------------------------------------- three states


def test_the_six_fixed_fields_come_first_in_the_contracts_order() -> None:
    assert KNOWN_FIELDS[:6] == (
        "model",
        "num_inference_steps",
        "prompt",
        "guidance_scale",
        "response_format",
        "seed",
    )


@pytest.mark.parametrize("field", KNOWN_FIELDS[3:])
def test_absent_and_null_are_kept_apart(field: str) -> None:
    absent, null = parse_body(body().encode()), parse_body(body(**{field: None}).encode())
    assert getattr(absent, field) is MISSING
    assert getattr(null, field) is None
    assert field not in absent.model_dump()
    assert null.model_dump()[field] is None
    assert absent != null


def test_what_is_unset_is_not_sent() -> None:
    assert json.loads(make_body(GOOD).model_dump_json()) == GOOD
    sent = json.loads(make_body(GOOD | {"seed": None, "guidance_scale": 7, "n": MISSING}).model_dump_json())
    assert sent == GOOD | {"seed": None, "guidance_scale": 7.0}


def test_the_prompt_is_trimmed() -> None:
    taken = parse_body(body(prompt="\n a cat\t", negative_prompt=" dog ").encode())
    assert (taken.prompt, taken.negative_prompt) == ("a cat", "dog")


def test_a_body_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        make_body(GOOD).seed = 3  # type: ignore[misc]


def test_the_number_of_images_is_one_unless_asked() -> None:
    assert [make_body(GOOD | {"n": n}).num_images for n in (MISSING, None, 1, 8)] == [1, 1, 1, 8]


def test_model_splits_into_endpoint_and_route() -> None:
    assert split_model("emoji") == ("emoji", None)
    assert split_model("emoji:noto") == ("emoji", "noto")


def test_the_nearest_name_is_found_or_none() -> None:
    assert nearest("guidence_scale", KNOWN_FIELDS) == "guidance_scale"
    assert nearest("zzzz", KNOWN_FIELDS) is None
    assert nearest("", KNOWN_FIELDS) is None


def test_parse_json_serves_other_dialects() -> None:
    assert parse_json(b'{"quality": "hd"}') == {"quality": "hd"}


# ---------------------------------------------------------------- the published schemas


def test_the_request_schema_says_what_the_parser_does() -> None:
    schema = DedicatedImageGenerationBody.model_json_schema()
    assert schema["required"] == ["model", "num_inference_steps", "prompt"]
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == list(KNOWN_FIELDS)
    formats, null = schema["properties"]["response_format"]["anyOf"]
    assert formats["enum"] == list(get_args(DedicatedImageGenerationBodyResponseFormat))
    assert null == {"type": "null"}
    assert all("description" in field for field in schema["properties"].values())


BEYOND_JSON_SCHEMA = (
    body(num_inference_steps=20.0),  # an integer to JSON Schema
    body(seed=MAX_SEED, n=2),
    body(prompt=" \n" + "x" * 10_000 + "\t "),  # counted after trimming
)


def test_the_request_schema_agrees_with_the_parser() -> None:
    validator = jsonschema_rs.Draft202012Validator(DedicatedImageGenerationBody.model_json_schema())
    checked = 0
    for raw, status, code, _ in BODIES:
        if isinstance(raw, bytes) or code in ("invalid_json", "duplicate_key") or raw in BEYOND_JSON_SCHEMA:
            continue
        if "\\ud" in raw:  # half a surrogate pair is not Unicode
            continue
        assert validator.is_valid(json.loads(raw)) == (status == 200), raw[:100]
        checked += 1
    assert checked > 80


@pytest.mark.parametrize("model", [DedicatedImageGenerationBody, ImageGenerationAnswer, ErrorBody])
def test_the_examples_are_valid(model: type[DedicatedImageGenerationBody]) -> None:
    examples = model.model_json_schema()["examples"]
    assert examples
    for example in examples:
        assert json.loads(model.model_validate(example).model_dump_json()) == example


# ---------------------------------------------------------------- answers and errors

ITEM = {"seed": 3, "response_format": "png", "b64_json": "aGk="}


def test_an_item_has_a_url_or_base64_and_never_both() -> None:
    assert "url" not in ImageItem.model_validate(ITEM).model_dump()
    for wrong in (ITEM | {"url": "http://x"}, {"seed": 3, "response_format": "url"}):
        with pytest.raises(ValidationError, match="either url or b64_json"):
            ImageItem.model_validate(wrong)


def test_answers_of_other_servers_are_read() -> None:
    item = ITEM | {"url": None, "revised_prompt": "a cat"}
    answer = ImageGenerationAnswer.model_validate({"data": [item], "extra": 1, "usage": None})
    assert answer.data[0].seed == 3
    assert json.loads(answer.model_dump_json()) == {"data": [ITEM], "warnings": []}


def test_additions_of_another_shape_count_as_absent() -> None:
    item = ITEM | {"timings": {"inference": 1.2}, "width": "wide"}
    answer = ImageGenerationAnswer.model_validate({"data": [item], "usage": {"tokens": 5}, "id": 7})
    assert json.loads(answer.model_dump_json()) == {"data": [ITEM], "warnings": []}
    assert answer.data[0].timings is answer.usage is MISSING


def test_the_error_body_is_the_contracts() -> None:
    error = QueueFullError("too many", param="model", request_id="req_1")
    assert ErrorBody.of(error).model_dump() == {
        "error": {"message": "too many", "type": "rate_limit_error", "param": "model", "code": "queue_full"},
        "detail": "too many",
        "request_id": "req_1",
    }
    assert ErrorBody.of(MezzotintError("x"), "req_2").request_id == "req_2"


def test_a_request_state_leaves_out_what_is_not_known() -> None:
    state = RequestState(id="req_1", status="queued", position=2)
    assert json.loads(state.model_dump_json()) == {"id": "req_1", "status": "queued", "position": 2}
