"""The client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Literal, Self, TypeVar, Unpack, cast, overload

import httpx2

from mezzotint.client import adapters, exchange
from mezzotint.client.adapters import AdapterView
from mezzotint.client.exchange import (
    CONCURRENCY,
    MAX_EVENT_BYTES,
    MAX_RETRIES,
    TIMEOUT_S,
    EditFields,
    ImageFields,
    Options,
    Send,
    Steps,
)
from mezzotint.client.progress_bar import progress_bar
from mezzotint.client.results import Completed, Event, GeneratedImage, Generation
from mezzotint.errors import MezzotintError
from mezzotint.schemas import RequestState

T = TypeVar("T")


class AsyncClient:
    """Like Client, for asyncio. Close it with `await client.close()`, or use it in `async with`."""

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._options = Options.given(base_url, api_key, timeout, max_retries, headers)
        self._http = httpx2.AsyncClient(**self._options.http())
        self.images = AsyncImages(self)
        self.adapters = AsyncAdapters(self)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                step = steps.send(await self._perform(step))
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _perform(self, step: Send | float) -> httpx2.Response | MezzotintError | None:
        if isinstance(step, float):
            await asyncio.sleep(step)
            return None
        try:
            return await self._http.request(**self._options.arguments(step))
        except httpx2.TransportError as error:
            return exchange.connection_error(error, step)


class AsyncImages:
    """`client.images` of an AsyncClient; the methods of Images, awaited."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._options = client._options

    async def generate(
        self,
        *,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[ImageFields],
    ) -> Generation:
        """Waits for the pictures. Bad fields raise InvalidRequestError before anything is sent."""
        send = exchange.build_request(
            self._options, fields, timeout_s=timeout, idempotency_key=idempotency_key
        )
        return await self._client._run(exchange.generate(self._options, send))

    async def edit(
        self,
        *,
        timeout: float | None = None,
        idempotency_key: str | None = None,
        **fields: Unpack[EditFields],
    ) -> Generation:
        """As `generate`, from the picture `image`; of `mask`, the white part is repainted.

        `submit`, `stream` and `generate_many` take `image` as well.
        """
        edited = cast(ImageFields, fields)
        return await self.generate(timeout=timeout, idempotency_key=idempotency_key, **edited)

    async def submit(
        self, *, previews: int = 0, idempotency_key: str | None = None, **fields: Unpack[ImageFields]
    ) -> AsyncHandle:
        """Hands the request in and returns at once; `previews` of each picture come with the events."""
        prefer = exchange.prefer_async(previews)
        send = exchange.build_request(self._options, fields, idempotency_key=idempotency_key, prefer=prefer)
        return AsyncHandle(self._client, await self._client._run(exchange.submit(self._options, send)))

    def handle(self, request_id: str) -> AsyncHandle:
        """As Images.handle."""
        return AsyncHandle(self._client, request_id)

    async def stream(
        self, *, previews: int = 0, idempotency_key: str | None = None, **fields: Unpack[ImageFields]
    ) -> AsyncIterator[Event]:
        """Progress and previews as they come, Completed as the last. Closing the iterator early cancels."""
        handle = await self.submit(previews=previews, idempotency_key=idempotency_key, **fields)
        ended = False
        try:
            async for event in handle.events():
                ended = isinstance(event, Completed)
                yield event
        except MezzotintError:
            ended = True
            raise
        finally:
            if not ended:
                with contextlib.suppress(MezzotintError):
                    await handle.cancel()

    @overload
    async def generate_many(
        self, requests: Iterable[ImageFields], *, concurrency: int = ..., progress: bool | None = ...
    ) -> list[Generation]: ...

    @overload
    async def generate_many(
        self,
        requests: Iterable[ImageFields],
        *,
        concurrency: int = ...,
        progress: bool | None = ...,
        return_errors: Literal[True],
    ) -> list[Generation | MezzotintError]: ...

    async def generate_many(
        self,
        requests: Iterable[ImageFields],
        *,
        concurrency: int = CONCURRENCY,
        progress: bool | None = None,
        return_errors: bool = False,
    ) -> Any:
        """As Images.generate_many."""
        prepared = exchange.prepare(self._options, requests, return_errors)
        results: list[Generation | MezzotintError | None] = [None] * len(prepared)
        waiting = iter(enumerate(prepared))
        with progress_bar(len(prepared), progress) as advance:

            async def work() -> None:
                for place, send in waiting:
                    outcome = await self._attempt(send)
                    if isinstance(outcome, MezzotintError) and not return_errors:
                        raise outcome
                    results[place] = outcome
                    advance()

            tasks = [asyncio.create_task(work()) for _ in range(min(concurrency, len(prepared)))]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return results

    async def _attempt(self, send: Send | MezzotintError) -> Generation | MezzotintError:
        if isinstance(send, MezzotintError):
            return send
        try:
            return await self._client._run(exchange.generate(self._options, send))
        except MezzotintError as error:
            return error

    async def fetch(self, picture: GeneratedImage) -> bytes:
        """The picture's file, from its URL if need be; afterwards `picture.image` and `.save` work."""
        if picture.url is not None and "data" not in vars(picture):
            picture.data = await self._client._run(exchange.fetch(self._options, picture.url))
        return picture.data


class AsyncAdapters:
    """`client.adapters` of an AsyncClient; the methods of Adapters, awaited."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def add(
        self, name: str, file: str | os.PathLike[str], *, scale: float = 1.0, replace: bool = False
    ) -> AdapterView:
        return await self._client._run(adapters.upload(self._client._options, name, file, scale, replace))

    async def list(self, endpoint_id: str) -> list[AdapterView]:
        return await self._client._run(adapters.show_all(self._client._options, endpoint_id))

    async def remove(self, name: str) -> AdapterView:
        return await self._client._run(adapters.remove(self._client._options, name))


class AsyncHandle:
    """A request that the server has accepted and works on by itself."""

    def __init__(self, client: AsyncClient, accepted: str | Generation) -> None:
        self._client = client
        self._result = accepted if isinstance(accepted, Generation) else None
        self.id = accepted if isinstance(accepted, str) else accepted.id or ""

    async def status(self) -> RequestState:
        """Where the request stands now."""
        return await self._ask("GET")

    async def cancel(self) -> RequestState:
        """Ends the request within one denoising step; one that has ended stays as it is."""
        return await self._ask("DELETE")

    async def _ask(self, method: str) -> RequestState:
        if self._result is not None:
            return RequestState(id=self.id, status="done")
        return await self._client._run(exchange.request_state(self._client._options, method, self.id))

    async def result(self) -> Generation:
        """Waits for the pictures; the request's error is raised."""
        return await anext(event.result async for event in self.events() if isinstance(event, Completed))

    async def events(self) -> AsyncIterator[Event]:
        """As Handle.events."""
        if self._result is not None:
            yield Completed(self._result)
            return
        watch = exchange.Watch(self._client._options, self.id)
        while True:
            failure = None
            try:
                arguments = self._client._options.arguments(watch.send)
                async with self._client._http.stream(**arguments) as response:
                    if not response.is_success:
                        await response.aread()
                        exchange.raise_for_error(response)
                    async for sse in httpx2.EventSource(response, MAX_EVENT_BYTES):
                        event = watch.read(sse)
                        if isinstance(event, Completed):
                            self._result = event.result
                        if event is not None:
                            yield event
                        if isinstance(event, Completed):
                            return
            except httpx2.TransportError as error:
                failure = error
            await asyncio.sleep(watch.pause_s(failure))
