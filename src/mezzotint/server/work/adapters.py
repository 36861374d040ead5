"""The adapter registry: adds, removes and restores adapters so that database, workers and requests agree.

    adapters = AdapterRegistry(engine, data_dir / "adapters")
    adapters.load(registry)                    # at the start (blocking): settings, package and earlier calls
    await adapters.add(endpoint, settings)     # the admin API; the running workers check the adapter
    await adapters.remove(endpoint, route)

A new route works at once and a removed one refuses new requests at once; requests that were taken in before
finish with the adapter that they asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog

from mezzotint.config import BUILT_IN_MODEL, AdapterSettings, EndpointSettings
from mezzotint.errors import (
    ConfigError,
    ConflictError,
    InvalidRequestError,
    ModelLoadError,
    NotFoundError,
    UnavailableError,
    echo,
    nearest,
)
from mezzotint.server.store.adapter_files import AdapterFile, copy_source, remove_unused
from mezzotint.server.store.adapters import Adapter, AdapterTable, Origin
from mezzotint.server.threads import DATABASE, FILES, SOURCES, UPKEEP
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.registry import Registry

log = structlog.get_logger(__name__)
FETCH_AGAIN_S = 10.0
Result = TypeVar("Result")
Fetch = Callable[[Adapter, int], Awaitable[bool]]
"""Gets the file of an adapter, of at most so many bytes, from another server; whether it is here now."""


class AdapterRegistry:
    """The adapters of all endpoints of one data folder."""

    def __init__(self, engine: sa.Engine, folder: Path) -> None:
        self.table = AdapterTable(engine, folder)
        self._is_shared = engine.dialect.name != "sqlite"
        self._following: set[str] = set()
        """Endpoints that are being brought to what another server has changed."""
        self._fetch_again: dict[Path, float] = {}
        """Files that no server could give, and when to ask again, on the event loop's clock."""
        self._changes: set[asyncio.Task[Any]] = set()
        """Changes in progress, referenced here so that they are not collected before their end."""

    # ------------------------------------------------------------ at the start

    def load(self, registry: Registry) -> None:
        """Brings the records in line with the settings and tells the endpoints their adapters (blocking)."""
        for endpoint in registry:
            self._adopt(endpoint.spec, registry.is_from_file(endpoint.id))
            for adapter in self.table.list(endpoint.id):
                if adapter.path.is_file() or not self._is_shared:  # else `follow` fetches it first
                    endpoint.adapters.publish(adapter)
        remove_unused(self.table.folder, {adapter.path for adapter in self.table.list()})

    def _adopt(self, spec: EndpointSettings, from_file: bool) -> None:
        """Registers what file and package name; forgets what they no longer name.

        The adapters named when an endpoint was created by API are its own from then on: they are added at
        creation, and whoever removes one has removed it.
        """
        known = {adapter.route: adapter for adapter in self.table.list(spec.id)}
        own_origins = (Origin.API,) if from_file else (Origin.API, Origin.CONFIGURATION)
        named = {each.route: (Origin.CONFIGURATION, each) for each in spec.adapters if from_file}
        for each in built_in_adapters(spec.model):
            if each.route not in known or known[each.route].origin not in own_origins:
                named.setdefault(each.route, (Origin.BUILT_IN, each))
        for route, earlier in known.items():
            if earlier.origin not in own_origins and route not in named:
                self.table.delete(earlier)
        for route, (origin, settings) in named.items():
            self._adopt_one(spec, settings, origin, known.get(route))

    def _adopt_one(
        self, spec: EndpointSettings, settings: AdapterSettings, origin: Origin, before: Adapter | None
    ) -> None:
        if before is not None and before.source == settings.source and before.path.is_file():
            if (before.scale, before.origin) != (settings.scale, origin):
                before = replace(before, scale=settings.scale, origin=origin)
                self.table.save(before)
            if not Path(settings.source).expanduser().exists():
                return  # our copy replaces a source that has gone, and a repository
        new = self._register(spec, settings, origin)
        if before is None or (before.path, before.source, before.scale) != (new.path, new.source, new.scale):
            self.table.save(new)

    def _register(self, spec: EndpointSettings, settings: AdapterSettings, origin: Origin) -> Adapter:
        try:
            file = copy_source(settings.source, self.table.folder, _max_file_bytes(spec))
        except InvalidRequestError as error:
            raise ConfigError(f"endpoint {spec.id}, adapter {settings.route}: {error.message}") from None
        return _registered(spec.id, settings, file, origin)

    # ------------------------------------------------------------ other servers on the database

    async def follow(self, registry: Registry, fetch: Fetch) -> None:
        """Begins to open and close the routes that other servers have changed."""
        places = await DATABASE.run(self.table.places)
        for endpoint in registry:
            here = {route: (each.path, each.scale) for route, each in endpoint.adapters.items()}
            if here != places.get(endpoint.id, {}) and endpoint.id not in self._following:
                self._following.add(endpoint.id)
                self._start(self._catch_up(endpoint, fetch))

    async def _catch_up(self, endpoint: Endpoint, fetch: Fetch) -> None:
        try:
            for adapter in await DATABASE.run(self.table.list, endpoint.id):
                await self._get(endpoint, adapter, fetch)
            async with endpoint.adapters.lock:  # a change of this server's own has reached all places
                records = await DATABASE.run(self.table.list, endpoint.id)
                if not endpoint.adapters.closed:
                    self._bring_in_line(endpoint, {each.route: each for each in records})
        except (sa.exc.SQLAlchemyError, UnavailableError) as error:
            log.error("another server's adapters cannot be read", endpoint=endpoint.id, error=str(error))
        finally:
            self._following.discard(endpoint.id)

    async def _get(self, endpoint: Endpoint, adapter: Adapter, fetch: Fetch) -> None:
        """Has an adapter's file here, if that can be; FETCH_AGAIN_S after it could not."""
        now = asyncio.get_running_loop().time()
        if adapter.path.is_file() or now < self._fetch_again.get(adapter.path, 0.0):
            return
        if await fetch(adapter, _max_file_bytes(endpoint.spec)):
            self._fetch_again.pop(adapter.path, None)
        else:
            self._fetch_again[adapter.path] = now + FETCH_AGAIN_S
            log.error(
                "no server that lives has the adapter's file", endpoint=endpoint.id, route=adapter.route
            )

    def _bring_in_line(self, endpoint: Endpoint, records: dict[str, Adapter]) -> None:
        for route, record in records.items():
            here = endpoint.adapters.get(route)
            changed = here is None or (here.path, here.scale) != (record.path, record.scale)
            if changed and record.path.is_file():
                endpoint.adapters.announce([record])
        for route in endpoint.adapters.keys() - records.keys():
            endpoint.adapters.close_route(route)
            self._start(_forget_when_unused(endpoint, route))

    # ------------------------------------------------------------ beside running endpoints

    async def adopt(self, endpoint: Endpoint) -> None:
        """Gives a new endpoint of a running server the adapters of its settings and of the package."""
        spec = endpoint.spec
        async with endpoint.adapters.lock:
            for settings in spec.adapters:
                new = await SOURCES.run(self._register, spec, settings, Origin.API)
                await DATABASE.run(self.table.save, new)
            await UPKEEP.run(self._adopt, spec, False)
            endpoint.adapters.announce(await DATABASE.run(self.table.list, endpoint.id))

    async def add(
        self,
        endpoint: Endpoint,
        settings: AdapterSettings,
        *,
        overwrite: bool = False,
        upload: Path | None = None,
    ) -> Adapter:
        """Registers an adapter that every running worker has checked against its model.

        InvalidRequestError says what is wrong with the source or the file. ConflictError means that the route
        is taken. Nothing has changed then. A caller that is cancelled does not stop what has begun.
        `upload` is a file of the caller's own that is taken instead of the source's.
        """
        _require_free(endpoint, settings.route, overwrite)  # before anything is downloaded
        return await self._finish(self._add(endpoint, settings, overwrite, upload))

    def require_room_for(self, endpoint: Endpoint, route: str, *, overwrite: bool) -> int:
        """The most bytes that a new adapter's file may have; ConflictError where the route is taken."""
        _require_free(endpoint, route, overwrite)
        return _max_file_bytes(endpoint.spec)

    async def remove(self, endpoint: Endpoint, route: str) -> Adapter:
        """Refuses new requests for the route at once; workers forget it when the last old one has ended.

        A built-in adapter stays (ConflictError), and comes back when the one that had taken its place goes.
        """
        return await self._finish(self._remove(endpoint, route))

    async def _add(
        self, endpoint: Endpoint, settings: AdapterSettings, overwrite: bool, upload: Path | None
    ) -> Adapter:
        source, max_bytes = str(upload or settings.source), _max_file_bytes(endpoint.spec)
        file = await SOURCES.run(copy_source, source, self.table.folder, max_bytes)
        async with endpoint.adapters.lock:  # nobody waits for another's download, and one of two is first
            _require_free(endpoint, settings.route, overwrite)
            return await self._put(endpoint, _registered(endpoint.id, settings, file, Origin.API))

    async def _put(self, endpoint: Endpoint, new: Adapter) -> Adapter:
        """Checks and stores a record and opens its route; the caller holds the endpoint's lock."""
        try:
            checked = await endpoint.adapters.check(new)
        except ModelLoadError as error:
            message = error.message.replace(new.path.name, Path(new.source).name)
            raise InvalidRequestError(message, code=error.code, param="source") from None
        try:
            await DATABASE.run(self.table.save, checked)
        except BaseException:
            endpoint.adapters.withdraw()
            raise
        endpoint.adapters.publish(checked)
        log.info("adapter added", endpoint=endpoint.id, route=new.route, checksum=new.checksum)
        return checked

    async def _remove(self, endpoint: Endpoint, route: str) -> Adapter:
        async with endpoint.adapters.lock:
            adapter = _require_adapter(endpoint, route)
            if adapter.origin is Origin.BUILT_IN:
                raise ConflictError(
                    f"{endpoint.id}:{route} comes with the built-in model and cannot be removed; one of your "
                    "own can take its place (replace)",
                    param="route",
                )
            own = [each for each in built_in_adapters(endpoint.spec.model) if each.route == route]
            if own:
                spec = endpoint.spec
                new = await FILES.run(self._register, spec, own[0], Origin.BUILT_IN)
                await self._put(endpoint, new)
                return adapter
            await DATABASE.run(self.table.delete, adapter)
            endpoint.adapters.close_route(route)
        self._start(_forget_when_unused(endpoint, route))
        log.info("adapter removed", endpoint=endpoint.id, route=route)
        return adapter

    async def _finish(self, change: Coroutine[Any, Any, Result]) -> Result:
        """Runs a change to its end even if its caller is cancelled: half a change is in no place whole."""
        return await asyncio.shield(self._start(change))

    def _start(self, change: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.get_running_loop().create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return task


def built_in_adapters(model: str) -> list[AdapterSettings]:
    """The adapters that come with a built-in model: the safetensors files in its folder `adapters`."""
    if model != BUILT_IN_MODEL:
        return []
    folder = Path(str(resources.files("mezzotint"))) / "models" / model / "adapters"
    return [
        AdapterSettings(route=file.stem, source=str(file)) for file in sorted(folder.glob("*.safetensors"))
    ]


def _require_free(endpoint: Endpoint, route: str, overwrite: bool) -> None:
    if endpoint.adapters.closed:
        raise NotFoundError(f"endpoint {endpoint.id} has been deleted", code="endpoint_not_found")
    there = endpoint.adapters.get(route)
    if there is not None and not overwrite:
        built_in = there.origin is Origin.BUILT_IN
        way = "take another route" if built_in else "remove it first"
        kind = "built-in adapter" if built_in else "adapter"
        raise ConflictError(
            f"endpoint {endpoint.id} has the {kind} {route} already; {way}, or replace it", param="route"
        )


def _require_adapter(endpoint: Endpoint, route: str) -> Adapter:
    known = endpoint.adapters
    if route not in known:
        hint = nearest(route, known)
        nearby = f"did you mean {hint}?" if hint else f"it has {', '.join(sorted(known)[:10]) or 'none'}"
        raise NotFoundError(
            f"endpoint {endpoint.id} has no adapter {echo(route)}; {nearby}",
            code="adapter_not_found",
            param="route",
        )
    return known[route]


async def _forget_when_unused(endpoint: Endpoint, route: str) -> None:
    while endpoint.dispatcher.uses_adapter(route):
        await endpoint.dispatcher.moved()
    async with endpoint.adapters.lock:
        endpoint.adapters.forget(route)


def _max_file_bytes(spec: EndpointSettings) -> int:
    return 4 * spec.adapter_bytes  # fp32 in the file may be half in memory, and the worker counts exactly


def _registered(endpoint_id: str, settings: AdapterSettings, file: AdapterFile, origin: Origin) -> Adapter:
    return Adapter(
        endpoint_id=endpoint_id,
        route=settings.route,
        source=settings.source,
        path=file.path,
        scale=settings.scale,
        checksum=file.checksum,
        created=time.time(),
        origin=origin,
        file_bytes=file.num_bytes,
        rank=file.rank,
    )
