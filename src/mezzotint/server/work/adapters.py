"""The adapter registry: which routes each endpoint has. Kept in the database, the files by their checksum.

    store = AdapterStore(engine, data_dir / "adapters")
    store.load(endpoints)                # at the start (blocking): settings, package and earlier calls
    await store.add(endpoint, adapter)   # the admin API; a running worker checks the adapter
    await store.remove(endpoint, route)
    store.registered(endpoint_id)        # blocking, needs no running server

A new route works at once and a removed one refuses new requests at once; those that were taken in before
finish with the adapter that they asked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog

from mezzotint.config import BUILT_IN_MODEL, AdapterSettings, EndpointSettings
from mezzotint.errors import (
    ConfigError,
    ConflictError,
    InvalidRequestError,
    ModelLoadError,
    NotFoundError,
    echo,
    nearest,
)
from mezzotint.messages import AdapterAdded, AdapterFailed
from mezzotint.server.store import database
from mezzotint.server.store.adapter_files import Kept, keep, remove_unused
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.spec import AdapterSpec

CONFIGURED, BUILT_IN, CALLED = "configuration", "built-in", "api"
"""Who registered an adapter."""

log = structlog.get_logger(__name__)
_TABLE = database.adapters


@dataclass(frozen=True, slots=True)
class Adapter:
    """One registered adapter; what only a worker can tell is None until one has looked at it."""

    endpoint_id: str
    route: str
    source: str
    path: Path
    scale: float
    checksum: str
    """SHA-256 (hex) of the weights."""
    created: float
    origin: str
    file_bytes: int
    family: str | None = None
    """Class of the pipeline that it was found to fit."""
    rank: int | None = None
    num_bytes: int | None = None
    """What it takes in a worker's memory."""
    target_modules: tuple[str, ...] = ()
    failure: str = ""
    """Why the worker refused it, if it did."""

    def spec(self) -> AdapterSpec:
        return AdapterSpec(self.route, str(self.path.absolute()), self.scale, self.checksum)

    def shown(self) -> dict[str, Any]:
        """What listings tell of it: everything but where the file is."""
        return {
            "name": f"{self.endpoint_id}:{self.route}",
            "route": self.route,
            "source": self.source,
            "scale": self.scale,
            "checksum": self.checksum,
            "family": self.family,
            "rank": self.rank,
            "num_bytes": self.num_bytes,
            "file_bytes": self.file_bytes,
            "target_modules": list(self.target_modules),
            "origin": self.origin,
            "created": self.created,
            "state": "failed" if self.failure else "ready" if self.family else "unchecked",
            "failure": self.failure or None,
        }


