"""The OpenAPI document, made true to what the middleware adds, and `/docs`: the same as a plain page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import HTMLResponse

from mezzotint.schemas import ErrorBody
from mezzotint.server.api.answers import ERRORS

WITH_BODY = ("post", "put", "patch")
_REFUSED_BODIES = (408, 413, 415, 422)
_SCHEMES = {"key": {"type": "http", "scheme": "bearer", "description": "An API key, `mz_...`."}}
_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 3rem; border-bottom: 1px solid } h3 { margin: 2rem 0 0 }
code, pre { font: 14px/1.45 ui-monospace, monospace }
pre { overflow-x: auto; padding: .75rem; border: 1px solid }
table { border-collapse: collapse; width: 100% }
td { vertical-align: top; padding: .2rem .8rem .2rem 0 }
"""


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

    async def docs(request: Request) -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))

    app.add_route("/docs", docs, include_in_schema=False)


def page(made: dict[str, Any]) -> str:
    """The document as HTML: every address with its fields, examples and answers."""
    sections: dict[str, list[str]] = {}
    for path, method, operation in _operations(made):
        tag = operation.get("tags", ["Other"])[0]
        content = operation.get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema", {})
        named = made["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2])
        sections.setdefault(tag, []).append(_operation(path, method, operation, named or schema))
    body = "".join(f"<h2>{html.escape(tag)}</h2>{''.join(parts)}" for tag, parts in sections.items())
    title = html.escape(f"{made['info']['title']} {made['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{title}</h1>"
        '<p>Every address of this server; for programs as <a href="/openapi.json">openapi.json</a>. '
        f"Send your key as <code>Authorization: Bearer mz_...</code>.</p>{body}</body></html>"
    )


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


def _operation(path: str, method: str, operation: dict[str, Any], schema: dict[str, Any]) -> str:
    parts = [f"<h3><code>{method.upper()} {html.escape(path)}</code></h3>"]
    parts.append(f"<p>{html.escape(operation.get('description') or operation.get('summary', ''))}</p>")
    fields = [
        (name, "required" if name in schema.get("required", ()) else "", facts.get("description", ""))
        for name, facts in schema.get("properties", {}).items()
    ]
    fields += [
        (
            f"{one['name']} ({one['in']})",
            "required" if one.get("required") else "",
            one.get("description", ""),
        )
        for one in operation.get("parameters", ())
        if one["name"] != "authorization"
    ]
    parts.append(_table(fields))
    parts += [
        f"<pre>{html.escape(json.dumps(example, indent=2, ensure_ascii=False))}</pre>"
        for example in schema.get("examples", ())
    ]
    answers = [(status, "", one.get("description", "")) for status, one in operation["responses"].items()]
    parts.append(f"<details><summary>Answers</summary>{_table(sorted(answers))}</details>")
    return "".join(parts)


def _table(rows: list[tuple[str, str, str]]) -> str:
    cells = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td>"
        f"<td>{html.escape(mark)}</td><td>{html.escape(text)}</td></tr>"
        for name, mark, text in rows
    )
    return f"<table>{cells}</table>" if cells else ""
