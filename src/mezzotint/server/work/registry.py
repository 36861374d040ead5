"""All endpoints of the server, and what the database remembers of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from pydantic import ValidationError

from mezzotint.config import EndpointSettings
from mezzotint.errors import ConflictError, NotFoundError, echo, nearest
from mezzotint.server.metrics import Metrics
from mezzotint.server.store import database
from mezzotint.server.store.keys import Key
from mezzotint.server.work.endpoints import Desired, Endpoint
from mezzotint.server.work.profiles import Calibration
from mezzotint.server.workers.process import WorkerSettings

STOP_LIMIT_S = 5.0
"""How long the server waits for the end of workers that it has told to exit and then killed."""

log = structlog.get_logger(__name__)

_ENDPOINTS, _VERSIONS = database.endpoints, database.endpoint_versions


@dataclass(frozen=True, slots=True)
class Version:
    """One entry of an endpoint's history."""

    version: int
    spec: dict[str, Any]
    comment: str
    created: float
    created_by: str


class Registry:
    """The endpoints by id. Methods that touch the database say so; call those from a thread or await them."""

    def __init__(self, engine: sa.Engine, workers: WorkerSettings, metrics: Metrics) -> None:
        self._engine = engine
        self._workers = workers
        self._metrics = metrics
        self._endpoints: dict[str, Endpoint] = {}
        self._writes: set[asyncio.Task[None]] = set()
        self._from_file: set[str] = set()
        self._changing = asyncio.Lock()
        """Held from the look at what there is until the change stands in the database and here."""

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(list(self._endpoints.values()))

    def find(self, endpoint_id: str, key: Key) -> Endpoint:
        """The endpoint, if this key may use it; the error names the nearest one that it may use."""
        endpoint = self._endpoints.get(endpoint_id) or next(
            (other for other in self if endpoint_id in other.spec.aliases), None
        )
        if endpoint is None:
            names = [other.id for other in self if key.may_use(other.id)]
            hint = nearest(endpoint_id, names)
            nearby = (
                f"did you mean {hint}?" if hint else f"this key may use {', '.join(names[:10]) or 'none'}"
            )
            raise NotFoundError(
                f"there is no endpoint {echo(endpoint_id)}; {nearby}",
                code="endpoint_not_found",
                param="model",
            )
        key.require_endpoint(endpoint.id)
        return endpoint

    def is_from_file(self, endpoint_id: str) -> bool:
        return endpoint_id in self._from_file

    # ------------------------------------------------------------ start and stop

    def load(self, from_file: tuple[EndpointSettings, ...], only: str | None = None) -> None:
        """Builds the endpoints from the configuration file and the database (blocking).

        The file wins where it has changed since it was last read; otherwise what was done through the API
        stands.
        `only` takes one endpoint alone and leaves what is remembered of the others as it is.
        """
        self._from_file = {spec.id for spec in from_file}
        with self._engine.begin() as connection:
            known = {row["id"]: row for row in connection.execute(sa.select(_ENDPOINTS)).mappings()}
            for spec in from_file:
                if only not in (None, spec.id):
                    continue
                values = spec.model_dump(mode="json")
                row = known.get(spec.id)
                if row is None:
                    self._insert(connection, spec, "from the configuration file", "configuration", values)
                elif row["from_file"] != values:
                    self._add_version(connection, spec, "the configuration file changed", "configuration")
                    connection.execute(
                        _ENDPOINTS.update()
                        .where(_ENDPOINTS.c.id == spec.id)
                        .values(from_file=values, desired=str(Desired.RUNNING))
                    )
            if only is None:
                self._drop_absent(connection, {spec.id for spec in from_file})
            query = sa.select(_ENDPOINTS).order_by(_ENDPOINTS.c.created)
            if only is not None:
                query = query.where(_ENDPOINTS.c.id == only)
            for row in connection.execute(query).mappings().all():
                self._build(connection, row)

    def start(self) -> None:
        """Starts what should run; the workers come up in the background."""
        for endpoint in self:
            if endpoint.desired is Desired.RUNNING:
                endpoint.start()
            else:
                endpoint.rest()

    async def stop(self) -> None:
        """Ends all workers; what is wanted of the endpoints stays as it was."""
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                await asyncio.gather(*(endpoint.close() for endpoint in self))
        except TimeoutError:
            log.error("workers were killed, but nothing reports their end")
        await asyncio.gather(*self._writes, return_exceptions=True)
        await asyncio.to_thread(self._workers.carrier.close)

    # ------------------------------------------------------------ changes

    async def create(self, spec: EndpointSettings, by: str, comment: str = "") -> Endpoint:
        """A new endpoint, started at once."""
        async with self._changing:
            if spec.id in self._endpoints:
                raise ConflictError(
                    f"endpoint {spec.id} exists already; update it or take another id", param="id"
                )
            await asyncio.to_thread(self._transact, lambda c: self._insert(c, spec, comment, by, None))
            endpoint = self._make(spec, 1, Desired.RUNNING)
        endpoint.start()
        return endpoint

    async def update(self, endpoint: Endpoint, spec: EndpointSettings, by: str, comment: str = "") -> int:
        """Records a new version and begins to bring it up; answers its number."""
        async with self._changing:
            if endpoint.next is not None:
                raise ConflictError(
                    f"endpoint {endpoint.id} is being updated to version {endpoint.next.version}; "
                    "wait for that"
                )
            version: int = await asyncio.to_thread(
                self._transact, lambda c: self._add_version(c, spec, comment, by)
            )
            endpoint.update(spec, version)
        return version

    async def remember(self, endpoint: Endpoint, desired: Desired) -> None:
        """Records what the owner wants, for the next start of the server."""
        await asyncio.to_thread(
            self._transact,
            lambda c: c.execute(
                _ENDPOINTS.update().where(_ENDPOINTS.c.id == endpoint.id).values(desired=str(desired))
            ),
        )

    async def delete(self, endpoint: Endpoint) -> None:
        """Forgets an endpoint and its history; it must have been terminated."""
        async with endpoint.adapters.lock:  # an adapter that is being added would outlive it
            endpoint.adapters.closed = True
            await asyncio.to_thread(self._transact, lambda c: _delete(c, endpoint.id))
        self._endpoints.pop(endpoint.id, None)

    async def history(self, endpoint_id: str) -> list[Version]:
        """The versions of an endpoint, newest first."""
        query = (
            sa.select(_VERSIONS)
            .where(_VERSIONS.c.endpoint_id == endpoint_id)
            .order_by(_VERSIONS.c.version.desc())
        )
        rows = await asyncio.to_thread(self._transact, lambda c: c.execute(query).mappings().all())
        return [
            Version(row["version"], row["spec"], row["comment"], row["created"], row["created_by"])
            for row in rows
        ]

    # ------------------------------------------------------------ rows

    def _transact(self, work: Callable[[sa.Connection], Any]) -> Any:
        with self._engine.begin() as connection:
            return work(connection)

    def _insert(
        self,
        connection: sa.Connection,
        spec: EndpointSettings,
        comment: str,
        by: str,
        from_file: dict[str, Any] | None,
    ) -> None:
        now = time.time()
        connection.execute(
            _ENDPOINTS.insert().values(
                id=spec.id,
                version=0,
                desired=str(Desired.RUNNING),
                from_file=from_file,
                created=now,
                updated=now,
            )
        )
        self._add_version(connection, spec, comment, by)

    def _add_version(self, connection: sa.Connection, spec: EndpointSettings, comment: str, by: str) -> int:
        newest = sa.select(sa.func.max(_VERSIONS.c.version)).where(_VERSIONS.c.endpoint_id == spec.id)
        version = int(connection.scalar(newest) or 0) + 1
        connection.execute(
            _VERSIONS.insert().values(
                endpoint_id=spec.id,
                version=version,
                spec=spec.model_dump(mode="json"),
                comment=comment,
                created=time.time(),
                created_by=by,
            )
        )
        connection.execute(
            _ENDPOINTS.update().where(_ENDPOINTS.c.id == spec.id).values(version=version, updated=time.time())
        )
        return version

    def _drop_absent(self, connection: sa.Connection, named: set[str]) -> None:
        """Endpoints that came from the file and no longer stand in it go."""
        query = sa.select(_ENDPOINTS.c.id, _ENDPOINTS.c.from_file)
        for row in connection.execute(query).all():
            if row.from_file is not None and row.id not in named:
                log.info("endpoint left the configuration file", endpoint=row.id)
                _delete(connection, row.id)

    def _build(self, connection: sa.Connection, row: sa.RowMapping) -> None:
        newest = sa.select(_VERSIONS.c.spec).where(
            _VERSIONS.c.endpoint_id == row["id"], _VERSIONS.c.version == row["version"]
        )
        try:
            spec = EndpointSettings.model_validate(connection.scalar(newest))
        except ValidationError as error:
            log.error(
                "stored endpoint does not fit this program; left out", endpoint=row["id"], error=str(error)
            )
            return
        calibration = Calibration.from_json(row["calibration"])
        self._make(spec, row["version"], Desired(row["desired"]), calibration, row["created"])

    def _make(
        self,
        spec: EndpointSettings,
        version: int,
        desired: Desired,
        calibration: Calibration | None = None,
        created: float | None = None,
    ) -> Endpoint:
        endpoint = Endpoint(
            spec,
            self._workers,
            self._metrics,
            version=version,
            desired=desired,
            created=created,
            calibration=calibration,
            on_calibrated=self._calibrated,
        )
        self._endpoints[spec.id] = endpoint
        return endpoint

    def _calibrated(self, endpoint: Endpoint, calibration: Calibration) -> None:
        task = asyncio.get_running_loop().create_task(self._store_calibration(endpoint.id, calibration))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def _store_calibration(self, endpoint_id: str, calibration: Calibration) -> None:
        values = calibration.to_json()
        change = _ENDPOINTS.update().where(_ENDPOINTS.c.id == endpoint_id).values(calibration=values)
        try:
            await asyncio.to_thread(self._transact, lambda c: c.execute(change))
        except sa.exc.SQLAlchemyError as error:
            log.error("calibration could not be stored", endpoint=endpoint_id, error=str(error))


def _delete(connection: sa.Connection, endpoint_id: str) -> None:
    for table, column in (
        (_VERSIONS, _VERSIONS.c.endpoint_id),
        (database.adapters, database.adapters.c.endpoint_id),
        (_ENDPOINTS, _ENDPOINTS.c.id),
    ):
        connection.execute(table.delete().where(column == endpoint_id))