class AdapterStore:
    """All registered adapters of one data folder."""

    def __init__(self, engine: sa.Engine, folder: Path) -> None:
        self._engine = engine
        self.folder = folder
        self._removals: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ blocking; needs no server

    def registered(self, endpoint_id: str | None = None) -> list[Adapter]:
        """The registered adapters, of one endpoint or of all, by endpoint and route."""
        query = sa.select(_TABLE).order_by(_TABLE.c.endpoint_id, _TABLE.c.route)
        if endpoint_id is not None:
            query = query.where(_TABLE.c.endpoint_id == endpoint_id)
        with self._engine.begin() as connection:
            return [_adapter(row, self.folder) for row in connection.execute(query).mappings()]

    def get(self, endpoint_id: str, route: str) -> Adapter:
        """One adapter; NotFoundError names the nearest route."""
        known = {adapter.route: adapter for adapter in self.registered(endpoint_id)}
        if route not in known:
            hint = nearest(route, known)
            nearby = f"did you mean {hint}?" if hint else f"it has {', '.join(list(known)[:10]) or 'none'}"
            raise NotFoundError(
                f"endpoint {endpoint_id} has no adapter {echo(route)}; {nearby}",
                code="adapter_not_found",
                param="route",
            )
        return known[route]

    def forget(self, endpoint_id: str, route: str) -> Adapter:
        """Takes an adapter out of the database; its file goes when the server starts next."""
        adapter = self.get(endpoint_id, route)
        with self._engine.begin() as connection:
            connection.execute(
                _TABLE.delete().where(_TABLE.c.endpoint_id == endpoint_id, _TABLE.c.route == route)
            )
        return adapter

    def load(self, endpoints: Iterable[Endpoint]) -> None:
        """Brings the registry in line with the settings and tells the endpoints their adapters."""
        for endpoint in endpoints:
            self._adopt(endpoint.spec)
            endpoint.adapters.update({each.route: each.spec() for each in self.registered(endpoint.id)})
        remove_unused(self.folder, {adapter.path for adapter in self.registered()})

    async def adopt(self, endpoint: Endpoint) -> None:
        """Gives a new endpoint of a running server the adapters of its settings and of the package."""
        await asyncio.to_thread(self._adopt, endpoint.spec)
        for adapter in await asyncio.to_thread(self.registered, endpoint.id):
            await endpoint.add_adapter(adapter.spec())

    def _adopt(self, spec: EndpointSettings) -> None:
        """Registers what the settings and the package name; forgets what they no longer name."""
        known = {adapter.route: adapter for adapter in self.registered(spec.id)}
        named = {adapter.route: (CONFIGURED, adapter) for adapter in spec.adapters}
        for adapter in built_in_adapters(spec.model):
            if adapter.route not in known or known[adapter.route].origin != CALLED:
                named.setdefault(adapter.route, (BUILT_IN, adapter))
        for route, earlier in known.items():
            if earlier.origin != CALLED and route not in named:
                self.forget(spec.id, route)
        for route, (origin, adapter) in named.items():
            before = known.get(route)
            if before is not None and before.source == adapter.source and before.path.is_file():
                if (before.scale, before.origin) != (adapter.scale, origin):
                    before = self._record(replace(before, scale=adapter.scale, origin=origin))
                if not Path(adapter.source).expanduser().exists():
                    continue  # our copy stands for a source that has gone, and for a repository
            self._adopt_one(spec, adapter, origin, before)

    def _adopt_one(
        self, spec: EndpointSettings, adapter: AdapterSettings, origin: str, before: Adapter | None
    ) -> None:
        try:
            kept = keep(adapter.source, self.folder, _max_file_bytes(spec))
        except InvalidRequestError as error:
            place = f"endpoint {spec.id}, adapter {adapter.route}"
            raise ConfigError(f"{place}: {error.message}") from None
        new = _new(spec.id, adapter, kept, origin)
        if before is None or (before.path, before.source, before.scale) != (new.path, new.source, new.scale):
            self._record(new)

    # ------------------------------------------------------------ beside running endpoints

    async def add(
        self,
        endpoint: Endpoint,
        adapter: AdapterSettings,
        *,
        overwrite: bool = False,
        origin: str = CALLED,
    ) -> Adapter:
        """Registers an adapter beside running workers; one of them checks it against its model first.

        InvalidRequestError says what is wrong with the source or the file; nothing is registered then.
        """
        await asyncio.to_thread(self._require_free, endpoint.id, adapter.route, overwrite)
        kept = await asyncio.to_thread(keep, adapter.source, self.folder, _max_file_bytes(endpoint.spec))
        new = _new(endpoint.id, adapter, kept, origin)
        try:
            added = await endpoint.add_adapter(new.spec())
        except ModelLoadError as error:
            message = error.message.replace(kept.path.name, Path(adapter.source).name)
            raise InvalidRequestError(message, code=error.code, param="source") from None
        if added is not None:
            new = _checked(new, added, endpoint)
        log.info("adapter added", endpoint=endpoint.id, route=new.route, checksum=new.checksum)
        return await asyncio.to_thread(self._record, new)

    async def remove(self, endpoint: Endpoint, route: str) -> Adapter:
        """Refuses new requests for the route at once; workers forget it when the last old one has ended.

        A built-in adapter stays (ConflictError), and comes back when the one that had taken its place goes.
        """
        adapter = await asyncio.to_thread(self.get, endpoint.id, route)
        if adapter.origin == BUILT_IN:
            raise ConflictError(
                f"{endpoint.id}:{route} comes with the built-in model and cannot be removed; one of your own "
                "can take its place (replace)",
                param="route",
            )
        own = [each for each in built_in_adapters(endpoint.spec.model) if each.route == route]
        if own:
            await self.add(endpoint, own[0], overwrite=True, origin=BUILT_IN)
            return adapter
        await asyncio.to_thread(self.forget, endpoint.id, route)
        endpoint.adapters.pop(route, None)
        task = asyncio.get_running_loop().create_task(_forget_when_unused(endpoint, route))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)
        log.info("adapter removed", endpoint=endpoint.id, route=route)
        return adapter

    async def of(self, endpoint: Endpoint) -> list[Adapter]:
        """The adapters of an endpoint with what its workers have found out about them."""
        found = await asyncio.to_thread(self.registered, endpoint.id)
        return [_checked(each, endpoint.adapter_facts.get(each.route), endpoint) for each in found]

    def _require_free(self, endpoint_id: str, route: str, overwrite: bool) -> None:
        there = [each for each in self.registered(endpoint_id) if each.route == route]
        if there and not overwrite:
            way = "take another route" if there[0].origin == BUILT_IN else "remove it first"
            kind = "built-in adapter" if there[0].origin == BUILT_IN else "adapter"
            raise ConflictError(
                f"endpoint {endpoint_id} has the {kind} {route} already; {way}, or replace it", param="route"
            )

    def _record(self, adapter: Adapter) -> Adapter:
        facts = {
            "origin": adapter.origin,
            "file_bytes": adapter.file_bytes,
            "family": adapter.family,
            "rank": adapter.rank,
            "num_bytes": adapter.num_bytes,
            "target_modules": list(adapter.target_modules),
        }
        mine = sa.and_(_TABLE.c.endpoint_id == adapter.endpoint_id, _TABLE.c.route == adapter.route)
        with self._engine.begin() as connection:
            connection.execute(_TABLE.delete().where(mine))
            connection.execute(
                _TABLE.insert().values(
                    endpoint_id=adapter.endpoint_id,
                    route=adapter.route,
                    source=adapter.source,
                    path=str(adapter.path.relative_to(self.folder)),
                    scale=adapter.scale,
                    checksum=adapter.checksum,
                    facts=facts,
                    created=adapter.created,
                )
            )
        return adapter


