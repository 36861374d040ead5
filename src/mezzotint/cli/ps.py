"""`mezzotint ps`: the servers that this user has running, and what each endpoint of them is doing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer

from mezzotint.cli.options import JsonFlag
from mezzotint.cli.reach import ENDPOINTS, asking, passing_key, settings_of
from mezzotint.cli.running import Running, running_servers
from mezzotint.cli.tables import places, print_table
from mezzotint.errors import MezzotintError


def ps(as_json: JsonFlag = False) -> None:
    """Lists the servers that you have running on this machine, with their endpoints.

    Example: `mezzotint ps`
    """
    servers = [(running, _endpoints(running)) for running in running_servers()]
    if as_json:
        typer.echo(json.dumps([asdict(running) | {"endpoints": endpoints} for running, endpoints in servers]))
        return
    if not servers:
        typer.echo("no server runs; `mezzotint serve` starts one", err=True)
        return
    rows = [
        (
            one["id"],
            one["model"],
            one["state"],
            one["workers"],
            one["jobs"],
            running.url,
            running.data_dir,
        )
        for running, endpoints in servers
        for one in endpoints
    ]
    print_table(("endpoint", "model", "state", "workers", "jobs", "server", "data folder"), rows)


def _endpoints(running: Running) -> list[dict[str, Any]]:
    """What `ps` shows of a server's endpoints; one row that says why where the server cannot be asked."""
    try:
        with passing_key(settings_of(running), admin=True) as key, asking(running.url, key) as server:
            specs = {
                id: server.ask("GET", f"{ENDPOINTS}/{id}") for id in server.ask("GET", ENDPOINTS)["data"]
            }
    except MezzotintError as error:
        return [{"id": "?", "model": "?", "state": error.message, "workers": "?", "jobs": "?"}]
    return [
        {
            "id": id,
            "model": spec["mezzotint"]["settings"]["model"],
            "state": spec["mezzotint"]["not_ready_because"] or spec["mezzotint"]["state"],
            "workers": _workers(spec),
            "jobs": str(spec["mezzotint"]["queue"]["jobs"] + spec["mezzotint"]["queue"]["running"]),
        }
        for id, spec in specs.items()
    ]


def _workers(spec: Mapping[str, Any]) -> str:
    """How many are ready and wanted, and where those on other machines run."""
    num, there = (
        f"{spec['currReplicaCnt']}/{spec['desiredReplicaCnt']}",
        places(spec["mezzotint"]["replicas"]),
    )
    return f"{num} ({there})" if there else num
