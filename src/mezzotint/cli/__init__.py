"""The command line: each command parses, makes one call, and prints.

Results go to stdout, progress and complaints to stderr. Nothing heavy is imported before a command runs.
Exit status: 0 done, 1 failed, 2 wrong usage or settings, 3 the server cannot be reached or is not ready,
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, NoReturn

import typer

import mezzotint
from mezzotint.cli.adapters import adapters
from mezzotint.cli.bench import bench
from mezzotint.cli.db import db
from mezzotint.cli.doctor import doctor
from mezzotint.cli.edit import edit
from mezzotint.cli.endpoints import endpoints
from mezzotint.cli.generate import generate
from mezzotint.cli.keys import keys
from mezzotint.cli.models import pull
from mezzotint.cli.plan import plan
from mezzotint.cli.ps import ps
from mezzotint.cli.serve import serve
from mezzotint.cli.top import top
from mezzotint.errors import (
    ConfigError,
    ConnectionFailedError,
    InvalidRequestError,
    MezzotintError,
    UnavailableError,
)

EXIT_CODES: dict[type[MezzotintError], int] = {
    ConfigError: 2,
    InvalidRequestError: 2,
    ConnectionFailedError: 3,
    UnavailableError: 3,
}
"""Exit status by class of error; every other error is 1."""

app = typer.Typer(
    name="mezzotint",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage or settings, 3 server not reachable or not ready, "
    "130 stopped by Ctrl-C.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mezzotint {mezzotint.__version__}")
        raise typer.Exit()


VersionFlag = Annotated[
    bool,
    typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
]


@app.callback()
def options(version: VersionFlag = False) -> None:
    """Hosts image-generation models as dedicated endpoints on your own hardware."""


app.command()(serve)
app.command()(generate)
app.command()(edit)
app.command()(pull)
app.command()(doctor)
app.add_typer(endpoints, name="endpoints")
app.add_typer(adapters, name="adapters")
app.add_typer(keys, name="keys")
app.add_typer(db, name="db")
app.command()(bench)
app.command()(plan)
app.command()(top)
app.command()(ps)


def main() -> None:
    """Runs the command in sys.argv and exits; an error of Mezzotint's own is one line on stderr."""
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "mezzotint":
            raise
        _fail(
            ConfigError(
                f"this command needs {error.name}, which is not installed; install the server's parts with "
                "pip install 'mezzotint[server]'",
                code="not_installed",
            )
        )
    except MezzotintError as error:
        _fail(error)


def _fail(error: MezzotintError) -> NoReturn:
    if "--json" in sys.argv:
        facts = {"message": error.message, "code": error.code, "param": error.param}
        typer.echo(json.dumps({"error": facts}), err=True)
    else:
        typer.echo(f"mezzotint: {error.message}", err=True)
    sys.exit(next((code for cls, code in EXIT_CODES.items() if isinstance(error, cls)), 1))
