"""What several commands share: their common flags and the settings those stand for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mezzotint.config import Settings

ConfigFlag = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="MEZZOTINT_CONFIG",
        metavar="FILE",
        help="Configuration file; `mezzotint.toml` in this folder when there is one.",
    ),
]
DataDirFlag = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of keys, database and pictures. [./mezzotint-data]")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

ServerFlag = Annotated[
    str | None,
    typer.Option(
        envvar=["MEZZOTINT_URL", "MEZZOTINT_BASE_URL"],  # the SDK's URL_VARIABLES
        metavar="URL",
        help="A server to ask, with the key in `MEZZOTINT_API_KEY`. [the one that runs here]",
    ),
]


def _models(context: typer.Context, incomplete: str) -> list[str]:
    from mezzotint.cli.completion import models

    return models(context, incomplete)


def _formats(incomplete: str) -> list[str]:
    from mezzotint.cli.completion import formats

    return formats(incomplete)


EndpointFlag = Annotated[
    str | None,
    typer.Option(
        metavar="ID[:ROUTE]", help="Endpoint and adapter. [the first endpoint]", autocompletion=_models
    ),
]
StepsFlag = Annotated[int, typer.Option(metavar="N", help="Denoising steps, 1 to 50.")]
GuidanceFlag = Annotated[
    float | None, typer.Option(metavar="G", help="How closely to follow the prompt. [the endpoint's]")
]
SeedFlag = Annotated[int | None, typer.Option(metavar="S", help="Same seed, same picture. [random]")]
FormatFlag = Annotated[
    str,
    typer.Option(
        metavar="F",
        help="`png`, `jpeg`, `jpg`, `raw`, or `url` to leave it on the server.",
        autocompletion=_formats,
    ),
]
OutFlag = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Where to write. [from the prompt, in this folder]")
]
NumberFlag = Annotated[int, typer.Option("-n", metavar="N", help="Number of pictures, 1 to 8.")]
NegativeFlag = Annotated[str | None, typer.Option(metavar="TEXT", help="What not to show.")]
ShowFlag = Annotated[bool, typer.Option(help="Draw the picture if stderr is a terminal.")]


def read_settings(config: Path | None, **flags: Any) -> Settings:
    """The settings of file, environment and these flags; ConfigError says what stops the command."""
    from mezzotint.config import load_settings

    return load_settings(config, flags=flags)


def require_engine() -> None:
    """ModuleNotFoundError on a bare install; looks for torch without importing it."""
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
