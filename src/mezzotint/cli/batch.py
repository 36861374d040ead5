"""`mezzotint generate --prompts FILE`: many prompts into one folder, taken up again where it was left.

The folder's `manifest.jsonl` gets one line per finished request: its line in the file, the request, the seed
and the files. A second run does only what the manifest does not have, so a stopped run loses nothing.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mezzotint.errors import InvalidRequestError, MezzotintError

if TYPE_CHECKING:
    from mezzotint.client import Client

MANIFEST = "manifest.jsonl"
CONCURRENCY = 8
"""Requests in flight; the server orders them anyway."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the prompts file and the request that it stands for."""

    line: int
    fields: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """The same for the same line and request, over runs."""
        return json.dumps([self.line, self.fields], sort_keys=True)


def read_prompts(file: Path, common: Mapping[str, Any]) -> list[Entry]:
    """One request per line: words, or a JSON object of request fields over the common ones.

    Empty lines are left out. With a common seed, line k (from 0) gets that seed plus k.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"--prompts {file}: cannot be read ({error})", param="prompts") from None
    entries = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        fields = dict(common)
        if "seed" in fields:
            fields["seed"] += number
        fields |= (
            _fields_of(file, number, line) if line.lstrip().startswith("{") else {"prompt": line.strip()}
        )
        entries.append(Entry(number, fields))
    if not entries:
        raise InvalidRequestError(f"--prompts {file}: has no prompt in it", param="prompts")
    return entries


def _fields_of(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError as error:
        text = f"{file}, line {number + 1}: is no JSON object ({error})"
        raise InvalidRequestError(text, param="prompts") from None
    return fields


def run(client: Client, entries: list[Entry], folder: Path, suffix: str, *, as_json: bool) -> int:
    """Makes what is missing, printing each file as it is done; the number of requests that failed."""
    from mezzotint.schemas import make_body

    for entry in entries:  # every line is checked before the first is sent
        try:
            make_body(entry.fields)
        except InvalidRequestError as error:
            text = f"line {entry.line + 1}: {error.message}"
            raise InvalidRequestError(text, code=error.code, param=error.param) from None
    folder.mkdir(parents=True, exist_ok=True)
    done = finished(folder)
    _end_the_last_line(folder / MANIFEST)
    missing = [entry for entry in entries if entry.identity not in done]
    typer.echo(f"{len(entries)} requests, {len(entries) - len(missing)} done before", err=True)
    lock, failed = threading.Lock(), 0

    def make(entry: Entry) -> None:
        result = client.images.generate(**entry.fields)
        files = [path.name for path in result.save(folder / f"{entry.line + 1:05}{suffix}")]
        record = {"line": entry.line, "request": dict(entry.fields), "seed": result.seed, "files": files}
        with lock, (folder / MANIFEST).open("a", encoding="utf-8") as manifest:
            text = json.dumps(record, ensure_ascii=False)
            manifest.write(f"{text}\n")
            typer.echo(text if as_json else "\n".join(str(folder / name) for name in files))

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        places = {pool.submit(make, entry): entry for entry in missing}
        try:
            for future in as_completed(places):
                try:
                    future.result()
                except MezzotintError as error:
                    failed += 1
                    typer.echo(f"line {places[future].line + 1}: {error.message}", err=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def _end_the_last_line(manifest: Path) -> None:
    """Keeps what a crash cut short from swallowing the line that comes after it."""
    if manifest.exists() and not manifest.read_bytes().endswith(b"\n"):
        with manifest.open("a", encoding="utf-8") as file:
            file.write("\n")


def finished(folder: Path) -> set[str]:
    """Identities of the requests whose files are all there; a line that a crash cut short is none."""
    found = set()
    file = folder / MANIFEST
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
            entry = Entry(record["line"], record["request"])
            complete = all((folder / name).exists() for name in record["files"])
        except (ValueError, KeyError, TypeError):
            continue
        if complete:
            found.add(entry.identity)
    return found
