"""`mezzotint serve`: flags to settings, then cli/hosting.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.options import ConfigFlag, DataDirFlag, read_settings
from mezzotint.errors import ConfigError


def serve(
    config: ConfigFlag = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [8000]")] = None,
    data_dir: DataDirFlag = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Host this model alone: `emoji`, folder, repository or file."),
    ] = None,
    id: Annotated[
        str | None, typer.Option(metavar="ID", help="Endpoint ID of --model. [the source's last part]")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run workers on this Ray cluster: `auto` or HOST:PORT."),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Ask for no API keys (loopback only).")] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings in force as a file, and stop.")
    ] = False,
) -> None:
    """Starts the server. The first start prints an API key, once.

    Example: `mezzotint serve --model black-forest-labs/FLUX.1-schnell --id flux`
    """
    settings = read_settings(
        config,
        host=host,
        port=port,
        data_dir=data_dir,
        ray=ray,
        endpoints=endpoint_flags(model, id),
        auth=False if no_auth else None,
    )
    if print_config:
        from mezzotint.config import as_toml

        typer.echo(as_toml(settings), nl=False)
        return
    from mezzotint.cli import hosting
    from mezzotint.config import CONFIG_FILE

    file = config or (Path(CONFIG_FILE) if Path(CONFIG_FILE).is_file() else None)
    hosting.serve(settings, file)


def endpoint_flags(model: str | None, id: str | None) -> list[dict[str, str]] | None:
    """The `endpoints` that --model and --id stand for; None when --model was not given."""
    if model is None:
        if id is not None:
            raise ConfigError("flag --id names the endpoint of --model; give --model SOURCE too")
        return None
    last = Path(model.partition("@")[0]).name.removesuffix(".safetensors")
    return [
        {"id": id or re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("._-").lower() or "model", "model": model}
    ]
