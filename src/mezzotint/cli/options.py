"""What several commands share: their common flags, the settings those stand for, and where a server runs."""

from __future__ import annotations

import importlib.util
import json
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

SERVER_FILE = "server.json"
"""In the data folder while a server runs on it: {"url", "pid"}."""


def read_settings(config: Path | None, **flags: Any) -> Settings:
    """The settings of file, environment and these flags; ConfigError says what stops the command."""
    from mezzotint.config import load_settings

    return load_settings(config, flags=flags)


def require_engine() -> None:
    """ModuleNotFoundError on a bare install; looks for torch without importing it."""
    if importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")


def running_server(settings: Settings) -> str | None:
    """The URL of the server that runs on this data folder; None when there is none."""
    import httpx2

    try:
        url = json.loads((settings.data_dir / SERVER_FILE).read_text())["url"]
        httpx2.get(f"{url}/healthz", timeout=5.0)
    except (OSError, ValueError, KeyError, httpx2.HTTPError):
        return None
    return str(url)
