"""`mezzotint keys`: makes, lists and revokes keys in a data folder; a running server sees it at once."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import ConfigFlag, DataDirFlag, JsonFlag, read_settings
from mezzotint.cli.reach import find_server, key_database, settings_of

if TYPE_CHECKING:
    from mezzotint.config import Settings
    from mezzotint.server.store.keys import Key

keys = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="What the key is called in lists.")]


@keys.command()
def create(
    name: NameArgument,
    admin: Annotated[
        bool, typer.Option("--admin", help="May also manage endpoints and read metrics.")
    ] = False,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="May use this endpoint only; repeat for more. [every endpoint]"),
    ] = None,
    requests_per_minute: Annotated[
        float | None, typer.Option(metavar="N", help="Most requests a minute. [no limit]")
    ] = None,
    step_seconds_per_day: Annotated[
        float | None, typer.Option(metavar="S", help="Most seconds of denoising a day. [no limit]")
    ] = None,
    weight: Annotated[
        float, typer.Option(metavar="W", help="Share of a busy endpoint beside other keys.")
    ] = 1.0,
    priority: Annotated[
        int,
        typer.Option(metavar="N", help="Keys of higher priority go first; -10 to 10."),
    ] = 0,
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Makes a key and prints it. It is shown this once; only its hash is stored.

    Example: `export MEZZOTINT_API_KEY=$(mezzotint keys create laptop)`
    """
    from mezzotint.server.store.keys import Limits, create_key, require_endpoints

    limits = Limits(requests_per_minute, step_seconds_per_day, weight, priority)
    with key_database(key_settings(config, data_dir)) as database:
        require_endpoints(database, endpoint or ())
        key, secret = create_key(database, name, admin=admin, endpoints=endpoint or (), limits=limits)
    typer.echo(json.dumps({**_facts(key), "key": secret}) if as_json else secret)


@keys.command("list")
def list_(config: ConfigFlag = None, data_dir: DataDirFlag = None, as_json: JsonFlag = False) -> None:
    """Lists the keys by name; the keys themselves are not stored.

    Example: `mezzotint keys list`
    """
    from mezzotint.server.store.keys import list_keys

    with key_database(key_settings(config, data_dir)) as database:
        found = list_keys(database)
    if as_json:
        typer.echo(json.dumps([_facts(key) for key in found]))
        return
    from mezzotint.cli.tables import print_table

    print_table(
        ("name", "id", "scope", "created", "state"),
        [
            (
                key.name,
                key.id,
                "admin" if key.admin else ", ".join(key.endpoints) or "every endpoint",
                _day(key.created),
                "live" if key.revoked is None else f"revoked {_day(key.revoked)}",
            )
            for key in found
        ],
    )


@keys.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or ID of the key.")],
    config: ConfigFlag = None,
    data_dir: DataDirFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Ends a key at once, on a running server too.

    Example: `mezzotint keys revoke laptop`
    """
    from mezzotint.server.store.keys import revoke_key

    with key_database(key_settings(config, data_dir)) as database:
        key = revoke_key(database, name)
    typer.echo(json.dumps(_facts(key)) if as_json else f"revoked {key.name} ({key.id})")


def key_settings(config: Path | None, data_dir: Path | None) -> Settings:
    """The settings of the server that runs, else of this folder: whose keys are meant."""
    running = find_server(config, data_dir)
    return read_settings(config, data_dir=data_dir) if running is None else settings_of(running)


def _facts(key: Key) -> dict[str, Any]:
    return asdict(key)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))
