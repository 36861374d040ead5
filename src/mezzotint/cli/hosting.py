"""Runs the server in this process: for `mezzotint serve`, and for one `mezzotint generate` without a server.

Needs the server's extra; the commands import it only when they run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import typer

from mezzotint import hub
from mezzotint.cli.running import announced
from mezzotint.config import BUILT_IN_MODEL, Settings
from mezzotint.errors import ConfigError, InternalError, MezzotintError, echo
from mezzotint.server import app as server
from mezzotint.server import logs
from mezzotint.server.store.keys import create_first_key
from mezzotint.server.threads import share_heaps
from mezzotint.server.workers.process import ENGINE_WORKER

TO_FILE = "| tee /dev/stderr | grep -o 'http[^\"]*' | xargs -r curl -sS -o picture.png"
"""What a printed curl ends in: it shows the answer and fetches the picture behind its URL into a file."""


def serve(settings: Settings, config: Path | None = None, *, worker: str = ENGINE_WORKER) -> None:
    """Serves until SIGTERM or Ctrl-C; then running requests get `drain_s` to finish.

    `config` is the file that the settings came from, if there is one.
    """
    if worker == ENGINE_WORKER:
        for endpoint in settings.endpoints:
            require_model(endpoint.id, endpoint.model)
    share_heaps()
    # After uvicorn's own handler, so that the block below ends.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logs.configure(settings.log_level, settings.log_format)
    app = server.create_app(settings, worker=worker)
    made = create_first_key(app.state.context.engine) if settings.auth else None
    first_key = made[1] if made else None
    if first_key is not None:  # now, for it is stored nowhere and the start may still fail
        typer.echo(f"API key, shown this once: {first_key}")
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, before)

        def started(url: str) -> None:
            url = url.replace("//0.0.0.0", "//127.0.0.1").replace("//[::]", "//[::1]")
            stack.enter_context(announced(settings, url, config))
            typer.echo(welcome(settings, url, first_key))

        asyncio.run(server.serve(app, settings, on_started=started))


@contextlib.contextmanager
def hosted(settings: Settings, only: str | None = None, *, worker: str = ENGINE_WORKER) -> Iterator[str]:
    """A server, of one endpoint if it is named, in a thread for as long as the block runs; yields its URL."""
    logs.configure("error", "console")
    app = server.create_app(settings, worker=worker, only=only)
    started: Future[str] = Future()

    def run() -> None:
        try:
            asyncio.run(server.serve(app, settings, on_started=started.set_result))
        except MezzotintError as error:
            started.set_exception(error)
        finally:
            if not started.done():
                started.set_exception(InternalError("the server did not start; its log is above"))

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        yield started.result()
    finally:
        if "server" in app.state:
            app.state.server.should_exit = True
        thread.join()


def require_model(endpoint_id: str, model: str) -> None:
    """ConfigError where a model's name can mean nothing: found now, and not by a worker after the start."""
    path = Path(model).expanduser()
    if path.is_dir() and not (path / hub.PIPELINE_INDEX).is_file():
        raise ConfigError(
            f"endpoint {endpoint_id}: the folder {path} is no diffusers pipeline: it has no "
            f"{hub.PIPELINE_INDEX}; give the folder that has it, or a safetensors file"
        )
    reference = hub.parse_reference(model)
    is_repository = reference is not None and reference.file is None and path.suffix != ".safetensors"
    if model != BUILT_IN_MODEL and not path.exists() and not is_repository:
        raise ConfigError(
            f"endpoint {endpoint_id}: model {echo(model)} was not found: it is not {BUILT_IN_MODEL} (built "
            "in), no folder or safetensors file that exists here, and no repository (owner/name)"
        )


def welcome(settings: Settings, url: str, first_key: str | None) -> str:
    """What `serve` prints once it listens: where the playground is, and a first request to copy."""
    body = {"model": settings.endpoints[0].id, "prompt": "a red apple", "num_inference_steps": 8}
    curl = [f"curl -sS {url}/dedicated/v1/images/generations", "-H 'Content-Type: application/json'"]
    lines = [f"Mezzotint listens on {url}", f"Playground: {url}/"]
    if settings.auth:
        curl.append(f'-H "Authorization: Bearer {first_key or "$MEZZOTINT_API_KEY"}"')
        lines.append("Keys: `mezzotint keys create NAME` makes one, `mezzotint keys list` names them.")
    curl += [f"-d '{json.dumps(body)}'", TO_FILE]
    return "\n".join([*lines, "", "A first request:", "  " + " \\\n    ".join(curl), ""])
