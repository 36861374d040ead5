"""Both clients behind one face, so that every test runs with either."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from mezzotint.client import AsyncClient, AsyncHandle, Event, GeneratedImage, Generation, Handle
from mezzotint.schemas import RequestState


class Talks(Protocol):
    """What the tests use of a client."""

    def generate(self, **fields: Any) -> Generation: ...
    def edit(self, **fields: Any) -> Generation: ...
    def submit(self, **fields: Any) -> Handle | Awaited: ...
    def handle(self, request_id: str) -> Handle | Awaited: ...
    def stream(self, **fields: Any) -> Iterator[Event]: ...
    def generate_many(self, requests: Iterable[Any], **options: Any) -> list[Any]: ...
    def fetch(self, picture: GeneratedImage) -> bytes: ...


class Awaited:
    """An AsyncHandle with the methods of Handle."""

    def __init__(self, runner: asyncio.Runner, handle: AsyncHandle) -> None:
        self.runner, self.handle, self.id = runner, handle, handle.id

    def status(self) -> RequestState:
        return self.runner.run(self.handle.status())

    def cancel(self) -> RequestState:
        return self.runner.run(self.handle.cancel())

    def result(self) -> Generation:
        return self.runner.run(self.handle.result())

    def events(self) -> Iterator[Event]:
        return each(self.runner, self.handle.events())


def each(runner: asyncio.Runner, events: Any) -> Iterator[Event]:
    async def following() -> Event | None:
        return await anext(events, None)

    try:
        while (event := runner.run(following())) is not None:
            yield event
    finally:
        runner.run(events.aclose())


class AwaitedImages:
    """AsyncImages with the methods of Images."""

    def __init__(self, runner: asyncio.Runner, client: AsyncClient) -> None:
        self.runner, self.images = runner, client.images

    def generate(self, **fields: Any) -> Generation:
        return self.runner.run(self.images.generate(**fields))

    def edit(self, **fields: Any) -> Generation:
        return self.runner.run(self.images.edit(**fields))

    def submit(self, **fields: Any) -> Awaited:
        return Awaited(self.runner, self.runner.run(self.images.submit(**fields)))

    def handle(self, request_id: str) -> Awaited:
        return Awaited(self.runner, self.images.handle(request_id))

    def stream(self, **fields: Any) -> Iterator[Event]:
        return each(self.runner, self.images.stream(**fields))

    def generate_many(self, requests: Iterable[Any], **options: Any) -> list[Any]:
        return self.runner.run(self.images.generate_many(requests, **options))

    def fetch(self, picture: GeneratedImage) -> bytes:
        return self.runner.run(self.images.fetch(picture))


Connect = Callable[..., Talks]
