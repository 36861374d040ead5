"""Routes whose bodies the framework parses: their JSON is as strict as that of requests for pictures."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from mezzotint.errors import InvalidRequestError
from mezzotint.schemas import parse_json

MAX_DEPTH = 32
"""Deepest nesting of a body."""


class StrictRoute(APIRoute):
    """Refuses a name that stands twice, and texts that not every database or file system can keep."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if self.body_field is not None:
                _require_plain(parse_json(await request.body()))
            return await handle(request)

        return strict


def _require_plain(value: Any, name: str = "", depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise InvalidRequestError("the body is nested too deeply; send a flatter one", code="invalid_json")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            value = "\0"
        if "\0" in value:
            raise InvalidRequestError(
                f"{name} must be valid Unicode without NUL; send it without such characters",
                param=name.encode(errors="backslashreplace").decode(),
            )
    elif isinstance(value, dict):
        for key, entry in value.items():
            _require_plain(key, "a name in the body", depth + 1)
            _require_plain(entry, f"{name}.{key}".lstrip("."), depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _require_plain(entry, name, depth + 1)
