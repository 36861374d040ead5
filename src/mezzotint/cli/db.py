"""`mezzotint db`: the database of a server."""

from __future__ import annotations

import json

import typer

from mezzotint.cli.options import ConfigFlag, DataDirFlag, JsonFlag, read_settings

db = typer.Typer(help="Look after the server's database.", no_args_is_help=True)


@db.command()
def upgrade(config: ConfigFlag = None, data_dir: DataDirFlag = None, as_json: JsonFlag = False) -> None:
    """Brings the database to the schema that this version needs; a SQLite file is copied first.

    Stop the servers that use the database, and back up Postgres yourself. SQLite is also upgraded at a start.

    Example: `mezzotint db upgrade`
    """
    from mezzotint.server.store.database import database_url, upgrade_database

    settings = read_settings(config, data_dir=data_dir)
    done = upgrade_database(database_url(settings.data_dir, settings.database_url))
    backup = str(done.backup) if done.backup else None
    if as_json:
        typer.echo(json.dumps({"before": done.before, "after": done.after, "backup": backup}))
    elif done.before == done.after:
        typer.echo(f"the database is at schema version {done.after} already")
    else:
        typer.echo(f"schema version {done.before or 'none'} -> {done.after}")
        if backup:
            typer.echo(f"copy of the database as it was: {backup}")
