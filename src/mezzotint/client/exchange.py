"""What Client and AsyncClient share: building calls, reading answers, deciding on retries. No I/O here.

A conversation with the server is a generator that yields what it needs (a call to make, or seconds to wait)
and is resumed with the outcome; each client drives it in its own way.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import functools
import json
import os
import random
import ssl
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, Self, TypeAlias, TypedDict, TypeVar
from urllib.parse import quote, urljoin

import httpx2
from pydantic import MISSING, BaseModel, ValidationError

from mezzotint import __version__
from mezzotint.client.picture_files import picture_text
from mezzotint.client.results import (
    Completed,
    Event,
    GeneratedImage,
    Generation,
    Preview,
    Progress,
    bad_answer,
    or_none,
)
from mezzotint.edit_body import DedicatedImageEditBody
from mezzotint.errors import (
    MAX_ECHO,
    ConfigError,
    ConnectionFailedError,
    DeadlineError,
    MezzotintError,
    RequestCancelledError,
    echo,
    error_class,
)
from mezzotint.schemas import (
    DedicatedImageGenerationBody,
    DedicatedImageGenerationBodyResponseFormat,
    ErrorBody,
    ErrorDetail,
    ImageGenerationAnswer,
    PreviewEvent,
    RequestState,
    make_body,
)

DEFAULT_BASE_URL = "http://127.0.0.1:8000"
URL_VARIABLES = ("MEZZOTINT_URL", "MEZZOTINT_BASE_URL")
"""Environment variables that name a server; the second is the name of 0.1.0."""
CONCURRENCY = 8
MAX_EVENT_BYTES = 256 * 2**20
"""Largest server-sent event: up to eight pictures travel in the last one."""
CONNECT_TIMEOUT_S = 5.0
TIMEOUT_S = 600.0
"""How long a picture may take; the server's own deadline is the same by default."""
MAX_RETRIES = 4
BACKOFF_S = 0.5
MAX_BACKOFF_S = 8.0
MAX_RETRY_AFTER_S = 120.0
"""A server that asks for a longer wait is not waited for: the error says how long it would be."""
GENERATIONS = "/dedicated/v1/images/generations"
EDITS = "/dedicated/v1/images/edits"
_PICTURE_FIELDS = ("image", "mask", "control_images")

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
PictureSource: TypeAlias = "str | Path | bytes | Image"
"""A path, a file's bytes, a picture of Pillow's, or a data URL."""


class ImageFields(TypedDict, total=False):
    """The fields of DedicatedImageGenerationBody; one that is left out, or MISSING, is not sent."""

    model: Required[str]
    num_inference_steps: Required[int]
    prompt: Required[str]
    guidance_scale: float | MISSING | None
    response_format: DedicatedImageGenerationBodyResponseFormat | MISSING | None
    seed: int | MISSING | None
    n: int | MISSING | None
    width: int | MISSING | None
    height: int | MISSING | None
    negative_prompt: str | MISSING | None
    adapters: Sequence[Mapping[str, str | float | None]] | MISSING | None
    """Objects with `route` and, for a strength that is not the adapter's own, `scale`."""
    control_images: Sequence[PictureSource] | MISSING | None
    controlnet_weights: Sequence[float] | MISSING | None
    image: PictureSource | Sequence[PictureSource]
    """With it the request is an edit, and has the fields of DedicatedImageEditBody."""
    mask: PictureSource | MISSING | None
    strength: float | MISSING | None


class EditFields(TypedDict, total=False):
    """The fields of an edit, which needs a picture and has 20 steps when none are named."""

    model: Required[str]
    prompt: Required[str]
    image: Required[PictureSource | Sequence[PictureSource]]
    mask: PictureSource | MISSING | None
    strength: float | MISSING | None
    num_inference_steps: int
    guidance_scale: float | MISSING | None
    response_format: DedicatedImageGenerationBodyResponseFormat | MISSING | None
    seed: int | MISSING | None
    n: int | MISSING | None
    width: int | MISSING | None
    height: int | MISSING | None
    negative_prompt: str | MISSING | None
    adapters: Sequence[Mapping[str, str | float | None]] | MISSING | None


