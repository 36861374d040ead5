"""`mezzotint top`: what a running server does right now, refreshed until Ctrl-C."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import ConfigFlag, DataDirFlag, JsonFlag, ServerFlag
from mezzotint.cli.reach import ENDPOINTS, Server, managed
from mezzotint.cli.tables import places, print_table

if TYPE_CHECKING:
    from rich.table import Table

Samples = Mapping[tuple[str, str], float]
"""Values of /metrics by metric and endpoint, summed over other labels."""
COLUMNS = {
    "endpoint": "endpoint",
    "state": "state",
    "workers": "up",
    "running": "run",
    "queued": "wait",
    "backlog_s": "backlog s",
    "requests_per_s": "req/s",
    "steps_per_s": "steps/s",
    "rows_per_forward": "rows",
    "busy": "busy",
    "resident": "lora",
    "failures": "fail",
    "restarts": "died",
}
"""What a row has, and what the table calls it; short, for a terminal of 80 columns."""
_LINE = re.compile(r'^(mezzotint_\w+)\{[^}]*?endpoint="([^"]*)"[^}]*\} (\S+)$', re.MULTILINE)


def top(
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.2, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one look and stop.")] = False,
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Shows endpoints, queues, rows per forward, adapters and rates, live. `--json` prints a line per look.

    Example: `mezzotint top --every 2`
    """
    from rich.console import Console
    from rich.live import Live

    with managed(server, config, data_dir) as running:
        looks = look_again(running, every)
        if as_json or once:
            for rows in looks:
                if as_json:
                    typer.echo(json.dumps(rows))
                else:
                    print_table(list(COLUMNS.values()), [_texts(row) for row in rows])
                    typer.echo(_notes(rows), nl=False)
                if once:
                    return
        with Live(console=Console(), auto_refresh=False, screen=True) as screen:
            for rows in looks:
                screen.update(table(rows), refresh=True)


def look_again(server: Server, every_s: float) -> Iterator[list[dict[str, Any]]]:
    """One row per endpoint, again and again; rates are over the time between two looks."""
    before, then = read_metrics(server.metrics()), time.monotonic()
    while True:
        time.sleep(every_s)
        now = time.monotonic()
        after = read_metrics(server.metrics())
        specs = {id: server.ask("GET", f"{ENDPOINTS}/{id}") for id in server.ask("GET", ENDPOINTS)["data"]}
        yield [row_of(id, spec, before, after, now - then) for id, spec in specs.items()]
        before, then = after, now


def read_metrics(text: str) -> Samples:
    """The samples that have an `endpoint` label."""
    samples: dict[tuple[str, str], float] = defaultdict(float)
    for name, endpoint, value in _LINE.findall(text):
        samples[name, endpoint] += float(value)
    return samples


def row_of(
    id: str, spec: Mapping[str, Any], before: Samples, after: Samples, seconds: float
) -> dict[str, Any]:
    """What `top` shows of one endpoint."""

    def risen(name: str) -> float:
        key = f"mezzotint_{name}", id
        return after.get(key, 0.0) - before.get(key, 0.0)

    live, forwards = spec["mezzotint"], risen("forwards_total")
    return {
        "endpoint": id,
        "state": live["state"],
        "workers": f"{spec['currReplicaCnt']}/{spec['desiredReplicaCnt']}",
        "running": live["queue"]["running"],
        "queued": live["queue"]["jobs"],
        "backlog_s": live["queue"]["backlog_s"],
        "requests_per_s": round(risen("requests_total") / seconds, 2),
        "steps_per_s": round(risen("steps_total") / seconds, 1),
        "rows_per_forward": round(risen("steps_total") / forwards, 2) if forwards else 0.0,
        "busy": round(risen("worker_busy_seconds_total") / seconds, 2),
        "adapters": len(live["adapters"]),
        "resident": int(after.get(("mezzotint_adapters_resident", id), 0)),
        "failures": int(after.get(("mezzotint_failures_total", id), 0)),
        "places": places(live["replicas"]),
        "scaling": [event["reason"] for event in live["scaling"][-1:]],
        "restarts": sum(replica["restarts"] for replica in live["replicas"]),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows as a table for the terminal."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_notes(rows), caption_justify="left")
    for name, title in COLUMNS.items():
        shown.add_column(title, justify="left" if name in ("endpoint", "state") else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*_texts(row))
    return shown


def _texts(row: Mapping[str, Any]) -> list[str]:
    return [str(row[name]) for name in COLUMNS]


def _notes(rows: list[dict[str, Any]]) -> str:
    """Where each endpoint's workers run, if not here, and its last scaling, if it had one: a line each."""
    said = [(row["endpoint"], text) for row in rows for text in (row["places"], *row["scaling"]) if text]
    return "".join(f"{endpoint}: {text}\n" for endpoint, text in said)
