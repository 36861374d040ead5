"""The blocking client."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
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


class Client:
    """A blocking client; safe to share between threads. Close it, or use it in a `with` statement.

    `api_key` and `base_url` come from MEZZOTINT_API_KEY and MEZZOTINT_URL when not given. `timeout` is
    in seconds and for one try; `max_retries` counts the tries after the first; `headers` go with every
    request to the server (`X-Friendli-Team`, say).
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = TIMEOUT_S,
        max_retries: int = MAX_RETRIES,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        options = Options.given(base_url, api_key, timeout, max_retries, headers)
        self._options = replace(options, fetch=self._fetch)
        self._http = httpx2.Client(**options.http())
        self.images = Images(self)
        self.adapters = Adapters(self)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fetch(self, url: str) -> bytes:
        if self._http.is_closed:
            raise MezzotintError(
                "the client is closed and the picture still behind its URL; look at it before",
                code="not_fetched",
            )
        return self._run(exchange.fetch(self._options, url))

    def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                step = steps.send(self._perform(step))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _perform(self, step: Send | float) -> httpx2.Response | MezzotintError | None:
        if isinstance(step, float):
            time.sleep(step)
            return None
        try:
            return self._http.request(**self._options.arguments(step))
        except httpx2.TransportError as error:
            return exchange.connection_error(error, step)


class Images:
    """`client.images`. Every method takes the fields of DedicatedImageGenerationBody by keyword."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._options = client._options

    def generate(
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
        return self._client._run(exchange.generate(self._options, send))

    def edit(
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
        return self.generate(timeout=timeout, idempotency_key=idempotency_key, **edited)

    def submit(
        self, *, previews: int = 0, idempotency_key: str | None = None, **fields: Unpack[ImageFields]
    ) -> Handle:
        """Hands the request in and returns at once; `previews` of each picture come with the events."""
        prefer = exchange.prefer_async(previews)
        send = exchange.build_request(self._options, fields, idempotency_key=idempotency_key, prefer=prefer)
        return Handle(self._client, self._client._run(exchange.submit(self._options, send)))

    def handle(self, request_id: str) -> Handle:
        """The handle of a request submitted earlier, perhaps by another process with the same key."""
        return Handle(self._client, request_id)

    def stream(
        self, *, previews: int = 0, idempotency_key: str | None = None, **fields: Unpack[ImageFields]
    ) -> Iterator[Event]:
        """Progress and previews as they come, Completed as the last. Leaving the loop early cancels."""
        handle = self.submit(previews=previews, idempotency_key=idempotency_key, **fields)
        return self._follow(handle)

    def _follow(self, handle: Handle) -> Iterator[Event]:
        ended = False
        try:
            for event in handle.events():
                ended = isinstance(event, Completed)
                yield event
        except MezzotintError:
            ended = True
            raise
        finally:
            if not ended:
                with contextlib.suppress(MezzotintError):
                    handle.cancel()

    @overload
    def generate_many(
        self, requests: Iterable[ImageFields], *, concurrency: int = ..., progress: bool | None = ...
    ) -> list[Generation]: ...

    @overload
    def generate_many(
        self,
        requests: Iterable[ImageFields],
        *,
        concurrency: int = ...,
        progress: bool | None = ...,
        return_errors: Literal[True],
    ) -> list[Generation | MezzotintError]: ...

    def generate_many(
        self,
        requests: Iterable[ImageFields],
        *,
        concurrency: int = CONCURRENCY,
        progress: bool | None = None,
        return_errors: bool = False,
    ) -> Any:
        """The results in the order of the requests, at most `concurrency` at a time.

        All requests are checked before the first is sent. The first error ends everything and is raised,
        unless `return_errors` puts errors in their places. `progress` None shows a bar on a terminal only.
        """
        prepared = exchange.prepare(self._options, requests, return_errors)
        results: list[Generation | MezzotintError | None] = [None] * len(prepared)
        pool = ThreadPoolExecutor(concurrency)
        try:
            with progress_bar(len(prepared), progress) as advance:
                places = {pool.submit(self._attempt, send): place for place, send in enumerate(prepared)}
                for future in as_completed(places):
                    outcome = future.result()
                    if isinstance(outcome, MezzotintError) and not return_errors:
                        raise outcome
                    results[places[future]] = outcome
                    advance()
        finally:
            pool.shutdown(cancel_futures=True)
        return results

    def _attempt(self, send: Send | MezzotintError) -> Generation | MezzotintError:
        if isinstance(send, MezzotintError):
            return send
        try:
            return self._client._run(exchange.generate(self._options, send))
        except MezzotintError as error:
            return error

    def fetch(self, picture: GeneratedImage) -> bytes:
        """The picture's file, from its URL if need be; the same as `picture.data`."""
        return picture.data


class Adapters:
    """`client.adapters`: the LoRA adapters of the server's endpoints, with an admin key."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def add(
        self, name: str, file: str | os.PathLike[str], *, scale: float = 1.0, replace: bool = False
    ) -> AdapterView:
        """Uploads a safetensors file, or a folder's, as `ID:ROUTE`; requests reach it at once."""
        return self._client._run(adapters.upload(self._client._options, name, file, scale, replace))

    def list(self, endpoint_id: str) -> list[AdapterView]:
        """The adapters of an endpoint."""
        return self._client._run(adapters.show_all(self._client._options, endpoint_id))

    def remove(self, name: str) -> AdapterView:
        """Removes `ID:ROUTE`; requests that already use it finish."""
        return self._client._run(adapters.remove(self._client._options, name))


class Handle:
    """A request that the server has accepted and works on by itself."""

    def __init__(self, client: Client, accepted: str | Generation) -> None:
        self._client = client
        self._result = accepted if isinstance(accepted, Generation) else None
        self.id = accepted if isinstance(accepted, str) else accepted.id or ""

    def status(self) -> RequestState:
        """Where the request stands now."""
        return self._ask("GET")

    def cancel(self) -> RequestState:
        """Ends the request within one denoising step; one that has ended stays as it is."""
        return self._ask("DELETE")

    def _ask(self, method: str) -> RequestState:
        if self._result is not None:
            return RequestState(id=self.id, status="done")
        return self._client._run(exchange.request_state(self._client._options, method, self.id))

    def result(self) -> Generation:
        """Waits for the pictures; the request's error is raised."""
        return next(event.result for event in self.events() if isinstance(event, Completed))

    def events(self) -> Iterator[Event]:
        """Progress and previews as they come, Completed as the last; the request's error is raised.

        A lost connection is taken up again.
        """
        if self._result is not None:
            yield Completed(self._result)
            return
        watch = exchange.Watch(self._client._options, self.id)
        while True:
            failure = None
            try:
                with self._client._http.stream(**self._client._options.arguments(watch.send)) as response:
                    if not response.is_success:
                        response.read()
                        exchange.raise_for_error(response)
                    for sse in httpx2.EventSource(response, MAX_EVENT_BYTES):
                        event = watch.read(sse)
                        if isinstance(event, Completed):
                            self._result = event.result
                        if event is not None:
                            yield event
                        if isinstance(event, Completed):
                            return
            except httpx2.TransportError as error:
                failure = error
            time.sleep(watch.pause_s(failure))