@dataclass(frozen=True, slots=True)
class Send:
    """A call to make, with the time it may take (None: the client's)."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    content: bytes | None = None
    timeout_s: float | None = None


Steps = Generator[Send | float, httpx2.Response | MezzotintError | None, T]
"""Yields a call and is resumed with its response or connection error, or yields seconds to wait."""


@dataclass(frozen=True, slots=True)
class Options:
    """What every call of one client has in common; `fetch` gets the file behind a picture's URL."""

    base_url: str
    api_key: str | None = field(repr=False)
    timeout_s: float
    max_retries: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    fetch: Callable[[str], bytes] | None = None

    @classmethod
    def given(
        cls,
        base_url: str | None,
        api_key: str | None,
        timeout_s: float,
        max_retries: int,
        headers: Mapping[str, str] | None,
    ) -> Self:
        """Arguments first, then MEZZOTINT_URL and MEZZOTINT_API_KEY, then a server on this machine."""
        named = (os.environ.get(name) for name in URL_VARIABLES)
        base_url = base_url or next(filter(None, named), DEFAULT_BASE_URL)
        api_key = (api_key or os.environ.get("MEZZOTINT_API_KEY") or "").strip() or None
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url must begin with http:// or https:// (got {echo(base_url)})")
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key has characters that no key has; copy it again")
        return cls(base_url.rstrip("/"), api_key, timeout_s, max_retries, headers or {})

    def http(self) -> dict[str, Any]:
        """Arguments of the HTTP client; the key is not among them, for not every URL may see it."""
        return {
            "headers": {"User-Agent": f"mezzotint/{__version__}"},
            "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=100),
            "verify": _certificates(),
        }

    def arguments(self, send: Send) -> dict[str, Any]:
        """Arguments of one HTTP request."""
        timeout_s = self.timeout_s if send.timeout_s is None else send.timeout_s
        return {
            "method": send.method,
            "url": send.url,
            "headers": send.headers,
            "content": send.content,
            "timeout": httpx2.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
        }

    def own(self, method: str, path: str, **more: Any) -> Send:
        """A call to the server itself, with the key."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        headers = {**key, **self.headers, **more.pop("headers", {})}
        return Send(method, self.base_url + path, headers=headers, **more)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The trusted certificates; reading them is most of the work of making a client, so it is done once."""
    return httpx2.create_ssl_context()


def build_request(
    options: Options,
    fields: ImageFields,
    *,
    timeout_s: float | None = None,
    idempotency_key: str | None = None,
    prefer: str | None = None,
) -> Send:
    """The POST for these fields; InvalidRequestError, as the server would say it, before anything is sent."""
    path, content = _content(fields)
    headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key or uuid.uuid4().hex}
    if prefer:
        headers["Prefer"] = prefer
    return options.own("POST", path, headers=headers, content=content, timeout_s=timeout_s)


def _content(fields: Mapping[str, Any]) -> tuple[str, bytes]:
    """The route for these fields, and the body: with `image` it is an edit."""
    edits = "image" in fields
    values, pictures = dict(fields), dict[str, Any]()
    for name in _PICTURE_FIELDS:
        if fields.get(name, MISSING) not in (None, MISSING):
            given = fields[name]
            entries = given if isinstance(given, list | tuple) and name != "mask" else [given]
            forms = [{"image": picture_text(each, name)} for each in entries]
            values[name] = pictures[name] = forms[0] if name == "mask" else forms
    if isinstance(values.get("controlnet_weights"), tuple):
        values["controlnet_weights"] = list(values["controlnet_weights"])
    body = make_body(values, DedicatedImageEditBody if edits else DedicatedImageGenerationBody)
    dumped = body.model_dump(mode="json", exclude=set(pictures)) | pictures
    return EDITS if edits else GENERATIONS, json.dumps(dumped).encode()


