"""The OpenAPI document, made true to what the middleware adds, and `/docs`: the same as a page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import HTMLResponse

from mezzotint.schemas import ErrorBody
from mezzotint.server.api.answers import ERRORS
from mezzotint.server.api.context import context_of
from mezzotint.server.api.reference import page

_SOMEWHERE = "http://server.invalid"
"""Stands for the server's own address until a request says under which name it is asked."""
WITH_BODY = ("post", "put", "patch")
_REFUSED_BODIES = (408, 413, 415, 422)
_SCHEMES = {"key": {"type": "http", "scheme": "bearer", "description": "An API key, `mz_...`."}}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document, with the one error body wherever an error can come."""
    made: dict[str, Any] = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes, openapi_version="3.1.0"
    )
    for _, method, operation in _operations(made):
        responses = operation["responses"]
        if method in WITH_BODY:
            for status in _REFUSED_BODIES:
                responses.setdefault(str(status), _error(status))
        if "422" in responses:
            responses["422"] = _error(422)
        if "401" in responses:
            responses.setdefault("503", _error(503))
            operation["security"] = [{"key": []}]
    components = made.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    components["securitySchemes"] = _SCHEMES
    return made


def install(app: FastAPI) -> None:
    """Makes `/openapi.json` this module's document and adds `/docs`."""
    app.openapi = cache(lambda: document(app))  # type: ignore[method-assign]

    made = cache(lambda: page(app.openapi(), _SOMEWHERE))  # takes a tenth of a second

    async def docs(request: Request) -> HTMLResponse:
        context = await context_of(request)
        base_url = context.base_url(request).rstrip("/")
        return HTMLResponse(made().replace(_SOMEWHERE, html.escape(base_url)))

    app.add_route("/docs", docs, include_in_schema=False)


def _operations(made: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in made["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _error(status: int) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}
    return {
        "description": ERRORS[status]["description"],
        "content": {"application/json": {"schema": reference}},
    }
