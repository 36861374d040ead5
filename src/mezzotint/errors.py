"""Every error that Mezzotint raises or answers with: the direct children of MezzotintError.

Each class owns its HTTP status, its codes (the first is the default), and whether the same request is worth
sending again. The server turns an error into the error body of docs/http.md; the SDK turns that body back
into the error. docs/generate.py writes the tables of codes from these classes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

MAX_ECHO = 200
"""Most characters of a caller's value that a message may repeat."""

ADAPTER_CODES = (
    "adapter_load_failed", "adapter_broken", "adapter_wrong_base", "adapter_unsupported", "adapter_too_large",
    "adapter_source_not_found",
)  # fmt: skip
"""Why an adapter was not added. A worker's ModelLoadError reaches the client as InvalidRequestError."""

IMAGE_CODES = (
    "invalid_image", "image_format", "image_damaged", "image_too_large", "image_not_base64",
    "image_url_refused", "image_fetch_failed", "too_many_images", "mask_size",
)  # fmt: skip
"""What can be wrong with a picture that a request brings along."""


class MezzotintError(Exception):
    """The root; `message` says what was wrong, the value, the limit and the next step."""

    status: ClassVar[int] = 500
    codes: ClassVar[tuple[str, ...]] = ("internal_error", "not_fetched")
    """The codes that errors of this class have; the first is the default."""
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
        self.code = code or self.codes[0]
        self.param = param
        self.retry_after = retry_after
        """Seconds after which the same request is worth sending again, where known."""
        self.request_id = request_id


class AuthenticationError(MezzotintError):
    status = 401
    codes = ("invalid_api_key", "missing_api_key")


class PermissionDeniedError(MezzotintError):
    status = 403
    codes = ("forbidden_endpoint", "forbidden", "invalid_signature", "forbidden_origin")


class NotFoundError(MezzotintError):
    status = 404
    codes = ("not_found", "endpoint_not_found", "adapter_not_found", "request_not_found")


class MethodNotAllowedError(MezzotintError):
    status = 405
    codes = ("method_not_allowed",)


class BodyTimeoutError(MezzotintError):
    status = 408
    codes = ("body_timeout",)


class ConflictError(MezzotintError):
    status = 409
    codes = ("conflict",)


class GoneError(MezzotintError):
    status = 410
    codes = ("url_expired",)


class BodyTooLargeError(MezzotintError):
    status = 413
    codes = ("body_too_large",)


class UnsupportedMediaError(MezzotintError):
    status = 415
    codes = ("unsupported_media_type",)


class MisdirectedError(MezzotintError):
    status = 421
    codes = ("wrong_host",)


class InvalidRequestError(MezzotintError):
    status = 422
    codes = (
        "invalid_value", "invalid_json", "invalid_form", "duplicate_key", "ambiguous_length",
        "unknown_field", "missing_field", "invalid_type",
        "out_of_range", "not_supported", *IMAGE_CODES, *ADAPTER_CODES,
    )  # fmt: skip


class QueueFullError(MezzotintError):
    status = 429
    codes = ("queue_full",)
    retryable = True


class RateLimitError(MezzotintError):
    status = 429
    codes = ("rate_limited", "quota_exceeded", "too_many_answers", "too_many_watchers")
    retryable = True


class RequestCancelledError(MezzotintError):
    status = 499
    codes = ("request_cancelled",)


class GenerationError(MezzotintError):
    status = 500
    codes = ("generation_failed", "out_of_memory", "worker_crashed")


class InternalError(MezzotintError):
    """The server made a mistake, or (`invalid_answer`) what answered the SDK is no Mezzotint server."""

    status = 500
    codes = ("internal_error", "invalid_answer")


class UnavailableError(MezzotintError):
    status = 503
    codes = (
        "endpoint_starting", "endpoint_failed", "endpoint_stopped", "workers_unavailable", "server_stopping",
        "database_unavailable", "storage_unavailable", "gateway_unreachable", "server_busy",
    )  # fmt: skip
    retryable = True


class DeadlineError(MezzotintError):
    status = 504
    codes = ("deadline_exceeded",)


class StorageFullError(MezzotintError):
    status = 507
    codes = ("storage_full", "too_many_pictures")


ANSWERS: tuple[type[MezzotintError], ...] = tuple(MezzotintError.__subclasses__())
"""The classes above, which are HTTP answers; the classes below never are."""


class ModelLoadError(MezzotintError):
    """A model or adapter could not be loaded; `permanent` tells whether trying again could help."""

    codes = (
        "model_load_failed", "model_not_found", "gated_model", "no_network", "download_failed",
        "missing_package", "not_a_pipeline", "missing_file", "corrupt_file", "pickle_only", "remote_code",
        "unsupported_class", "not_enough_memory", "device_unavailable", "invalid_setting", *ADAPTER_CODES,
    )  # fmt: skip

    def __init__(self, message: str, *, code: str | None = None, permanent: bool = True) -> None:
        super().__init__(message, code=code)
        self.permanent = permanent


class ConfigError(MezzotintError):
    """A setting or the installation stops the command, which then ends with exit status 2."""

    codes = ("invalid_setting", "not_installed")


class ConnectionFailedError(MezzotintError):
    """The SDK could not reach the server."""

    status = 0
    codes = ("connection_failed",)
    retryable = True


_BY_STATUS: Mapping[int, type[MezzotintError]] = {cls.status: cls for cls in ANSWERS}
"""Where two classes share a status, the second one is meant: RateLimitError and InternalError."""
_BY_CODE: Mapping[str, type[MezzotintError]] = {code: cls for cls in ANSWERS for code in cls.codes}


def error_class(status: int, code: str | None) -> type[MezzotintError]:
    """The class that an answer with this HTTP status and error code stands for.

    The code decides, unless it blames the client for a server's status or the other way round.
    """
    cls = _BY_CODE.get(code or "")
    if cls is not None and (cls.status >= 500) == (status >= 500):
        return cls
    return _BY_STATUS.get(status, InternalError if status >= 500 else InvalidRequestError)


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


def without_folders(text: str) -> str:
    """A message of this machine for people elsewhere: of each absolute path only the last part."""
    return re.sub(r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\":;,]+[/\\])*(?=[^\s/\\'\":;,])", "", text)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be: the closest, else one that contains it."""
    name, names = name.lower()[:MAX_ECHO], {other.lower(): other for other in known}
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    long = [other for other in names if min(len(name), len(other)) >= 4]
    holding = [other for other in long if name in other or other in name]
    return next((names[other] for other in close + holding), None)
