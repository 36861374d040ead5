"""The page `/docs`: the OpenAPI document for people, in the playground's paper and ink.

`operations` makes the parts; the documentation site has a page of the same parts.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mezzotint.server.api.recipes import command

_MAX_DEPTH = 3
_LIMITS = (
    ("minimum", "maximum", ""),
    ("minLength", "maxLength", " characters"),
    ("minItems", "maxItems", " entries"),
)
"""The names of the least and the most, and the unit."""
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}: HTTP interface</title>
<link rel="icon" type="image/svg+xml" href="playground/icon.svg">
<link rel="stylesheet" href="playground/style.css">
<link rel="stylesheet" href="playground/reference.css">
<script type="module" src="playground/reference.js"></script>
</head>
<body>
<header class="masthead">
  <h1>{title}</h1>
  <p>every address, every field</p>
  <nav aria-label="Server"><a href="./">Playground</a> <a href="openapi.json">openapi.json</a></nav>
</header>
<div class="reference">
<nav class="contents" aria-label="Addresses">{contents}</nav>
<main>
<p class="lead">Each example is a command for your shell. It takes the key from
<code>MEZZOTINT_API_KEY</code> and asks the endpoint <code>emoji</code>: put the ID of yours in its place.</p>
<pre><code>export MEZZOTINT_API_KEY=mz_...</code></pre>
{sections}
</main>
</div>
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one address; `body` is HTML without the heading."""

    tag: str
    method: str
    path: str
    summary: str
    body: str

    @property
    def anchor(self) -> str:
        words = "".join(letter if letter.isalnum() else "-" for letter in self.path)
        return f"{self.method.lower()}{words.rstrip('-')}"


def page(made: dict[str, Any], base_url: str) -> str:
    """The OpenAPI document `made` as a page; `base_url` is where the examples ask."""
    tags: dict[str, list[Operation]] = {}
    for one in operations(made, base_url):
        tags.setdefault(one.tag, []).append(one)
    contents = "".join(
        f"<h2>{_text(tag)}</h2><ul>{''.join(map(_entry, ones))}</ul>" for tag, ones in tags.items()
    )
    sections = "".join(
        f"<section><h2>{_text(tag)}</h2>{''.join(map(_section, ones))}</section>"
        for tag, ones in tags.items()
    )
    title = _text(f"{made['info']['title']} {made['info']['version']}")
    return _PAGE.format(title=title, contents=contents, sections=sections)


def operations(made: dict[str, Any], base_url: str) -> Iterator[Operation]:
    """The operations of an OpenAPI document in its order."""
    for path, methods in made["paths"].items():
        for method, facts in methods.items():
            tag = facts.get("tags", ["Other"])[0]
            body = "".join(_parts(made, path, method, facts, base_url))
            yield Operation(tag, method.upper(), path, facts["summary"], body)


def _entry(one: Operation) -> str:
    return f'<li><a href="#{one.anchor}"><b>{one.method}</b> {_text(one.path)}</a></li>'


def _section(one: Operation) -> str:
    return (
        f'<article id="{one.anchor}"><h3>{_text(one.summary)}</h3>'
        f'<p class="address"><code>{one.method} {_text(one.path)}</code></p>{one.body}</article>'
    )


def _parts(
    made: dict[str, Any], path: str, method: str, facts: dict[str, Any], base_url: str
) -> Iterator[str]:
    if description := facts.get("description"):
        yield f"<p>{_prose(description)}</p>"
    for kind, content in facts.get("requestBody", {}).get("content", {}).items():
        rows = list(_fields(made, content.get("schema", {})))
        yield _table(f"Body, {kind}", ("field", "type", "default", "limits", "meaning"), rows)
    parameters = [one for one in facts.get("parameters", ()) if one["name"] != "authorization"]
    rows = [
        _row(f"{one['name']} ({one['in']})", _plain(made, one["schema"]), one.get("required", False), one)
        for one in parameters
    ]
    yield _table("Parameters", ("name", "type", "default", "limits", "meaning"), rows)
    asked = _text(command(path, method, _example(made, facts), base_url))
    yield f'<pre><code tabindex="0">{asked}</code></pre>'
    yield f"<details><summary>Answers</summary>{''.join(_answers(made, facts['responses']))}</details>"