def built_in_adapters(model: str) -> list[AdapterSettings]:
    """The adapters that come with a built-in model: the safetensors files in its folder `adapters`."""
    if model != BUILT_IN_MODEL:
        return []
    folder = Path(str(resources.files("mezzotint"))) / "models" / model / "adapters"
    return [
        AdapterSettings(route=file.stem, source=str(file)) for file in sorted(folder.glob("*.safetensors"))
    ]


async def _forget_when_unused(endpoint: Endpoint, route: str) -> None:
    while endpoint.dispatcher.uses_adapter(route):
        await endpoint.dispatcher.moved()
    if route not in endpoint.adapters:  # not registered anew meanwhile
        endpoint.remove_adapter(route)


def _max_file_bytes(spec: EndpointSettings) -> int:
    return 4 * spec.adapter_bytes  # fp32 in the file may be half in memory, and the worker counts exactly


def _new(endpoint_id: str, adapter: AdapterSettings, kept: Kept, origin: str) -> Adapter:
    return Adapter(
        endpoint_id=endpoint_id,
        route=adapter.route,
        source=adapter.source,
        path=kept.path,
        scale=adapter.scale,
        checksum=kept.checksum,
        created=time.time(),
        origin=origin,
        file_bytes=kept.num_bytes,
        rank=kept.rank,
    )


def _checked(adapter: Adapter, found: AdapterAdded | AdapterFailed | None, endpoint: Endpoint) -> Adapter:
    if isinstance(found, AdapterFailed):
        return replace(adapter, failure=found.message)
    if found is None:
        return adapter
    return replace(
        adapter,
        family=endpoint.info.pipeline_class if endpoint.info else None,
        rank=found.rank,
        num_bytes=found.num_bytes,
        target_modules=tuple(found.target_modules),
        failure="",
    )


def _adapter(row: sa.RowMapping, folder: Path) -> Adapter:
    facts = row["facts"]
    return Adapter(
        endpoint_id=row["endpoint_id"],
        route=row["route"],
        source=row["source"],
        path=folder / row["path"],
        scale=row["scale"],
        checksum=row["checksum"],
        created=row["created"],
        origin=facts["origin"],
        file_bytes=facts["file_bytes"],
        family=facts["family"],
        rank=facts["rank"],
        num_bytes=facts["num_bytes"],
        target_modules=tuple(facts["target_modules"]),
    )
