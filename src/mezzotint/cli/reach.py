"""How commands find a running server and its key, and how the managing ones talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.cli.options import read_settings
from mezzotint.errors import ConnectionFailedError

if TYPE_CHECKING:
    import httpx2

    from mezzotint.config import Settings

SERVER_FILE = "server.json"
"""In the data folder while a server runs on it: {"url", "pid"}."""
ENDPOINTS = "/dedicated/beta/endpoint"
TIMEOUT_S = 120.0
"""How long one managing request may take; adding an adapter may fetch it first."""


def running_server(settings: Settings) -> str | None:
    """The URL of the server that runs on this data folder; None when there is none.

    The server must prove that it is ours: after a crash another program may listen on its port, and would be
    sent a key.
    """
    import httpx2

    try:
        url = json.loads((settings.data_dir / SERVER_FILE).read_text())["url"]
        challenge = secrets.token_hex(16)
        answer = httpx2.get(f"{url}/healthz", params={"challenge": challenge}, timeout=5.0).json()
        told = answer["proof"]
    except (OSError, ValueError, KeyError, TypeError, httpx2.HTTPError, httpx2.InvalidURL):
        return None
    from mezzotint.server.store.signing import load_signer

    return str(url) if told == load_signer(settings.data_dir).proof(challenge) else None


@contextlib.contextmanager
def passing_key(settings: Settings, *, admin: bool = False) -> Iterator[str]:
    """A key for this one command: whoever may write the data folder may make keys."""
    from mezzotint.cli.keys import key_database
    from mezzotint.server.store.keys import create_key, delete_key

    with key_database(settings) as database:
        key, secret = create_key(database, f"command-{secrets.token_hex(4)}", admin=admin)
        try:
            yield secret
        finally:
            delete_key(database, key.id)


class Server:
    """A running server, with a key that may manage it."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http

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
            response = self._http.request(method, path, json=body)
        except httpx2.TransportError as error:
            raise ConnectionFailedError(f"{self._http.base_url} does not answer ({error})") from None
        failure = read_error(response)
        if failure is not None:
            raise failure
        return response


@contextlib.contextmanager
def managed(server: str | None, config: Path | None, data_dir: Path | None) -> Iterator[Server]:
    """The server named (with MEZZOTINT_API_KEY), else the one that runs on this data folder."""
    import httpx2

    with contextlib.ExitStack() as stack:
        if server is None:
            settings = read_settings(config, data_dir=data_dir)
            server = running_server(settings)
            if server is None:
                raise ConnectionFailedError(
                    f"no server runs on {settings.data_dir}; start `mezzotint serve`, or give --server URL"
                )
            key = stack.enter_context(passing_key(settings, admin=True))
        else:
            key = os.environ.get("MEZZOTINT_API_KEY", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        yield Server(stack.enter_context(httpx2.Client(base_url=server, headers=headers, timeout=TIMEOUT_S)))
