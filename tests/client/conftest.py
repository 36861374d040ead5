from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from mezzotint.client import AsyncClient, Client, exchange
from mezzotint.config import EndpointSettings, Settings
from mezzotint.server.app import create_app
from mezzotint.server.store.keys import create_first_key
from tests.client.faces import AwaitedImages, Connect, Talks
from tests.client.scripted import Script
from tests.serving import serving


@pytest.fixture(params=["Client", "AsyncClient"])
def connect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Makes a client's `images`; retries wait for a moment only."""
    monkeypatch.setattr(exchange, "BACKOFF_S", 0.001)
    monkeypatch.delenv("MEZZOTINT_API_KEY", raising=False)
    monkeypatch.delenv("MEZZOTINT_BASE_URL", raising=False)
    with asyncio.Runner() as runner:
        closing: list[Callable[[], object]] = []

        def make(base_url: str | None = None, **options: Any) -> Talks:
            if request.param == "Client":
                client = Client(base_url=base_url, **options)
                closing.append(client.close)
                return cast(Talks, client.images)
            awaited = AsyncClient(base_url=base_url, **options)
            closing.append(lambda: runner.run(awaited.close()))
            return AwaitedImages(runner, awaited)

        yield make
        for close in closing:
            close()


@pytest.fixture(scope="module")
def scripted() -> Iterator[Script]:
    script = Script()
    with serving(script) as script.url:
        yield script


@pytest.fixture
def script(scripted: Script) -> Script:
    scripted.reset()
    return scripted


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and key of our own server with fake workers."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"),
        endpoints=(
            EndpointSettings(id="emoji", model="fake:load_s=0.3"),
            EndpointSettings(id="slow", model="fake:step_s=0.1"),
        ),
    )
    app = create_app(settings, worker="mezzotint.fake_worker:run")
    made = create_first_key(app.state.context.engine)
    assert made is not None
    with serving(app) as url:
        yield url, made[1]