def read_error(response: httpx2.Response) -> MezzotintError | None:
    """The error that a response stands for, None for a success; foreign bodies are read where possible."""
    if response.is_success:
        return None
    code = param = request_id = None
    message = f"HTTP {response.status_code}: {response.text[:MAX_ECHO] or 'no message'}"
    try:
        body = response.json()
        found = body.get("error", body)
        if isinstance(found, dict):
            texts = (found.get("message"), found.get("detail"), body.get("detail"))
            message = next((text for text in texts if isinstance(text, str) and text), message)
            code, param, request_id = found.get("code"), found.get("param"), body.get("request_id")
        elif isinstance(found, str):
            message = found
    except (ValueError, AttributeError):
        pass
    cls = error_class(response.status_code, code if isinstance(code, str) else None)
    return cls(
        message,
        code=code if isinstance(code, str) else None,
        param=param if isinstance(param, str) else None,
        retry_after=read_retry_after(response.headers.get("retry-after"), time.time()),
        request_id=request_id if isinstance(request_id, str) else response.headers.get("x-request-id"),
    )


def raise_for_error(response: httpx2.Response) -> None:
    error = read_error(response)
    if error is not None:
        raise error


def read_retry_after(text: str | None, now: float) -> float | None:
    """Seconds that a Retry-After header asks for: a number or a date; None if it says neither."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(text))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    return None


def retry_delay(error: MezzotintError, attempt: int, max_retries: int, jitter: float) -> float | None:
    """Seconds until retry `attempt` (counted from 0), None for no retry; `jitter` is random in [0, 1)."""
    if not error.retryable or attempt >= max_retries:
        return None
    backoff = min(MAX_BACKOFF_S, BACKOFF_S * 2.0**attempt)
    if error.retry_after is None:
        return backoff * (0.5 + jitter / 2)
    return error.retry_after + jitter * BACKOFF_S if error.retry_after <= MAX_RETRY_AFTER_S else None


def connection_error(error: httpx2.TransportError, call: Send) -> MezzotintError:
    """A failed call in our own words; only an answer that takes too long is not worth trying again."""
    if isinstance(error, httpx2.ReadTimeout):
        return DeadlineError("the server did not answer in time; raise `timeout` or ask for fewer steps")
    reason = str(error) or type(error).__name__
    address = call.url.partition("?")[0]  # what follows may be a signature
    return ConnectionFailedError(f"{call.method} {address}: {reason}; is the server running at this address?")


M = TypeVar("M", bound=BaseModel)


def _read(model: type[M], content: bytes | str) -> M:
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise bad_answer(f"something that is no {model.__name__} ({where}: {first['msg']})") from None


def _generation(options: Options, answer: ImageGenerationAnswer, request_id: str | None = None) -> Generation:
    own_id = or_none(answer.id)
    return Generation(
        data=[GeneratedImage(item, options.fetch) for item in answer.data],
        id=own_id,
        created=or_none(answer.created),
        usage=or_none(answer.usage),
        warnings=answer.warnings,
        request_id=request_id or own_id,
    )


def exchange(call: Send, max_retries: int) -> Steps[httpx2.Response]:
    """One call with its retries; raises the last error."""
    attempt = 0
    while True:
        outcome = yield call
        assert outcome is not None
        error = outcome if isinstance(outcome, MezzotintError) else read_error(outcome)
        if error is None:
            assert isinstance(outcome, httpx2.Response)
            return outcome
        delay = retry_delay(error, attempt, max_retries, random.random())
        if delay is None:
            raise error
        yield delay
        attempt += 1


def generate(options: Options, call: Send) -> Steps[Generation]:
    response = yield from exchange(call, options.max_retries)
    answer = _read(ImageGenerationAnswer, response.content)
    return _generation(options, answer, response.headers.get("x-request-id"))


def submit(options: Options, call: Send) -> Steps[str | Generation]:
    """The ID of the accepted request, or its result from a server that answers only when done."""
    response = yield from exchange(call, options.max_retries)
    if response.status_code == httpx2.codes.ACCEPTED:
        return _read(RequestState, response.content).id
    answer = _read(ImageGenerationAnswer, response.content)
    return _generation(options, answer, response.headers.get("x-request-id"))


def _request_path(request_id: str) -> str:
    return f"/dedicated/v1/requests/{quote(request_id, safe='')}"


def request_state(options: Options, method: str, request_id: str) -> Steps[RequestState]:
    response = yield from exchange(options.own(method, _request_path(request_id)), options.max_retries)
    return _read(RequestState, response.content)


def fetch(options: Options, url: str) -> Steps[bytes]:
    """The file behind a picture's URL. The signature in it is the permission; the key is not sent along."""
    response = yield from exchange(Send("GET", urljoin(options.base_url + "/", url)), options.max_retries)
    return response.content


