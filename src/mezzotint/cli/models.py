"""`mezzotint pull`, and how commands ask the engine: through its own programs, for only it may load torch."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Annotated

import typer

from mezzotint.cli.options import JsonFlag, require_engine
from mezzotint.messages import LoadModel, encode

COMPILING = (sys.executable, "-m", "mezzotint.engine.compiling")
"""The program that compiles a model."""


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
    raise typer.Exit(engine_program("loading", "pull", *arguments).returncode)


def engine_program(module: str, *arguments: str, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Runs `main` of a module of `engine.models` as a child process, with its output captured on request."""
    require_engine()
    program = f"import sys; from mezzotint.engine.models.{module} import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}  # without advice on optional packages
    return subprocess.run(
        command, text=True, stdout=subprocess.PIPE if capture else None, check=False, env=environment
    )


def compile_model(asked: LoadModel) -> tuple[int, str]:
    """Builds the compiled form of a model in a child process: its exit status and the last thing it said.

    Everything before that is progress, and goes to standard error.
    """
    require_engine()
    frame, said = encode(asked), ""
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(COMPILING, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(len(frame).to_bytes(8, "big") + frame)
        child.stdin.flush()  # and stays open: the child ends with it
        for line in child.stdout:
            if said:
                typer.echo(said, err=True)
            said = line.decode().rstrip()
        code = child.wait()
    if code and said:
        typer.echo(said, err=True)
    return code, said
