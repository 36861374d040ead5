"""Runs every client against one server and prints what passed as a table.

python -m tests.conformance.run [--fake] [--write] [--model SOURCE] [--only NAME ...]
(see scripts/conformance)
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
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from mezzotint.config import EndpointSettings, Settings
from mezzotint.server import logs
from mezzotint.server.app import create_app, serve
from mezzotint.server.store.keys import create_first_key
from mezzotint.server.workers.process import ENGINE_WORKER
from tests.conformance.programs import ROOT, NotInstalledError, Program, programs

CLIENTS = Path(__file__).parent / "clients"
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- conformance -->", "<!-- /conformance -->"
FAKE_WORKER = "mezzotint.fake_worker:run"
ENDPOINT = "emoji"
ALIASES = ("gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "gpt-image-2", "dall-e-2", "dall-e-3")
"""Names that programs use by themselves."""
START_S = 120.0
LOAD_S = 600.0
RUN_S = 420

Row = dict[str, str]
"""One line of the table: client, version, check, and the fault or why it was not run."""


def host(connection: Connection, source: str, worker: str, auth: bool, folder: Path) -> None:
    """The server process: sends its address and key, and serves until it is ended."""
    logs.configure("warning", "console")
    endpoint = EndpointSettings(id=ENDPOINT, model=source, aliases=ALIASES)
    settings = Settings(port=0, data_dir=folder / "data", auth=auth, endpoints=(endpoint,))
    app = create_app(settings, worker=worker)
    made = create_first_key(app.state.context.engine) if auth else None

    def tell(url: str) -> None:
        connection.send_bytes(f"{url} {made[1] if made else ''}".encode())

    asyncio.run(serve(app, settings, on_started=tell))


@contextmanager
def running(source: str, worker: str, *, auth: bool = True) -> Iterator[tuple[str, str]]:
    """Address and key of a server while the block runs; without `auth` it asks for no key."""
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=host, args=(theirs, source, worker, auth, Path(folder))
        )
        process.start()
        try:
            if not mine.poll(START_S):
                raise SystemExit("the server did not start")
            url, _, key = mine.recv_bytes().decode().partition(" ")
            _wait_until_ready(url)
            yield url, key
        finally:
            process.terminate()
            process.join()


def _wait_until_ready(url: str) -> None:
    """Waits until the model is loaded, so that no client's patience decides."""
    until = time.monotonic() + LOAD_S
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz"):
                return
        except urllib.error.HTTPError:  # 503 while it loads
            if time.monotonic() > until:
                raise SystemExit("the model did not load") from None
            time.sleep(0.5)


def results(program: Program, url: str, key: str, open_url: str, folder: Path) -> Iterator[Row]:
    """One row for each check of a program; a program that cannot be installed has one that says why.

    `open_url` is a server that asks for no key, for what never sends one.
    """
    row = {"client": program.title, "version": program.version}
    try:
        program.install()
    except NotInstalledError as error:
        yield row | {"check": "installing it", "skipped": str(error), "fault": ""}
        return
    if program.language == "node":
        for file in CLIENTS.glob("*.mjs"):
            shutil.copy(file, program.folder)
        command = program.command(program.folder / f"{program.name}.mjs")
    else:
        command = program.command(f"{CLIENTS.parent.parent.name}.conformance.clients.{program.name}")
    environment = os.environ | {"PYTHONPATH": "", "TMPDIR": str(folder), "OPEN_URL": open_url}
    made = _call([*command, url, key, ENDPOINT], ROOT, environment)
    # programs print things of their own
    lines = [line for line in made.stdout.splitlines() if line.startswith('{"check"')]
    yield from (row | json.loads(line) for line in lines)
    if made.returncode:
        yield row | {"check": "its script", "fault": made.stderr or f"status {made.returncode}"}


def _call(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_S)


def recipes() -> Iterator[tuple[str, str, str, str]]:
    """Client, package, language and code of each recipe in docs/clients.md; a section is one program."""
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading = section.partition("\n")[0]
        blocks = re.findall(r"^```(python|js)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        named = re.search(r'`(?:pip|npm) install "?([\w-]+)', heading)
        if blocks and named:
            yield heading.partition(" (")[0], named[1], blocks[0][0], "\n".join(code for _, code in blocks)


def recipe_results(used: Sequence[Program], url: str, key: str, folder: Path) -> Iterator[Row]:
    """One row for each recipe of these programs, run as it stands but for the server's port."""
    port = url.rpartition(":")[2]
    environment = os.environ | {"MEZZOTINT_API_KEY": key, "PYTHONPATH": ""}
    for client, package, language, code in recipes():
        kind = "node" if language == "js" else "python"
        for program in used:
            if (program.package, program.language) != (package, kind) or not program.installed:
                continue
            file = (program.folder if kind == "node" else folder) / (
                "recipe" + (".mjs" if kind == "node" else ".py")
            )
            file.write_text(code.replace(":8000", f":{port}").replace("port=8000", f"port={port}"))
            made = _call(program.command(file), folder, environment)
            fault = made.stderr if made.returncode else ""
            yield {"client": client, "version": "this page", "check": "the recipe above", "fault": fault}


def table(found: Sequence[Row]) -> str:
    lines = ["| client | version | what is checked | result |", "|---|---|---|---|"]
    for one in found:
        result = f"not run: {one['skipped']}" if one.get("skipped") else "FAILS" if one["fault"] else "passes"
        lines.append(f"| {one['client']} | {one['version']} | {one['check']} | {result} |")
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
    parser.add_argument("--only", nargs="+", metavar="NAME", help="programs of programs.toml [all]")
    options = parser.parse_args()
    used = [program for program in programs() if not options.only or program.name in options.only]
    source, worker = ("fake:size=128", FAKE_WORKER) if options.fake else (options.model, ENGINE_WORKER)
    found: list[Row] = []
    with (
        running(source, worker) as (url, key),
        running(source, worker, auth=False) as (open_url, _),
        tempfile.TemporaryDirectory() as name,
    ):
        folder = Path(name)
        for program in used:
            found += results(program, url, key, open_url, folder)
        found += recipe_results(used, url, key, folder)
    print(table(found))
    if options.write:
        write(table(found))
    faults = [one for one in found if one["fault"]]
    for one in faults:
        print(f"\n{one['client']}, {one['check']}:\n{one['fault']}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
