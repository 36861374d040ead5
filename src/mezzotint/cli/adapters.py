"""`mezzotint adapters`: the LoRA adapters of a running server; no restart, no request disturbed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.cli import completion
from mezzotint.cli.options import ConfigFlag, DataDirFlag, JsonFlag, ServerFlag
from mezzotint.cli.reach import ENDPOINTS, managed
from mezzotint.cli.tables import print_facts, print_table
from mezzotint.errors import NotFoundError, nearest

adapters = typer.Typer(help="Manage the adapters of a running server's endpoints.", no_args_is_help=True)

IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The endpoint.")]
NameArgument = Annotated[
    str,
    typer.Argument(metavar="ID:ROUTE", help="Endpoint and route.", autocompletion=completion.models),
]


@adapters.command()
def add(
    name: NameArgument,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A safetensors file or a folder here, or `owner/name[:file][@revision]`.",
        ),
    ],
    scale: Annotated[float, typer.Option(metavar="S", help="Strength; 1 is as trained.")] = 1.0,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of a route there is.")] = False,
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Adds an adapter; requests reach it at once as `ID:ROUTE`. A file or folder here is uploaded.

    Example: `mezzotint adapters add emoji:ink ./ink.safetensors --scale 0.8`
    """
    from mezzotint.client import Client
    from mezzotint.client.adapters import split_name

    id, route = split_name(name)
    added: Mapping[str, Any]
    with managed(server, config, data_dir) as running:
        if Path(source).expanduser().exists():
            with Client(base_url=running.url, api_key=running.key or None) as client:
                file = Path(source).expanduser()
                added = client.adapters.add(name, file, scale=scale, replace=replace)
        else:
            body = {"route": route, "source": source, "scale": scale, "replace": replace}
            added = running.ask("POST", f"{ENDPOINTS}/{id}/adapters", body)
    typer.echo(json.dumps(added) if as_json else f"{added['name']} {added['state']}")


@adapters.command("list")
def list_(
    id: Annotated[
        str | None,
        typer.Argument(
            metavar="[ID]",
            help="The endpoint; all of them else.",
            autocompletion=completion.endpoint_ids,
        ),
    ] = None,
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Lists the adapters of one endpoint, or of all.

    Example: `mezzotint adapters list emoji`
    """
    with managed(server, config, data_dir) as running:
        ids = [id] if id else list(running.ask("GET", ENDPOINTS)["data"])
        found = [one for id in ids for one in running.ask("GET", f"{ENDPOINTS}/{id}/adapters")["data"]]
    if as_json:
        typer.echo(json.dumps(found))
        return
    rows = [
        (
            one["name"],
            one["state"],
            str(one["rank"] or ""),
            f"{one['file_bytes'] / 1e6:.1f} MB",
            "built-in" if one["origin"] == "built-in" else one["source"],
        )
        for one in found
    ]
    print_table(("name", "state", "rank", "file", "source"), rows)


@adapters.command()
def show(
    name: NameArgument,
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Shows one adapter: source, scale, checksum, family, rank, modules, size.

    Example: `mezzotint adapters show emoji:flat`
    """
    from mezzotint.client.adapters import split_name

    id, route = split_name(name)
    with managed(server, config, data_dir) as running:
        found = running.ask("GET", f"{ENDPOINTS}/{id}/adapters")["data"]
    one = next((one for one in found if one["route"] == route), None)
    if one is None:
        routes = [one["route"] for one in found]
        hint = nearest(route, routes)
        nearby = f"did you mean {id}:{hint}?" if hint else f"it has {', '.join(routes) or 'none'}"
        raise NotFoundError(f"endpoint {id} has no adapter {route}; {nearby}", code="adapter_not_found")
    if as_json:
        typer.echo(json.dumps(one))
    else:
        print_facts(one)


@adapters.command()
def remove(
    name: NameArgument,
    server: ServerFlag = None,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Removes an adapter; requests that already use it finish. Those of the built-in model stay.

    Example: `mezzotint adapters remove emoji:ink`
    """
    from mezzotint.client.adapters import split_name

    id, route = split_name(name)
    with managed(server, config, data_dir) as running:
        removed = running.ask("DELETE", f"{ENDPOINTS}/{id}/adapters/{route}")
    typer.echo(json.dumps(removed) if as_json else f"{removed['name']} removed")
