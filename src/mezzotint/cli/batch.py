"""`mezzotint generate --prompts FILE`: many prompts into one folder, taken up again where it was left.

The folder's `manifest.jsonl` gets one line per finished request: its line in the file, the request, the seed
and the files. A second run does only what the manifest does not have, wherever it stands in the file by now;
so a stopped run loses nothing, and lines may be added, moved and removed.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mezzotint.errors import InvalidRequestError, MezzotintError

if TYPE_CHECKING:
    from rich.progress import Progress

    from mezzotint.client import Client

MANIFEST = "manifest.jsonl"
CONCURRENCY = 8
"""Requests in flight; the server orders them anyway."""
STDIN = Path("-")
SLUG_LENGTH = 30
"""Most characters of a prompt in a file's name."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the prompts file and the request that it stands for."""

    line: int
    fields: Mapping[str, Any]

    @property
    def content(self) -> str:
        """The same for the same request, wherever it stands."""
        return json.dumps(self.fields, sort_keys=True)

    @property
    def stem(self) -> str:
        """`00012-a-red-apple`: what its file is called."""
        from mezzotint.cli.generate import slug

        return f"{self.line + 1:05}-{slug(str(self.fields['prompt']), SLUG_LENGTH)}"


def folder_for(prompts: Path, out: Path | None) -> Path:
    """Where the pictures go: `--out`, else a folder called like the file without its suffix."""
    if out is None and prompts == STDIN:
        raise InvalidRequestError("--prompts - needs --out FOLDER for the pictures", param="out")
    return out or prompts.with_suffix("")


def read_prompts(file: Path, common: Mapping[str, Any]) -> list[Entry]:
    """One request per line: words, or a JSON object of request fields over the common ones.

    Empty lines are left out. With a common seed each line gets that seed, and one that repeats an earlier
    line the next one; so a line's picture does not depend on where it stands.
    """
    try:
        text = sys.stdin.read() if file == STDIN else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"--prompts {file}: cannot be read ({error})", param="prompts") from None
    entries, times = [], Counter[str]()
    for number, line in enumerate(text.splitlines()):
        if not line.strip():
            continue
        own = _fields_of(file, number, line) if line.lstrip().startswith("{") else {"prompt": line.strip()}
        entry = Entry(number, {**common, **own})
        if "seed" in common and "seed" not in own:
            step = times[entry.content] * int(entry.fields.get("n", 1))
            times[entry.content] += 1
            entry = replace(entry, fields={**entry.fields, "seed": common["seed"] + step})
        entries.append(entry)
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


def run(
    client: Client, model: str, entries: Sequence[Entry], folder: Path, suffix: str, *, as_json: bool
) -> int:
    """Makes what is missing, printing each file as it is done; the number of requests that failed.

    `model` is that of the entries which name none.
    """
    entries = [replace(entry, fields={"model": model, **entry.fields}) for entry in entries]
    require_valid(entries)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _end_the_last_line(folder / MANIFEST)
        done = finished(folder)
    except OSError as error:
        raise InvalidRequestError(
            f"--out {folder}: is no folder to write to ({error.strerror})", param="out"
        ) from None
    missing = []
    for entry in entries:
        if done[entry.content]:
            done[entry.content] -= 1
        else:
            missing.append(entry)
    typer.echo(f"{len(entries)} requests, {len(entries) - len(missing)} done before", err=True)
    return _Run(client, folder, suffix, as_json).all(missing)


def require_valid(entries: Sequence[Entry]) -> None:
    """InvalidRequestError names the first line that the server would refuse; none has been sent then."""
    from mezzotint.schemas import make_body

    for entry in entries:
        try:
            make_body(entry.fields)
        except InvalidRequestError as error:
            text = f"line {entry.line + 1}: {error.message}"
            raise InvalidRequestError(text, code=error.code, param=error.param) from None


class _Run:
    """The requests of one command, several at a time."""

    def __init__(self, client: Client, folder: Path, suffix: str, as_json: bool) -> None:
        self._client = client
        self._folder = folder
        self._suffix = suffix
        self._as_json = as_json
        self._lock = threading.Lock()
        """Held while names are chosen and files, manifest and terminal are written."""

    def all(self, entries: Sequence[Entry]) -> int:
        """The number of requests that failed."""
        failed = 0
        with _bar() as bar, ThreadPoolExecutor(CONCURRENCY) as pool:
            task = bar.add_task("", total=len(entries), failed="")
            places = {pool.submit(self._make, entry): entry for entry in entries}
            try:
                for future in as_completed(places):
                    failed += self._told(future, places[future])
                    bar.update(task, advance=1, failed=f"{failed} failed" if failed else "")
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return failed

    def _make(self, entry: Entry) -> None:
        result = self._client.images.generate(**entry.fields)
        for picture in result.data:
            _ = picture.data  # fetched before the lock is taken
        with self._lock, (self._folder / MANIFEST).open("a", encoding="utf-8") as manifest:
            files = [path.name for path in result.save(self._free(entry.stem, len(result.data)))]
            record = {"line": entry.line, "request": dict(entry.fields), "seed": result.seed, "files": files}
            text = json.dumps(record, ensure_ascii=False)
            manifest.write(f"{text}\n")
            typer.echo(text if self._as_json else "\n".join(str(self._folder / name) for name in files))

    def _free(self, stem: str, count: int) -> Path:
        """A name of which no file is there: what is in the folder is never overwritten."""
        names = {path.name for path in self._folder.iterdir()}
        number, own = 1, stem
        while {f"{own}{end}{self._suffix}" for end in ("", *(f"-{k}" for k in range(count)))} & names:
            number += 1
            own = f"{stem}-{number}"
        return self._folder / f"{own}{self._suffix}"

    def _told(self, future: Future[None], entry: Entry) -> int:
        """1 for a request that failed, with its line and reason on stderr."""
        try:
            future.result()
        except MezzotintError as error:
            typer.echo(f"line {entry.line + 1}: {error.message}", err=True)
            return 1
        return 0


def _bar() -> Progress:
    """A bar on stderr where that is a terminal; results keep going to stdout."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("requests"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[red]{task.fields[failed]}"),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),
    )


def _end_the_last_line(manifest: Path) -> None:
    """Keeps what a crash cut short from swallowing the line that comes after it."""
    if manifest.exists() and not manifest.read_bytes().endswith(b"\n"):
        with manifest.open("a", encoding="utf-8") as file:
            file.write("\n")


def finished(folder: Path) -> Counter[str]:
    """How often each request is done, with all its files; a line that a crash cut short is none."""
    found = Counter[str]()
    file = folder / MANIFEST
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
            entry = Entry(record["line"], record["request"])
            complete = all((folder / name).exists() for name in record["files"])
        except (ValueError, KeyError, TypeError):
            continue
        if complete:
            found[entry.content] += 1
    return found
