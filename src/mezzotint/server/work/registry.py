"""All endpoints of the server, and what the database remembers of them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import sqlalchemy as sa
import structlog
from pydantic import ValidationError
from sqlalchemy.exc import NoResultFound

from mezzotint.config import EndpointSettings
from mezzotint.errors import ConflictError, NotFoundError, UnavailableError, echo, nearest
from mezzotint.server.metrics import Metrics
from mezzotint.server.store import database
from mezzotint.server.store.keys import Key
from mezzotint.server.threads import DATABASE, UPKEEP, require_caller
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.lifecycle import DESIRED_BY, Command, Desired
from mezzotint.server.work.profiles import Calibration
from mezzotint.server.workers.process import WorkerSettings

FIRST_COMMAND = {
    Desired.RUNNING: Command.START,
    Desired.SLEEPING: Command.SLEEP,
    Desired.TERMINATED: Command.TERMINATE,
}
"""What an endpoint is told at the start of the server."""
CONFIGURATION = "configuration"
"""Who made a version that came from the configuration file."""
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
        """Filled by `load` and `create`, emptied by `delete`."""
        self._writes: set[asyncio.Task[None]] = set()
        """Writes that nobody waits for until `stop` does."""
        self._from_file: set[str] = set()
        """The ids in the configuration file, as `load` saw them; `is_from_file` reads it."""
        self._creating = asyncio.Lock()
        """Held by `create` from its look at the ids until the new one is in the database and here."""

    def __iter__(self) -> Iterator[Endpoint]:
        return iter(list(self._endpoints.values()))

    def find(self, endpoint_id: str, key: Key) -> Endpoint:
        """The endpoint, if this key may use it; the error names the nearest one that it may use.

        To a key with a scope, what is outside of it looks the same whether it exists or not.
        """
        endpoint = self._endpoints.get(endpoint_id) or next(
            (other for other in self if endpoint_id in other.spec.aliases), None
        )
        key.require_endpoint(endpoint_id if endpoint is None else endpoint.id, endpoint_id)
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
                    self._insert(connection, spec, "from the configuration file", CONFIGURATION, values)
                elif _as_now(row["from_file"]) != values:
                    self._add_version(connection, spec, "the configuration file changed", CONFIGURATION)
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
            endpoint.obey(FIRST_COMMAND[endpoint.desired])

    async def stop(self) -> None:
        """Ends all workers; what is wanted of the endpoints stays as it was."""
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                await asyncio.gather(*(endpoint.close() for endpoint in self))
        except TimeoutError:
            log.error("workers were killed, but nothing reports their end")
        await asyncio.gather(*self._writes, return_exceptions=True)
        await UPKEEP.run(self._workers.carrier.close)

    # ------------------------------------------------------------ changes

    async def create(self, spec: EndpointSettings, by: str, comment: str = "") -> Endpoint:
        """A new endpoint, started at once."""
        async with self._creating:
            if spec.id in self._endpoints:
                raise ConflictError(
                    f"endpoint {spec.id} exists already; update it or take another id", param="id"
                )
            await DATABASE.run(self._transact, lambda c: self._insert(c, spec, comment, by, None))
            endpoint = self._make(spec, 1, Desired.RUNNING)
        endpoint.obey(Command.START)
        return endpoint

    async def update(
        self,
        endpoint: Endpoint,
        change: Callable[[EndpointSettings], EndpointSettings],
        by: str,
        comment: str = "",
    ) -> int:
        """Records a new version and begins to bring it up; answers its number.

        `change` is given the newest settings when its turn has come, so of two updates none undoes the other.
        """
        async with self._change(endpoint, Command.UPDATE):
            spec = change((endpoint.next or endpoint.current).spec)
            version: int = await DATABASE.run(
                self._transact, lambda c: self._add_version(c, spec, comment, by)
            )
            endpoint.update(spec, version)
        return version

    async def command(self, endpoint: Endpoint, command: Command, drain_s: float = math.inf) -> None:
        """Records what the owner wants, for the next start of the server, and has the endpoint do it."""
        async with self._change(endpoint, command):
            await DATABASE.run(partial(self._set_row, endpoint.id, desired=str(DESIRED_BY[command])))
            endpoint.obey(command, drain_s=drain_s)

    async def calibrate(self, endpoint: Endpoint) -> None:
        """Forgets what was measured of an endpoint and has new workers measure it, as an owner asks."""
        async with self._change(endpoint, Command.RESTART):
            values = {"calibration": None, "desired": str(Desired.RUNNING)}
            await DATABASE.run(partial(self._set_row, endpoint.id, **values))
            endpoint.calibrate()

    async def delete(self, endpoint: Endpoint) -> None:
        """Ends an endpoint's requests and workers at once and forgets it with its history."""
        async with self._change(endpoint, Command.TERMINATE):
            endpoint.obey(Command.TERMINATE, drain_s=0)
            await endpoint.settled()
            async with endpoint.adapters.lock:  # an adapter that is being added would outlive it
                endpoint.adapters.closed = True
                await DATABASE.run(self._transact, lambda c: _delete(c, endpoint.id))
            self._endpoints.pop(endpoint.id, None)

    @contextlib.asynccontextmanager
    async def _change(self, endpoint: Endpoint, command: Command) -> AsyncIterator[None]:
        """One change of an endpoint at a time; a command that is refused is refused before it is recorded."""
        async with endpoint.changing:
            if self._endpoints.get(endpoint.id) is not endpoint:
                raise NotFoundError(f"endpoint {endpoint.id} has been deleted", code="endpoint_not_found")
            endpoint.require_allowed(command)
            yield

    async def history(self, endpoint_id: str) -> list[Version]:
        """The versions of an endpoint, newest first."""
        query = (
            sa.select(_VERSIONS)
            .where(_VERSIONS.c.endpoint_id == endpoint_id)
            .order_by(_VERSIONS.c.version.desc())
        )
        rows = await DATABASE.run(self._transact, lambda c: c.execute(query).mappings().all())
        return [
            Version(row["version"], row["spec"], row["comment"], row["created"], row["created_by"])
            for row in rows
        ]

    # ------------------------------------------------------------ rows

    def _transact(self, work: Callable[[sa.Connection], Any]) -> Any:
        with self._engine.begin() as connection:
            result = work(connection)
            require_caller()  # who was told that a change failed must not find it done later
            return result

    def _set_row(self, endpoint_id: str, where: Any = sa.true(), **values: Any) -> None:  # noqa: B008
        mine = sa.and_(_ENDPOINTS.c.id == endpoint_id, where)
        self._transact(lambda c: c.execute(_ENDPOINTS.update().where(mine).values(**values)))

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
        try:
            spec, by = self._version(connection, row["id"], row["version"])
        except ValidationError as error:
            log.error(
                "stored endpoint does not fit this program; left out", endpoint=row["id"], error=str(error)
            )
            return
        calibration = Calibration.from_json(row["calibration"])
        fallback: tuple[int, EndpointSettings] | None = None
        if calibration and 0 < calibration.version != row["version"] and by != CONFIGURATION:
            with contextlib.suppress(ValidationError, NoResultFound):  # then there is no way back
                proven, _ = self._version(connection, row["id"], calibration.version)
                fallback = (calibration.version, proven)
        self._make(
            spec,
            row["version"],
            Desired(row["desired"]),
            calibration=calibration,
            created=row["created"],
            fallback=fallback,
        )

    def _version(
        self, connection: sa.Connection, endpoint_id: str, version: int
    ) -> tuple[EndpointSettings, str]:
        """The settings of a version and who made it."""
        mine = sa.and_(_VERSIONS.c.endpoint_id == endpoint_id, _VERSIONS.c.version == version)
        row = connection.execute(sa.select(_VERSIONS.c.spec, _VERSIONS.c.created_by).where(mine)).one()
        return EndpointSettings.model_validate(row.spec), row.created_by

    def _make(self, spec: EndpointSettings, version: int, desired: Desired, **known: Any) -> Endpoint:
        endpoint = Endpoint(
            spec,
            self._workers,
            self._metrics,
            version=version,
            desired=desired,
            on_calibrated=self._calibrated,
            on_given_up=self._given_up,
            **known,
        )
        self._endpoints[spec.id] = endpoint
        return endpoint

    def _calibrated(self, endpoint: Endpoint, calibration: Calibration) -> None:
        self._write_soon(endpoint.id, calibration=calibration.to_json())

    def _given_up(self, endpoint: Endpoint, version: int) -> None:
        """The version that works is loaded at the next start too, unless another one has been recorded."""
        self._write_soon(endpoint.id, _ENDPOINTS.c.version == version, version=endpoint.current.version)

    def _write_soon(self, endpoint_id: str, where: Any = sa.true(), **values: Any) -> None:  # noqa: B008
        async def write() -> None:
            try:
                await DATABASE.run(partial(self._set_row, endpoint_id, where, **values))
            except (sa.exc.SQLAlchemyError, UnavailableError) as error:
                log.error("endpoint could not be stored", endpoint=endpoint_id, error=str(error))

        task = asyncio.get_running_loop().create_task(write())
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)


def _as_now(stored: dict[str, Any] | None) -> dict[str, Any] | None:
    """Stored settings with the fields that this program has; None if it cannot read them."""
    try:
        return EndpointSettings.model_validate(stored).model_dump(mode="json")
    except ValidationError:
        return None


def _delete(connection: sa.Connection, endpoint_id: str) -> None:
    for table, column in (
        (_VERSIONS, _VERSIONS.c.endpoint_id),
        (database.adapters, database.adapters.c.endpoint_id),
        (_ENDPOINTS, _ENDPOINTS.c.id),
    ):
        connection.execute(table.delete().where(column == endpoint_id))
