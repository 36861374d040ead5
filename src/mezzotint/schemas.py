"""The wire contract as types: what a request may say, what an answer and an error look like.

`parse_body` is the one way from bytes to a request. It checks in a fixed order, so the first fault found is
always the same one: the JSON itself, unknown fields, fields in the contract's order, then rules over several.
Optional and nullable fields have three states: unset (`MISSING`, not sent), None and a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Final, Literal, Self, get_args

from pydantic import (
    MISSING,
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from mezzotint.adapter_uses import AdaptersField, uses_of
from mezzotint.errors import MAX_ECHO, InvalidRequestError, MezzotintError, echo, error_type, nearest
from mezzotint.picture_fields import Pictures
from mezzotint.schema_examples import ANSWER_EXAMPLE, ERROR_EXAMPLE, REQUEST_EXAMPLES
from mezzotint.spec import ID_PATTERN, LIMITS, MAX_SEED, ImageSpec, between

MAX_PROMPT = 10_000
"""Most characters of a prompt after trimming."""
MAX_FOREIGN_PROMPT = 32_000
"""The same where OpenAI's limit is what clients expect."""
MAX_FOREIGN_IMAGES = 10
MAX_MESSAGE = 2000
"""Most characters of an error's message on the wire."""

DedicatedImageGenerationBodyResponseFormat = Literal["url", "raw", "png", "jpeg", "jpg"]
_NOT_BLANK = r"^[^\u0000]*[^\s\u0000][^\u0000]*$"
_NO_NUL = r"^[^\u0000]*$"
_HALF_A_PAIR: Final = "must be valid Unicode; it has half of a surrogate pair"

RequestStatus = Literal["queued", "running", "done", "failed", "cancelled"]


_Steps = Annotated[int, between("num_inference_steps")]
_Guidance = Annotated[float, between("guidance_scale")]
_Seed = Annotated[int, between("seed")]
_Count = Annotated[int, between("n")]
_Side = Annotated[int, between("width")]
_Weights = list[Annotated[float, between("controlnet_weights")]]


