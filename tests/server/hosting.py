"""A real server on a real port with fake workers, for tests that speak HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from fastapi import FastAPI

from mezzotint.config import EndpointSettings, Settings
from mezzotint.server.api.context import Context
from mezzotint.server.app import create_app, serve
from mezzotint.server.store.adapters import Adapter, Origin
from mezzotint.server.store.folder import Folder
from mezzotint.server.store.keys import create_first_key, create_key
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.lifecycle import Command, State

FAKE = "mezzotint.fake_worker:run"
GENERATE = "/dedicated/v1/images/generations"
PATIENCE_S = 20.0
_KEY_NUMBERS = itertools.count(1)
"""How long a test waits for something that should happen at once; only a failure ever takes that long."""

Result = TypeVar("Result")


@dataclass
class Host:
    """A running server."""

    url: str
    service: Context
    client: httpx2.Client
    loop: asyncio.AbstractEventLoop
    pool: ThreadPoolExecutor
    first_key: str | None
    """An admin key, unless the data folder had one or the server wants none."""
    app: FastAPI

    def body(self, prompt: str = "a cat", **fields: Any) -> dict[str, Any]:
        values = {"model": "one", "prompt": prompt, "num_inference_steps": 4, "response_format": "png"}
        return {name: value for name, value in (values | fields).items() if value is not ...}

    def post(
        self, prompt: str = "a cat", *, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx2.Response:
        return self.client.post(GENERATE, json=self.body(prompt, **fields), headers=headers)

    def post_soon(self, prompt: str = "a cat", **fields: Any) -> Future[httpx2.Response]:
        return self.pool.submit(self.post, prompt, **fields)

    def picture(self, prompt: str = "a cat", **fields: Any) -> str:
        """The base64 of a picture that must come."""
        answer = self.post(prompt, **fields)
        assert answer.status_code == 200, answer.text
        data: str = answer.json()["data"][0]["b64_json"]
        return data

    def submit(self, prompt: str = "a cat", *, headers: dict[str, str] | None = None, **fields: Any) -> str:
        """Starts a request that nobody waits for; its id."""
        answer = self.post(prompt, headers={"prefer": "respond-async"} | (headers or {}), **fields)
        assert answer.status_code == 202, answer.text
        request_id: str = answer.json()["id"]
        return request_id

    def state(self, request_id: str) -> dict[str, Any]:
        answer = self.client.get(f"/dedicated/v1/requests/{request_id}")
        assert answer.status_code == 200, answer.text
        values: dict[str, Any] = answer.json()
        return values

    def wait_until(self, request_id: str, *statuses: str) -> dict[str, Any]:
        """Waits for one of these statuses by the request's own changes."""

        async def watch() -> None:
            ticket = self.service.admission.tickets.by_id[request_id]
            seen = ticket.changes
            while ticket.status not in statuses:
                assert not ticket.ended, f"{request_id} ended as {ticket.status}: {ticket.error}"
                seen = await ticket.changed(seen)

        self.run(watch())
        return self.state(request_id)

    def new_client(self, **key_fields: Any) -> httpx2.Client:
        """A client with a key of its own."""
        name = f"key-{next(_KEY_NUMBERS)}"
        _, secret = create_key(self.service.engine, name, **key_fields)
        return client(self.url, secret)

    def endpoint(self, endpoint_id: str = "one") -> Endpoint:
        return next(endpoint for endpoint in self.service.registry if endpoint.id == endpoint_id)

    def raw_post(self, **fields: Any) -> bytes:
        """The bytes of a request, for a test that drops its connection."""
        body = json.dumps(self.body(**fields)).encode()
        lines = [
            f"POST {GENERATE} HTTP/1.1",
            "Host: localhost",
            f"Authorization: {self.client.headers['authorization']}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def connect(self) -> socket.socket:
        url = httpx2.URL(self.url)
        return socket.create_connection((url.host, url.port or 80), timeout=PATIENCE_S)

    def until(self, condition: Callable[[], object]) -> None:
        """Waits until something is so; looks again whenever the server's loop has had its turn."""

        async def watch() -> None:
            while not condition():
                await asyncio.sleep(0.002)

        self.run(watch())

    def wait_for(self, *states: State, endpoint_id: str = "one") -> State:
        return self.run(self.endpoint(endpoint_id).wait_for(*states))

    def command(self, command: Command, drain_s: float = math.inf, endpoint_id: str = "one") -> State:
        """Has the registry carry out a command, and waits until the endpoint has done with it."""
        endpoint = self.endpoint(endpoint_id)

        async def work() -> State:
            await self.service.registry.command(endpoint, command, drain_s)
            return await endpoint.settled()

        return self.run(work())

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Runs a coroutine in the server's own loop."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, PATIENCE_S), self.loop).result()

    def announce(self, endpoint_id: str, route: str, file: Path) -> None:
        """Opens an adapter's route without a look at the file; a worker looks at it meanwhile."""
        record = Adapter(endpoint_id, route, str(file), file, 1.0, "", 0.0, Origin.API, 0)
        self.call(self.endpoint(endpoint_id).adapters.announce, [record])

    def call(self, function: Any, *values: Any) -> Any:
        """Calls a function in the server's own loop."""

        async def call() -> Any:
            return function(*values)

        return self.run(call())


def client(url: str, key: str | None) -> httpx2.Client:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.Client(base_url=url, headers=headers, timeout=PATIENCE_S)


def folder_of(host: Host) -> Path:
    """Where a server without object storage keeps its pictures."""
    storage = host.service.pictures.storage
    assert isinstance(storage, Folder)
    return storage.path


def settings_for(folder: Path, *endpoints: EndpointSettings, **values: Any) -> Settings:
    """Settings of a small quick server in this folder; without endpoints there is one, named `one`."""
    defaults: dict[str, Any] = {"port": 0, "data_dir": folder / "data", "drain_s": 1, "log_level": "error"}
    return Settings(**(defaults | values), endpoints=endpoints or (endpoint(),))


def endpoint(source: str = "fake", **fields: Any) -> EndpointSettings:
    return EndpointSettings(**({"id": "one", "model": source} | fields))


@contextlib.contextmanager
def hosting(
    settings: Settings, *, ready: bool = True, key: str | None = None, worker: str = FAKE
) -> Iterator[Host]:
    """The server while the block runs; with `ready` it begins when every endpoint is up."""
    app = create_app(settings, worker=worker)
    service: Context = app.state.context
    made = create_first_key(service.engine) if settings.auth else None
    first_key = made[1] if made else None
    started: Future[tuple[str, asyncio.AbstractEventLoop]] = Future()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        await serve(app, settings, on_started=lambda url: started.set_result((url, loop)))

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="server")
    thread.start()
    url, loop = started.result(PATIENCE_S)
    with client(url, key or first_key) as http, ThreadPoolExecutor(64) as pool:
        host = Host(url, service, http, loop, pool, first_key, app)
        try:
            if ready:
                for one in service.registry:
                    host.wait_for(State.READY, endpoint_id=one.id)
            yield host
        finally:
            app.state.server.should_exit = True
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the server did not stop"