def error_from_detail(detail: ErrorDetail, request_id: str) -> MezzotintError:
    """The error of a request that failed after it was accepted."""
    cls = error_class(500 if detail.type == "server_error" else 422, detail.code)
    return cls(detail.message, code=detail.code, param=detail.param, request_id=request_id)


_TOLD = (
    "position", "step", "num_steps", "seconds_left", "picture", "num_pictures", "picture_step",
    "num_picture_steps",
)  # fmt: skip
"""The fields that Progress has under the name that RequestState gives them."""


def read_event(
    options: Options, request_id: str, sse: httpx2.ServerSentEvent
) -> Event | MezzotintError | None:
    """What to hand on for one server-sent event, the error that ends the request, or None: unknown name."""
    if sse.event == "progress":
        state = _read(RequestState, sse.data)
        said = {name: or_none(getattr(state, name)) for name in _TOLD}
        if (loading := or_none(state.loading)) is not None:
            said |= {"loading": loading.stage, "loading_fraction": or_none(loading.fraction)}
        return Progress(state.status, **said)
    if sse.event == "preview":
        preview = _read(PreviewEvent, sse.data)
        return Preview(preview.index, preview.step, base64.b64decode(preview.b64_json))
    if sse.event == "done":
        return Completed(_generation(options, _read(ImageGenerationAnswer, sse.data), request_id))
    if sse.event == "failed":
        body = _read(ErrorBody, sse.data)
        return error_from_detail(body.error, request_id)
    if sse.event == "cancelled":
        return RequestCancelledError(f"request {request_id} was cancelled", request_id=request_id)
    return None


class Watch:
    """Following a request's events over lost connections."""

    def __init__(self, options: Options, request_id: str) -> None:
        self.send = options.own(
            "GET", f"{_request_path(request_id)}/events", headers={"Accept": "text/event-stream"}
        )
        self._options = options
        self._request_id = request_id
        self._attempt = 0

    def read(self, sse: httpx2.ServerSentEvent) -> Event | None:
        """The event to hand on, if any; raises the error that ended the request."""
        self._attempt = 0
        event = read_event(self._options, self._request_id, sse)
        if isinstance(event, MezzotintError):
            raise event
        return event

    def pause_s(self, failure: httpx2.TransportError | None) -> float:
        """Seconds until the events are asked for again; raises when that was tried often enough."""
        if failure is None:
            error: MezzotintError = ConnectionFailedError("the server closed the events before the last one")
        else:
            error = connection_error(failure, self.send)
        delay = retry_delay(error, self._attempt, self._options.max_retries, random.random())
        if delay is None:
            raise error
        self._attempt += 1
        return delay


def prepare(
    options: Options, requests: Iterable[ImageFields], return_errors: bool
) -> list[Send | MezzotintError]:
    """All requests checked before the first is sent; a bad one is raised, or stands in its place."""
    prepared: list[Send | MezzotintError] = []
    for fields in requests:
        try:
            prepared.append(build_request(options, fields))
        except MezzotintError as error:
            if not return_errors:
                raise
            prepared.append(error)
    return prepared


def prefer_async(previews: int) -> str:
    return f"respond-async, previews={previews}" if previews else "respond-async"