def _plain_text(most: int) -> AfterValidator:
    """Trims; refuses NUL, half of a surrogate pair, and more than `most` characters."""

    def check(text: str) -> str:
        if "\0" in text:
            raise PydanticCustomError("invalid_value", "must not contain a NUL character; remove it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise PydanticCustomError("invalid_value", _HALF_A_PAIR) from None
        text = text.strip()
        if len(text) > most:
            limit = {"most": most, "got": len(text)}
            raise PydanticCustomError(
                "out_of_range", "must have at most {most} characters after trimming (got {got})", limit
            )
        return text

    return AfterValidator(check)


def _not_empty(text: str) -> str:
    if not text:
        raise PydanticCustomError("out_of_range", "must have at least 1 character after trimming (got 0)")
    return text


_NegativePrompt = Annotated[str, _plain_text(MAX_PROMPT)]
_Prompt = Annotated[_NegativePrompt, AfterValidator(_not_empty)]


_ASIDE = {"images", "mask", "strength", "control_images", "adapters"}
_SPEC_FIELDS = set(ImageSpec.__dataclass_fields__) - _ASIDE
"""Fields of a request in words that a spec has by the same name."""


class DedicatedImageGenerationBody(BaseModel):
    """Body of `POST /dedicated/v1/images/generations`."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, json_schema_extra={"examples": REQUEST_EXAMPLES}
    )

    model: str = Field(
        pattern=f"^{ID_PATTERN}(:{ID_PATTERN})?$",
        description="ID of the target endpoint: `ENDPOINT_ID`, or `ENDPOINT_ID:ADAPTER_ROUTE`.",
        examples=["emoji"],
    )
    num_inference_steps: _Steps = Field(
        description="Number of inference steps; supported range [1, 50].", examples=[8]
    )
    prompt: _Prompt = Field(
        description="Text description of the desired image(s); 1 to 10,000 characters after trimming.",
        examples=["a smiling cat"],
        json_schema_extra={"minLength": 1, "maxLength": MAX_PROMPT, "pattern": _NOT_BLANK},
    )
    guidance_scale: _Guidance | MISSING | None = Field(
        default=MISSING,
        description="How closely the image follows the prompt: higher (8-10) more faithful, lower (1-5) "
        "freer. May be irrelevant for some models, such as FLUX.Schnell; the answer then has a warning.",
        examples=[4.0],
    )
    response_format: DedicatedImageGenerationBodyResponseFormat | MISSING | None = Field(
        default=MISSING, description="Form of the picture in the answer; `url` when unset.", examples=["png"]
    )
    seed: _Seed | MISSING | None = Field(
        default=MISSING, description="The seed to use; a random one when unset.", examples=[123]
    )
    n: _Count | MISSING | None = Field(
        default=MISSING, description="Number of images; image i uses seed + i. 1 when unset.", examples=[1]
    )
    width: _Side | MISSING | None = Field(
        default=MISSING, description="Width in pixels; the endpoint's own when unset.", examples=[128]
    )
    height: _Side | MISSING | None = Field(
        default=MISSING, description="Height in pixels; the endpoint's own when unset.", examples=[128]
    )
    negative_prompt: _NegativePrompt | MISSING | None = Field(
        default=MISSING,
        description="What the image should not show, where the model can take that; up to 10,000 characters.",
        examples=["text"],
        json_schema_extra={"maxLength": MAX_PROMPT, "pattern": _NO_NUL},
    )
    adapters: AdaptersField | MISSING | None = Field(
        default=MISSING,
        description="Adapters used together, each with its strength. The one that `model` names comes first.",
    )
    control_images: Pictures | MISSING | None = Field(
        default=MISSING,
        description="Pictures for the endpoint's ControlNets, in their order, where it has any.",
    )
    controlnet_weights: _Weights | MISSING | None = Field(
        default=MISSING,
        description="How much each of `control_images` counts, 0 to 1; one for each. 1 when unset.",
        examples=[[0.8]],
    )

    limits: ClassVar[Mapping[str, tuple[int, int]]] = LIMITS
    """Smallest and largest values, for error messages."""

    @model_validator(mode="after")
    def _every_seed_is_in_range(self) -> Self:
        if isinstance(self.seed, int) and isinstance(self.n, int) and self.seed + self.n - 1 > MAX_SEED:
            text = f"with n = {self.n} must be at most {MAX_SEED - self.n + 1} (got {self.seed})"
            raise PydanticCustomError("out_of_range", "{text}", {"text": text, "param": "seed"})
        return self

    @property
    def num_images(self) -> int:
        return self.n if isinstance(self.n, int) else 1

    @property
    def spec(self) -> ImageSpec:
        """What is to be drawn, pictures aside; every field that both types have travels by its name."""
        values = self.model_dump(include=_SPEC_FIELDS, exclude_none=True)
        values["controlnet_weights"] = tuple(values.get("controlnet_weights", ()))
        _, route = split_model(self.model)
        return ImageSpec(**values, adapters=uses_of(route, self.adapters))


class ForeignImageGenerationBody(DedicatedImageGenerationBody):
    """The same request in a dialect whose own limits are wider: OpenAI's and AUTOMATIC1111's."""

    limits: ClassVar[Mapping[str, tuple[int, int]]] = {**LIMITS, "n": (1, MAX_FOREIGN_IMAGES)}

    prompt: Annotated[str, _plain_text(MAX_FOREIGN_PROMPT), AfterValidator(_not_empty)] = Field(
        description="Text description of the desired image(s); 1 to 32,000 characters after trimming.",
        json_schema_extra={"minLength": 1, "maxLength": MAX_FOREIGN_PROMPT, "pattern": _NOT_BLANK},
    )
    n: Annotated[int, Field(ge=1, le=MAX_FOREIGN_IMAGES)] | MISSING | None = Field(
        default=MISSING, description="Number of images; image i uses seed + i. 1 when unset."
    )
    negative_prompt: Annotated[str, _plain_text(MAX_FOREIGN_PROMPT)] | MISSING | None = Field(
        default=MISSING,
        description="What the image should not show, where the model can take that.",
        json_schema_extra={"maxLength": MAX_FOREIGN_PROMPT, "pattern": _NO_NUL},
    )


KNOWN_FIELDS = tuple(DedicatedImageGenerationBody.model_fields)
"""The first six are those of every server of this contract; the rest are Mezzotint's own."""


# ---------------------------------------------------------------- answers


class _Answer(BaseModel):
    """Unknown fields are ignored and null counts as absent, so that answers of other servers can be read."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


def _or_absent(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """What we add to an answer may mean something else on another server: then it counts as absent."""
    try:
        return handler(value)
    except ValidationError:
        return MISSING


class ImageTimings(_Answer):
    """Milliseconds: waiting for a worker, denoising and decoding, turning pixels into a file."""

    queue_ms: float
    generate_ms: float
    encode_ms: float
    adapter_load_ms: float | MISSING = MISSING
    """What of `generate_ms` it took to load the adapter; absent where it was in memory."""


class ImageItem(_Answer):
    """One picture: either `url` or `b64_json`, never both."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["url"]}, {"required": ["b64_json"]}]},
    )

    seed: int = Field(description="The seed that gives this picture again.")
    response_format: DedicatedImageGenerationBodyResponseFormat = Field(
        description="As asked; `url` when none was asked for."
    )
    url: str | MISSING = Field(default=MISSING, description="Where the PNG can be fetched until it expires.")
    b64_json: str | MISSING = Field(
        default=MISSING, description="Base64 of the file, or of the bare pixels for `raw`."
    )
    width: int | MISSING = Field(default=MISSING, description="Pixels.")
    height: int | MISSING = Field(default=MISSING, description="Pixels.")
    mime_type: str | MISSING = MISSING
    timings: ImageTimings | MISSING = MISSING
    channels: int | MISSING = Field(default=MISSING, description="Only for `raw`: 3, or 4 with alpha.")
    dtype: str | MISSING = Field(default=MISSING, description="Only for `raw`: uint8.")
    layout: str | MISSING = Field(
        default=MISSING,
        description="Only for `raw`: HWC, row-major red, green, blue, and alpha where there are 4.",
    )

    _optional = field_validator("width", "height", "mime_type", "timings", mode="wrap")(_or_absent)

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.url is MISSING) == (self.b64_json is MISSING):
            raise ValueError("an item has either url or b64_json")
        return self


