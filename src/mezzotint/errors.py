"""Every error that Mezzotint raises or answers with, as one tree.

    MezzotintError
    ├── AuthenticationError      401  missing_api_key, invalid_api_key
    ├── PermissionDeniedError    403  forbidden_endpoint, forbidden, invalid_signature, forbidden_origin
    ├── NotFoundError            404  not_found, endpoint_not_found, adapter_not_found, request_not_found
    ├── MethodNotAllowedError    405  method_not_allowed
    ├── BodyTimeoutError         408  body_timeout
    ├── ConflictError            409  conflict
    ├── GoneError                410  url_expired
    ├── BodyTooLargeError        413  body_too_large
    ├── UnsupportedMediaError    415  unsupported_media_type
    ├── MisdirectedError         421  wrong_host
    ├── InvalidRequestError      422  invalid_json, duplicate_key, unknown_field, missing_field, invalid_type, invalid_value, out_of_range, not_supported, invalid_image
    ├── QueueFullError           429  queue_full                      retryable
    ├── RateLimitError           429  rate_limited, quota_exceeded    retryable
    ├── RequestCancelledError    499  request_cancelled
    ├── GenerationError          500  generation_failed, out_of_memory, worker_crashed
    ├── InternalError            500  internal_error
    ├── UnavailableError         503  endpoint_starting, endpoint_failed, endpoint_stopped, server_stopping, database_unavailable
    ├── StorageFullError         507  storage_full
    ├── DeadlineError            504  deadline_exceeded
    ├── ModelLoadError           the worker could not build the model (never an HTTP answer of its own)
    ├── ConfigError              a setting stops the start (exit code 2)
    └── ConnectionFailedError    client side: the server could not be reached   retryable

The server turns these into the one error body of the contract; the SDK turns that body back into these.
"""  # noqa: E501 - the documentation's table is read from one line for each class

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import ClassVar

MAX_ECHO = 200
"""Most characters of a caller's value that a message may repeat."""


class MezzotintError(Exception):
    """The root; `message` says what was wrong, the value, the limit and the next step."""

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after = retry_after
        """Seconds after which the same request is worth sending again, where known."""
        self.request_id = request_id


class AuthenticationError(MezzotintError):
    status = 401
    default_code = "invalid_api_key"


class PermissionDeniedError(MezzotintError):
    status = 403
    default_code = "forbidden_endpoint"


class NotFoundError(MezzotintError):
    status = 404
    default_code = "not_found"


class MethodNotAllowedError(MezzotintError):
    status = 405
    default_code = "method_not_allowed"


class BodyTimeoutError(MezzotintError):
    status = 408
    default_code = "body_timeout"


class ConflictError(MezzotintError):
    status = 409
    default_code = "conflict"


class GoneError(MezzotintError):
    status = 410
    default_code = "url_expired"


class BodyTooLargeError(MezzotintError):
    status = 413
    default_code = "body_too_large"


class UnsupportedMediaError(MezzotintError):
    status = 415
    default_code = "unsupported_media_type"


class MisdirectedError(MezzotintError):
    status = 421
    default_code = "wrong_host"


class InvalidRequestError(MezzotintError):
    status = 422
    default_code = "invalid_value"


class QueueFullError(MezzotintError):
    status = 429
    default_code = "queue_full"
    retryable = True


class RateLimitError(MezzotintError):
    status = 429
    default_code = "rate_limited"
    retryable = True


class RequestCancelledError(MezzotintError):
    status = 499
    default_code = "request_cancelled"


class GenerationError(MezzotintError):
    status = 500
    default_code = "generation_failed"


class InternalError(MezzotintError):
    status = 500
    default_code = "internal_error"


class UnavailableError(MezzotintError):
    status = 503
    default_code = "endpoint_starting"
    retryable = True


class StorageFullError(MezzotintError):
    status = 507
    default_code = "storage_full"


class DeadlineError(MezzotintError):
    status = 504
    default_code = "deadline_exceeded"


class ModelLoadError(MezzotintError):
    """A model or adapter could not be loaded; `permanent` tells whether trying again could help."""

    default_code = "model_load_failed"

    def __init__(self, message: str, *, code: str | None = None, permanent: bool = True) -> None:
        super().__init__(message, code=code)
        self.permanent = permanent


class ConfigError(MezzotintError):
    default_code = "invalid_setting"


class ConnectionFailedError(MezzotintError):
    status = 0
    default_code = "connection_failed"
    retryable = True


_BY_STATUS: Mapping[int, type[MezzotintError]] = {
    cls.status: cls
    for cls in (
        AuthenticationError,
        PermissionDeniedError,
        NotFoundError,
        MethodNotAllowedError,
        BodyTimeoutError,
        ConflictError,
        GoneError,
        BodyTooLargeError,
        UnsupportedMediaError,
        MisdirectedError,
        InvalidRequestError,
        RateLimitError,
        RequestCancelledError,
        InternalError,
        UnavailableError,
        StorageFullError,
        DeadlineError,
    )
}
_BY_CODE: Mapping[str, type[MezzotintError]] = {
    "queue_full": QueueFullError,
    "generation_failed": GenerationError,
    "out_of_memory": GenerationError,
    "worker_crashed": GenerationError,
    "endpoint_starting": UnavailableError,
    "endpoint_failed": UnavailableError,
    "endpoint_stopped": UnavailableError,
    "server_stopping": UnavailableError,
    "database_unavailable": UnavailableError,
    "deadline_exceeded": DeadlineError,
    "request_cancelled": RequestCancelledError,
    "storage_full": StorageFullError,
}


def error_class(status: int, code: str | None) -> type[MezzotintError]:
    """The class that an answer with this HTTP status and error code stands for."""
    if code is not None and code in _BY_CODE:
        return _BY_CODE[code]
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return InternalError if status >= 500 else InvalidRequestError


def error_type(status: int) -> str:
    """The `type` of the error body, in the words of OpenAI's API."""
    table = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    return table.get(status, "server_error" if status >= 500 else "invalid_request_error")


def echo(value: object) -> str:
    """A caller's value for a message: cut to MAX_ECHO characters."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_ECHO else text[: MAX_ECHO - 1] + "…"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be: the closest, else one that contains it."""
    name, names = name.lower()[:MAX_ECHO], {other.lower(): other for other in known}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    holding = [other for other in names if len(name) >= 4 and (name in other or other in name)]
    return next((names[other] for other in close + holding), None)
