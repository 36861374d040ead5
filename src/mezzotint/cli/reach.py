"""How commands find a running server and its key, and how the managing ones talk to it.

A server is named by `--server` or MEZZOTINT_URL, else by its data folder or configuration file, else it is
the one server that this user has running. No command here makes a data folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.cli.options import read_settings
from mezzotint.cli.running import Running, running_on, running_servers
from mezzotint.errors import ConfigError, ConnectionFailedError

if TYPE_CHECKING:
    import httpx2
    import sqlalchemy

    from mezzotint.config import Settings

ENDPOINTS = "/dedicated/beta/endpoint"
TIMEOUT_S = 120.0
"""How long one managing request may take; adding an adapter may fetch it first."""


def find_server(config: Path | None, data_dir: Path | None) -> Running | None:
    """The running server that a command without `--server` means; ConfigError where there are several.

    In a folder with a configuration file, or with a data folder named, only the server of those is meant.
    """
    settings = read_settings(config, data_dir=data_dir)
    here = running_on(settings.data_dir)
    if here is not None or _is_named(settings, config):
        return here
    others = running_servers()
    if len(others) > 1:
        several = ", ".join(f"{each.url} ({each.data_dir})" for each in others)
        raise ConfigError(f"{len(others)} servers run: {several}; name one with --server or --data-dir")
    return others[0] if others else None


def _is_named(settings: Settings, config: Path | None) -> bool:
    from mezzotint.config import CONFIG_FILE

    return "data_dir" in settings.model_fields_set or config is not None or Path(CONFIG_FILE).is_file()


def settings_of(running: Running) -> Settings:
    """The settings that a running server was started with, as far as its file and folder tell."""
    from mezzotint.server.store.database import database_url

    config = Path(running.config) if running.config else None
    settings = read_settings(config, data_dir=Path(running.data_dir))
    kind = database_url(settings.data_dir, settings.database_url).partition(":")[0].partition("+")[0]
    if kind != running.database:
        raise ConfigError(
            f"the server at {running.url} keeps its keys in {running.database}; set MEZZOTINT_DATABASE_URL "
            "as it has it, or give --server and MEZZOTINT_API_KEY"
        )
    return settings


@contextlib.contextmanager
def key_database(settings: Settings) -> Iterator[sqlalchemy.Engine]:
    """The database of these settings, which must be there; ConfigError says how one is made."""
    from mezzotint.server.store.database import database_url, open_database

    if not settings.data_dir.is_dir():
        raise ConfigError(
            f"there is no data folder {settings.data_dir}, and so there are no keys; `mezzotint serve` makes "
            "one, or give --data-dir DIR"
        )
    database = open_database(database_url(settings.data_dir, settings.database_url))
    try:
        yield database
    finally:
        database.dispose()


@contextlib.contextmanager
def passing_key(settings: Settings, *, admin: bool = False) -> Iterator[str]:
    """A key for this one command: whoever may write the data folder may make keys."""
    from mezzotint.server.store.keys import create_key, delete_key

    with key_database(settings) as database:
        key, secret = create_key(database, f"command-{secrets.token_hex(4)}", admin=admin)
        try:
            yield secret
        finally:
            delete_key(database, key.id)


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, with a key that may manage it."""

    url: str
    key: str
    http: httpx2.Client

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON; the error that the answer stands for is raised."""
        return self._send(method, path, body).json()

    def metrics(self) -> str:
        """The text of /metrics."""
        return self._send("GET", "/metrics", None).text

    def _send(self, method: str, path: str, body: Any) -> httpx2.Response:
        import httpx2

        from mezzotint.client.exchange import read_error

        try:
            response = self.http.request(method, path, json=body)
        except httpx2.TransportError as error:
            raise ConnectionFailedError(f"{self.url} does not answer ({error})") from None
        failure = read_error(response)
        if failure is not None:
            raise failure
        return response


@contextlib.contextmanager
def managed(server: str | None, config: Path | None, data_dir: Path | None) -> Iterator[Server]:
    """The server named (with MEZZOTINT_API_KEY), else the one that `find_server` finds."""
    if server is not None:
        with asking(server, os.environ.get("MEZZOTINT_API_KEY", "")) as named:
            yield named
        return
    running = find_server(config, data_dir)
    if running is None:
        raise ConnectionFailedError(_none_runs(read_settings(config, data_dir=data_dir), config))
    with passing_key(settings_of(running), admin=True) as key, asking(running.url, key) as found:
        yield found


@contextlib.contextmanager
def asking(url: str, key: str) -> Iterator[Server]:
    """The server at this address."""
    import httpx2

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx2.Client(base_url=url, headers=headers, timeout=TIMEOUT_S) as http:
        yield Server(url, key, http)


def _none_runs(settings: Settings, config: Path | None) -> str:
    where = f" on {settings.data_dir}" if _is_named(settings, config) else ""
    others = ", ".join(each.url for each in running_servers())
    elsewhere = f" ({others} runs on another data folder)" if others else ""
    return f"no server runs{where}{elsewhere}; start `mezzotint serve`, or give --server URL"