class Usage(_Answer):
    """What the request cost: pictures made and denoising steps run, over all pictures."""

    images: int
    steps: int


class ImageGenerationAnswer(_Answer):
    """Answer of `POST /dedicated/v1/images/generations`."""

    model_config = ConfigDict(json_schema_extra={"examples": [ANSWER_EXAMPLE]})

    created: int | MISSING = Field(default=MISSING, description="Unix time in seconds.")
    id: str | MISSING = MISSING
    data: list[ImageItem] = Field(min_length=1)
    usage: Usage | MISSING = MISSING
    warnings: list[str] = []

    _optional = field_validator("created", "id", "usage", mode="wrap")(_or_absent)


class ErrorDetail(BaseModel):
    """What went wrong: `message` for people, `code` for programs, `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The one error body."""

    model_config = ConfigDict(json_schema_extra={"examples": [ERROR_EXAMPLE]})

    error: ErrorDetail
    detail: str
    request_id: str | None

    @classmethod
    def of(cls, error: MezzotintError, request_id: str | None = None) -> Self:
        """The body for `error`."""
        message = (
            error.message if len(error.message) <= MAX_MESSAGE else error.message[: MAX_MESSAGE - 1] + "…"
        )
        param = None if error.param is None else error.param[:MAX_ECHO]
        detail = ErrorDetail(message=message, type=error_type(error.status), param=param, code=error.code)
        return cls(error=detail, detail=message, request_id=request_id or error.request_id)


class LoadingState(_Answer):
    """What a request's endpoint does before it can begin."""

    stage: str = Field(description="In words for people: `loading the model`.")
    fraction: float | MISSING = Field(
        default=MISSING, description="How much of it is done, 0 to 1, if known."
    )


class RequestState(_Answer):
    """Where a request stands: the answer of `GET /dedicated/v1/requests/{id}`.

    With the header `Prefer: respond-async` (RFC 7240) the generations route answers 202 with this at once;
    `Prefer: respond-async, previews=3` also asks for that many previews of each picture. `.../events` sends
    the same as server-sent events: `progress` (this, whenever it changes), `preview` (PreviewEvent), and as
    the last one exactly one of `done` (ImageGenerationAnswer), `failed` (ErrorBody), `cancelled` (this).
    """

    id: str
    status: RequestStatus
    position: int | MISSING = Field(default=MISSING, description="While queued: how many requests go first.")
    step: int | MISSING = Field(default=MISSING, description="Denoising steps done, over all pictures.")
    num_steps: int | MISSING = Field(default=MISSING, description="Denoising steps to do, over all pictures.")
    picture: int | MISSING = Field(default=MISSING, description="Which picture is being made, from 1.")
    num_pictures: int | MISSING = Field(default=MISSING, description="Pictures of the request.")
    picture_step: int | MISSING = Field(default=MISSING, description="Denoising steps done of that picture.")
    num_picture_steps: int | MISSING = Field(default=MISSING, description="Denoising steps of one picture.")
    loading: LoadingState | MISSING = Field(
        default=MISSING, description="Only while the endpoint's model is not ready."
    )
    seconds_left: float | MISSING = Field(default=MISSING, description="Estimate until the answer is there.")
    result: ImageGenerationAnswer | MISSING = Field(default=MISSING, description="Once done.")
    error: ErrorDetail | MISSING = Field(default=MISSING, description="Once failed.")


class PreviewEvent(_Answer):
    """Event `preview`: the current estimate of the finished picture, as PNG."""

    index: int = Field(description="Which picture of the request, from 0.")
    step: int
    num_steps: int | MISSING = MISSING
    b64_json: str


# ---------------------------------------------------------------- from bytes to a request


def parse_body(raw: bytes) -> DedicatedImageGenerationBody:
    """The request in `raw`; InvalidRequestError says which rule it breaks, with `code` and `param`."""
    return make_body(parse_json(raw))