def _answers(made: dict[str, Any], responses: dict[str, Any]) -> Iterator[str]:
    rows = [(_code(status), _prose(one.get("description", ""))) for status, one in sorted(responses.items())]
    yield _table("By status", ("status", "meaning"), rows)
    content = responses.get("200", {}).get("content", {}).get("application/json", {})
    fields = [(name, kind, meaning) for name, kind, _, _, meaning in _nested(made, content.get("schema", {}))]
    yield _table("Fields of a 200", ("field", "type", "meaning"), fields)


def _example(made: dict[str, Any], facts: dict[str, Any]) -> Any:
    """An example of the JSON body: the schema's own, or else its required fields with theirs."""
    schema = facts.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if schema is None:
        return None
    schema = _plain(made, schema)
    for example in [*schema.get("examples", ()), schema.get("example")]:
        if example is not None:
            return example
    return dict.fromkeys(schema.get("required", ()), "emoji")


def _nested(
    made: dict[str, Any], schema: dict[str, Any], before: str = "", depth: int = 0
) -> Iterator[tuple[str, ...]]:
    """The rows of all fields of an answer; those inside others have dotted names."""
    for row, inner in zip(
        _fields(made, schema, before), _plain(made, schema).get("properties", {}).values(), strict=True
    ):
        yield row
        name = html.unescape(row[0].removeprefix("<code>").removesuffix("</code>"))
        inner = _plain(made, inner)
        entries = _plain(made, inner["items"]) if inner.get("type") == "array" and "items" in inner else None
        if depth < _MAX_DEPTH and (entries or inner).get("properties"):
            yield from _nested(made, entries or inner, f"{name}[]." if entries else f"{name}.", depth + 1)


def _fields(made: dict[str, Any], schema: dict[str, Any], before: str = "") -> Iterator[tuple[str, ...]]:
    schema = _plain(made, schema)
    for name, facts in schema.get("properties", {}).items():
        yield _row(before + name, _plain(made, facts), name in schema.get("required", ()), facts)


def _row(name: str, schema: dict[str, Any], required: bool, facts: dict[str, Any]) -> tuple[str, ...]:
    default = (
        "required"
        if required
        else _code(json.dumps(schema["default"]))
        if "default" in schema
        else "optional"
    )
    meaning = _sentence(facts) or _sentence(schema)
    return (_code(name), _kind(schema), default, _limits(schema), _prose(meaning))


def _plain(made: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with references followed, and without the choice of null, which is noted as `nullable`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return _plain(made, made["components"]["schemas"][name] | {"title": name})
    choices = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    if len(choices) == 1:
        outer = {name: value for name, value in schema.items() if name != "anyOf"}
        return _plain(made, choices[0]) | outer | {"nullable": True}
    return schema


def _kind(schema: dict[str, Any]) -> str:
    null = " or null" if schema.get("nullable") else ""
    if "enum" in schema:
        return ", ".join(_code(str(value)) for value in schema["enum"]) + null
    names = {"string": "text", "array": "list", "boolean": "true or false"}
    kind = schema.get("type", "any")
    if "anyOf" in schema:
        kinds = dict.fromkeys(_kind(one) for one in schema["anyOf"])
        return " or ".join(kinds)
    if schema.get("format") == "binary":
        return "file" + null
    return _text(names.get(kind, kind) + null)


def _limits(schema: dict[str, Any]) -> str:
    said = []
    for low, high, unit in _LIMITS:
        least, most = (_number(schema[name]) if name in schema else None for name in (low, high))
        if least is not None and most is not None:
            said.append(f"{least} to {most}{unit}")
        elif most is not None:
            said.append(f"at most {most}{unit}")
        elif least is not None:
            said.append(f"at least {least}{unit}")
    return _text(", ".join(said))


def _number(value: float) -> str:
    return "2^63-1" if value == 2**63 - 1 else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _sentence(schema: dict[str, Any]) -> str:
    if "description" in schema:
        return str(schema["description"])
    inner = [_sentence(one) for one in schema.get("anyOf", ())]
    return next(filter(None, inner), "")


def _table(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table of cells that are HTML already; nothing when there are no rows."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{_text(title)}"><table>'
        f"<caption>{_text(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _prose(text: str) -> str:
    """Words with code between backticks."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(text))


def _text(text: str) -> str:
    return html.escape(text)
