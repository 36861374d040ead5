"""Tables for people: aligned columns on stdout, which a pipe gets as plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import typer


def places(replicas: Iterable[Mapping[str, Any]]) -> str:
    """How many of an endpoint's workers run on which other machines: `2 on 10.0.0.1, 1 on 10.0.0.2`."""
    nodes = Counter(replica["node"] for replica in replicas if replica["node"] is not None)
    return ", ".join(f"{num} on {node}" for node, num in sorted(nodes.items()))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints rows under these column names; no value is ever cut."""
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for number, line in enumerate(lines):
        text = "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip()
        typer.echo(typer.style(text, bold=True) if number == 0 else text)


def print_facts(facts: Mapping[str, object]) -> None:
    """Prints nested facts as `name  value` lines, a nested mapping under its own name."""
    lines = list(_fact_lines(facts, ""))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        typer.echo(f"{name.ljust(width)}  {value}".rstrip())


def _fact_lines(facts: Mapping[str, object], indent: str) -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        name = indent + key
        if isinstance(value, Mapping):
            yield name, ""
            yield from _fact_lines(value, indent + "  ")
        elif isinstance(value, list):
            yield name, ", ".join(str(item) for item in value) or "none"
        else:
            yield name, _said(key, value)


def _said(key: str, value: object) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if isinstance(value, float):
        return f"{datetime.fromtimestamp(value):%Y-%m-%d %H:%M:%S}" if key == "created" else f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