def make_body(
    values: Mapping[str, Any], kind: type[DedicatedImageGenerationBody] = DedicatedImageGenerationBody
) -> DedicatedImageGenerationBody:
    """The request with these fields; InvalidRequestError as for `parse_body`."""
    known = tuple(kind.model_fields)
    for name in values:
        if name not in known:
            raise unknown_field(name, known)
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise _invalid(error.errors(include_url=False)[0], kind.limits) from None


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`: UTF-8, no key twice, no NaN or Infinity; else InvalidRequestError."""
    try:
        value = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except UnicodeDecodeError as error:
        raise _bad_json(f"the body is not UTF-8 (byte {error.start}); send UTF-8 encoded JSON") from None
    except json.JSONDecodeError as error:
        if not raw.strip():
            raise _bad_json("the body is empty; send a JSON object") from None
        raise _bad_json(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise _bad_json("the body is nested too deeply; send a flat JSON object") from None
    except ValueError:  # Python refuses to read integers of more than 4300 digits
        raise _bad_json("the body has a number with too many digits; send a smaller number") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"the body must be a JSON object (got {shown(value)})", code="invalid_type")
    return value


def split_model(model: str) -> tuple[str, str | None]:
    """Endpoint ID and adapter route (None: no adapter) of a `model` that follows the pattern."""
    endpoint_id, _, route = model.partition(":")
    return endpoint_id, route or None


def unknown_field(name: str, known: Iterable[str]) -> InvalidRequestError:
    """The error for a field that nobody knows; it names the nearest of `known`."""
    hint = nearest(name, known)
    text = f"did you mean {hint}?" if hint else f"known fields are {', '.join(known)}"
    return InvalidRequestError(
        f"unknown field {echo(name)}; {text}", code="unknown_field", param=_printable(name)
    )


def shown(value: object) -> str:
    """A caller's JSON value for a message: short, and never descending into arrays or objects."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str | float) or (isinstance(value, int) and value.bit_length() < 1000):
        return echo(value)
    return {int: "a huge integer", list: "an array", dict: "an object"}.get(type(value), type(value).__name__)


def _printable(name: str) -> str:
    return name[:MAX_ECHO].encode("utf-8", "backslashreplace").decode()[:MAX_ECHO]


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            text = f"the key {echo(name)} stands twice in the body; send it once"
            raise InvalidRequestError(text, code="duplicate_key", param=_printable(name))
        values[name] = value
    return values


def _refuse_constant(name: str) -> float:
    raise _bad_json(f"the body has {name}, which is not JSON; send a finite number or null")


def _bad_json(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, code="invalid_json")


_RANGE = ("out_of_range", "must be between {low} and {high} (got {got})")
_SENTENCES: Mapping[str, tuple[str, str]] = {
    "missing": ("missing_field", "is required"),
    "int_type": ("invalid_type", "must be an integer (got {got})"),
    "float_type": ("invalid_type", "must be a number (got {got})"),
    "string_type": ("invalid_type", "must be a string (got {got})"),
    "greater_than_equal": _RANGE,
    "less_than_equal": _RANGE,
    "finite_number": _RANGE,
    "list_type": ("invalid_type", "must be a list (got {got})"),
    "string_unicode": ("invalid_value", _HALF_A_PAIR),
}
"""Code and message by pydantic's name for the fault."""


def _invalid(fault: ErrorDetails, limits: Mapping[str, tuple[int, int]]) -> InvalidRequestError:
    """pydantic's first complaint in the contract's words."""
    kind, got = fault["type"], fault["input"]
    param = str(fault["loc"][0]) if fault["loc"] else str(fault.get("ctx", {}).get("param"))
    if kind in _SENTENCES:
        code, sentence = _SENTENCES[kind]
        low, high = limits.get(param, (0, 0))
        text = sentence.format(low=low, high=high, got=shown(got))
    elif kind == "literal_error":
        code, text = _no_such_format(got)
    elif kind == "string_pattern_mismatch":
        code, text = "invalid_value", _bad_model(str(got))
    else:  # from our own validators
        code, text = kind, fault["msg"]
    return InvalidRequestError(f"{param} {text}", code=code, param=param)


def _no_such_format(got: object) -> tuple[str, str]:
    names = get_args(DedicatedImageGenerationBodyResponseFormat)
    text = f"must be one of {', '.join(names)} (got {shown(got)})"
    if not isinstance(got, str):
        return "invalid_type", text
    hint = nearest(got, names)
    return "invalid_value", f"{text}; did you mean {hint}?" if hint else text


def _bad_model(got: str) -> str:
    text = "must be ENDPOINT_ID or ENDPOINT_ID:ADAPTER_ROUTE"
    if got.count(":") > 1:
        return f"{text}, with one colon at most (got {shown(got)})"
    form = "1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit"
    return f"{text}, each {form} (got {shown(got)})"
