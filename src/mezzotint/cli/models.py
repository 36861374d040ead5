"""`mezzotint pull` and `mezzotint doctor`: what the engine says about models and this machine.

Both run the engine's own programs as child processes, because only the engine may load torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Annotated

import typer

from mezzotint.cli.options import JsonFlag, require_engine
from mezzotint.cli.tables import print_facts


def pull(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A Hub repository (`owner/name`), folder or safetensors file."),
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Fetches a model now, so that `serve` finds it on disk; prints its folder.

    Example: `mezzotint pull black-forest-labs/FLUX.1-schnell`
    """
    arguments = [source, *(["--revision", revision] if revision else []), *(["--json"] if as_json else [])]
    raise typer.Exit(_engine_program("loading", "pull", *arguments).returncode)


def doctor(as_json: JsonFlag = False) -> None:
    """Shows what models would run on here: processor, GPU, memory, versions, threads, and the dtype and why.

    Example: `mezzotint doctor`
    """
    child = _engine_program("doctor", "--json", capture=True)
    if child.returncode or as_json:
        typer.echo(child.stdout, nl=False)
        raise typer.Exit(child.returncode)
    print_facts(json.loads(child.stdout))


def _engine_program(module: str, *arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    require_engine()
    program = f"import sys; from mezzotint.engine.models.{module} import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}  # without advice on optional packages
    return subprocess.run(
        command, text=True, stdout=subprocess.PIPE if capture else None, check=False, env=environment
    )
