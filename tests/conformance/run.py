"""Runs every client against one server and prints what passed as a table.

python tests/conformance/run.py [--fake] [--write] [--model SOURCE]      (see scripts/conformance)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from mezzotint.config import EndpointSettings, Settings
from mezzotint.server import logs
from mezzotint.server.app import create_app, serve
from mezzotint.server.store.keys import create_first_key
from mezzotint.server.workers.process import ENGINE_WORKER

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CLIENTS = ROOT / ".venv-conformance"
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- conformance -->", "<!-- /conformance -->"
FAKE_WORKER = "mezzotint.fake_worker:run"
ENDPOINT = "emoji"
START_S = 120.0
RUN_S = 420


def host(connection: Connection, source: str, worker: str, folder: Path) -> None:
    """The server process: sends its address and key, and serves until it is ended."""
    logs.configure("warning", "console")
    endpoint = EndpointSettings(id=ENDPOINT, model=source, default_steps=8)
    settings = Settings(port=0, data_dir=folder / "data", endpoints=(endpoint,))
    app = create_app(settings, worker=worker)
    made = create_first_key(app.state.context.engine)
    assert made is not None

    def tell(url: str) -> None:
        connection.send_bytes(f"{url} {made[1]}".encode())

    asyncio.run(serve(app, settings, on_started=tell))


@contextmanager
def running(source: str, worker: str) -> Iterator[tuple[str, str]]:
    """Address and key of a server while the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=host, args=(theirs, source, worker, Path(folder))
        )
        process.start()
        try:
            if not mine.poll(START_S):
                raise SystemExit("the server did not start")
            url, _, key = mine.recv_bytes().decode().partition(" ")
            yield url, key
        finally:
            process.terminate()
            process.join()


def results(url: str, key: str) -> list[dict[str, str]]:
    """One entry for each check of each client."""
    node = CLIENTS / "node"
    shutil.copy(HERE / "node_clients.mjs", node)
    commands = (
        [str(CLIENTS / "bin" / "python"), str(HERE / "python_clients.py"), url, key, ENDPOINT],
        ["node", str(node / "node_clients.mjs"), url, key, ENDPOINT],
    )
    found: list[dict[str, str]] = []
    for command in commands:
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=RUN_S)
        if made.returncode:
            raise SystemExit(f"{command[1]} ended with status {made.returncode}")
        # clients print things of their own
        found += [json.loads(line) for line in made.stdout.splitlines() if line.startswith('{"client"')]
    return found


def recipes() -> Iterator[tuple[str, str, str]]:
    """Client, language and code of each recipe in docs/clients.md; a section is one program."""
    for section in PAGE.read_text().split("\n## ")[1:]:
        client = section.partition("\n")[0].partition(" (")[0]
        blocks = re.findall(r"^```(python|js)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        if blocks:
            yield client, blocks[0][0], "\n".join(code for _, code in blocks)


def recipe_results(url: str, key: str, folder: Path) -> list[dict[str, str]]:
    """One entry for each recipe, run as it stands but for the server's port."""
    found = []
    port = url.rpartition(":")[2]
    for client, language, code in recipes():
        file = (CLIENTS / "node" / "recipe.mjs") if language == "js" else (folder / "recipe.py")
        file.write_text(code.replace(":8000", f":{port}").replace("port=8000", f"port={port}"))
        program = "node" if language == "js" else str(CLIENTS / "bin" / "python")
        environment = os.environ | {"MEZZOTINT_API_KEY": key}
        made = subprocess.run(
            [program, str(file)], cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_S
        )
        fault = made.stderr if made.returncode else ""
        found.append({"client": client, "version": "this page", "check": "the recipe above", "fault": fault})
    return found


def table(found: list[dict[str, str]]) -> str:
    lines = ["| client | version | what is checked | result |", "|---|---|---|---|"]
    for one in found:
        shown = one["version"] or "requests replayed"
        lines.append(
            f"| {one['client']} | {shown} | {one['check']} | {'FAILS' if one['fault'] else 'passes'} |"
        )
    return "\n".join(lines)


def write(text: str) -> None:
    """Puts the table between its marks in docs/clients.md."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fake", action="store_true", help="paint instead of running a model")
    parser.add_argument("--write", action="store_true", help="write the table into docs/clients.md")
    parser.add_argument(
        "--model", default=ENDPOINT, metavar="SOURCE", help="what to host [the built-in model]"
    )
    options = parser.parse_args()
    source, worker = ("fake:size=128", FAKE_WORKER) if options.fake else (options.model, ENGINE_WORKER)
    with running(source, worker) as (url, key), tempfile.TemporaryDirectory() as folder:
        found = results(url, key) + recipe_results(url, key, Path(folder))
    text = table(found)
    print(text)
    if options.write:
        write(text)
    faults = [one for one in found if one["fault"]]
    for one in faults:
        print(f"\n{one['client']}, {one['check']}:\n{one['fault']}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
