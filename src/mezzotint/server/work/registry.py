"""All endpoints of the server, and what the database remembers of them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from typing import Any

import sqlalchemy as sa
import structlog
from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError, NoResultFound

from mezzotint.config import EndpointSettings
from mezzotint.errors import ConflictError, NotFoundError, UnavailableError, echo, nearest
from mezzotint.server.metrics import Metrics
from mezzotint.server.store import database
from mezzotint.server.store.keys import Key
from mezzotint.server.threads import DATABASE, UPKEEP, require_caller
from mezzotint.server.work.endpoints import Endpoint
from mezzotint.server.work.lifecycle import DESIRED_BY, REFUSED_ONCE_TERMINATED, Command, Desired
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
CALIBRATE = "calibrate"
"""In the column `command`, beside the Commands."""
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


@dataclass(frozen=True, slots=True)
class _Row:
    """What of an endpoint's row tells a server that another one has changed it."""

    id: str
    created: float
    version: int
    commands: int
    command: str | None


@dataclass(frozen=True, slots=True)
class _Stored:
    """An endpoint as the database has it."""

    row: _Row
    spec: EndpointSettings
    desired: Desired
    calibration: Calibration | None = None
    fallback: tuple[int, EndpointSettings] | None = None
    """The last version that worked, where the row's has not been tried."""


_ROW = sa.select(*(_ENDPOINTS.c[name] for name in _Row.__dataclass_fields__)).order_by(_ENDPOINTS.c.created)


class Registry:
    """The endpoints by id. Methods that touch the database say so; call those from a thread or await them."""

    def __init__(self, engine: sa.Engine, workers: WorkerSettings, metrics: Metrics) -> None:
        self._engine = engine
        self._is_shared = engine.dialect.name != "sqlite"
        self._workers = workers
        self._metrics = metrics
        self._endpoints: dict[str, Endpoint] = {}
        """Filled by `load` and `create`, emptied by `delete`."""
        self._seen: dict[str, _Row] = {}
        """The row of each endpoint as this server has last written or carried it out."""
        self._only: str | None = None
        """The one endpoint that this server has, if it has no others; set by `load`."""
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
        self._from_file, self._only = {spec.id for spec in from_file}, only
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
                        .values(from_file=values, **_commanded(Command.RESTART))
                    )
            if only is None:
                self._drop_absent(connection, {spec.id for spec in from_file})
            query = sa.select(_ENDPOINTS).order_by(_ENDPOINTS.c.created)
            if only is not None:
                query = query.where(_ENDPOINTS.c.id == only)
            for row in connection.execute(query).mappings().all():
                self._make_if_any(self._read(connection, row), _row(row))

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
            try:
                row = await DATABASE.run(self._transact, lambda c: self._insert(c, spec, comment, by, None))
            except IntegrityError:
                text = f"endpoint {spec.id} was made at another server a moment ago"
                raise ConflictError(text, param="id") from None
            endpoint = self._make(_Stored(row, spec, Desired.RUNNING))
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
            seen = self._seen[endpoint.id]
            after = seen.version if self._is_shared else None
            version: int = await DATABASE.run(
                self._transact, lambda c: self._add_version(c, spec, comment, by, after)
            )
            self._seen[endpoint.id] = replace(seen, version=version)
            endpoint.update(spec, version)
        return version

    async def command(self, endpoint: Endpoint, command: Command, drain_s: float = math.inf) -> None:
        """Records what the owner wants, for the next start of the server, and has the endpoint do it."""
        async with self._change(endpoint, command):
            await self._record(endpoint, **_commanded(command))
            endpoint.obey(command, drain_s=drain_s)

    async def calibrate(self, endpoint: Endpoint) -> None:
        """Forgets what was measured of an endpoint and has new workers measure it, as an owner asks."""
        async with self._change(endpoint, Command.RESTART):
            await self._record(
                endpoint, **_commanded(Command.RESTART) | {"command": CALIBRATE, "calibration": None}
            )
            endpoint.calibrate()

    async def delete(self, endpoint: Endpoint) -> None:
        """Ends an endpoint's requests and workers at once and forgets it with its history."""
        async with self._change(endpoint, Command.TERMINATE), self._ending(endpoint):
            await DATABASE.run(self._transact, lambda c: _delete(c, endpoint.id))

    @contextlib.asynccontextmanager
    async def _ending(self, endpoint: Endpoint) -> AsyncIterator[None]:
        """Ends an endpoint at once; it is forgotten here after the block. The caller holds `changing`."""
        endpoint.obey(Command.TERMINATE, drain_s=0)
        await endpoint.settled()
        async with endpoint.adapters.lock:  # an adapter that is being added would outlive it
            endpoint.adapters.closed = True
            yield
        self._endpoints.pop(endpoint.id, None)
        self._seen.pop(endpoint.id, None)

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

    # ------------------------------------------------------------ other servers on the database

    async def follow(self, drain_s: float) -> None:
        """Carries out what other servers have recorded.

        Of several commands to one endpoint between two calls, the last one counts. `drain_s` is what a
        termination leaves to jobs.
        """
        rows = {row.id: row for row in await DATABASE.run(self._transact, self._rows)}
        for endpoint in self:
            if rows.get(endpoint.id) != self._seen.get(endpoint.id):
                async with endpoint.changing:
                    if self._endpoints.get(endpoint.id) is endpoint:
                        await self._catch_up(endpoint, drain_s)
        for row in rows.values():
            if row.id not in self._endpoints and row != self._seen.get(row.id):
                async with self._creating:
                    await self._take_new(row)

    async def _take_new(self, row: _Row) -> None:
        stored = await DATABASE.run(self._transact, lambda c: self._find(c, row.id))
        if row.id not in self._endpoints:
            endpoint = self._make_if_any(stored, row)
            if endpoint is not None:
                log.info("endpoint made by another server", endpoint=row.id)
                endpoint.obey(FIRST_COMMAND[endpoint.desired])

    def _rows(self, connection: sa.Connection, endpoint_id: str | None = None) -> list[_Row]:
        only = endpoint_id or self._only
        query = _ROW if only is None else _ROW.where(_ENDPOINTS.c.id == only)
        return [_row(row) for row in connection.execute(query).mappings()]

    async def _catch_up(self, endpoint: Endpoint, drain_s: float) -> None:
        """Brings one endpoint to what its row says; the caller holds `changing`, so the row is no older."""
        rows = await DATABASE.run(self._transact, lambda c: self._rows(c, endpoint.id))
        row, seen = next(iter(rows), None), self._seen[endpoint.id]
        if row is None or row.created != seen.created:
            log.info("endpoint deleted by another server", endpoint=endpoint.id)
            async with self._ending(endpoint):
                return
        if row.version not in (seen.version, (endpoint.next or endpoint.current).version):
            try:
                spec, _ = await DATABASE.run(
                    self._transact, lambda c: self._version(c, endpoint.id, row.version)
                )
                endpoint.update(spec, row.version)
            except ConflictError:
                return  # an update is under way: this one comes after it
            except ValidationError as error:
                log.error("another server's update does not fit", endpoint=endpoint.id, error=str(error))
        if row.commands != seen.commands and row.command is not None:
            if row.command == CALIBRATE:
                endpoint.calibrate()
            else:
                command = Command(row.command)
                if command in REFUSED_ONCE_TERMINATED and endpoint.desired is Desired.TERMINATED:
                    endpoint.obey(Command.RESTART)  # which came before it
                endpoint.obey(command, drain_s=drain_s if command is Command.TERMINATE else math.inf)
        self._seen[endpoint.id] = row

    # ------------------------------------------------------------ rows

    def _transact(self, work: Callable[[sa.Connection], Any]) -> Any:
        with self._engine.begin() as connection:
            result = work(connection)
            require_caller()  # who was told that a change failed must not find it done later
            return result

    async def _record(self, endpoint: Endpoint, **values: Any) -> None:
        """Writes a command down, and notes that it is this server's own."""
        change = _ENDPOINTS.update().where(_ENDPOINTS.c.id == endpoint.id).values(**values)
        count = await DATABASE.run(
            self._transact, lambda c: c.scalar(change.returning(_ENDPOINTS.c.commands))
        )
        self._seen[endpoint.id] = replace(
            self._seen[endpoint.id], commands=count, command=str(values["command"])
        )

    def _insert(
        self,
        connection: sa.Connection,
        spec: EndpointSettings,
        comment: str,
        by: str,
        from_file: dict[str, Any] | None,
    ) -> _Row:
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
        version = self._add_version(connection, spec, comment, by)
        return _Row(spec.id, now, version, 0, None)

    def _add_version(
        self,
        connection: sa.Connection,
        spec: EndpointSettings,
        comment: str,
        by: str,
        after: int | None = None,
    ) -> int:
        """Its number. ConflictError where another server has recorded one since the version `after`."""
        row = sa.select(_ENDPOINTS.c.version).where(_ENDPOINTS.c.id == spec.id).with_for_update()
        if after not in (None, connection.scalar(row)):
            raise ConflictError(f"endpoint {spec.id} was changed at another server; send the update again")
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

    def _find(self, connection: sa.Connection, endpoint_id: str) -> _Stored | None:
        row = (
            connection.execute(sa.select(_ENDPOINTS).where(_ENDPOINTS.c.id == endpoint_id)).mappings().first()
        )
        return None if row is None else self._read(connection, row)

    def _read(self, connection: sa.Connection, row: sa.RowMapping) -> _Stored | None:
        """What is known of an endpoint; None for one that this program cannot have."""
        try:
            spec, by = self._version(connection, row["id"], row["version"])
        except ValidationError as error:
            log.error(
                "stored endpoint does not fit this program; left out", endpoint=row["id"], error=str(error)
            )
            return None
        calibration = Calibration.from_json(row["calibration"])
        fallback: tuple[int, EndpointSettings] | None = None
        if calibration and 0 < calibration.version != row["version"] and by != CONFIGURATION:
            with contextlib.suppress(ValidationError, NoResultFound):  # then there is no way back
                proven, _ = self._version(connection, row["id"], calibration.version)
                fallback = (calibration.version, proven)
        return _Stored(_row(row), spec, Desired(row["desired"]), calibration, fallback)

    def _version(
        self, connection: sa.Connection, endpoint_id: str, version: int
    ) -> tuple[EndpointSettings, str]:
        """The settings of a version and who made it."""
        mine = sa.and_(_VERSIONS.c.endpoint_id == endpoint_id, _VERSIONS.c.version == version)
        row = connection.execute(sa.select(_VERSIONS.c.spec, _VERSIONS.c.created_by).where(mine)).one()
        return EndpointSettings.model_validate(row.spec), row.created_by

    def _make_if_any(self, stored: _Stored | None, row: _Row) -> Endpoint | None:
        """The endpoint; where this program cannot have it, a note of its row, so that it is said once."""
        if stored is None:
            self._seen[row.id] = row
            return None
        return self._make(stored)

    def _make(self, stored: _Stored) -> Endpoint:
        endpoint = Endpoint(
            stored.spec,
            self._workers,
            self._metrics,
            version=stored.row.version,
            desired=stored.desired,
            created=stored.row.created,
            calibration=stored.calibration,
            fallback=stored.fallback,
            on_calibrated=self._calibrated,
            on_given_up=self._given_up,
        )
        self._endpoints[endpoint.id], self._seen[endpoint.id] = endpoint, stored.row
        return endpoint

    def _calibrated(self, endpoint: Endpoint, calibration: Calibration) -> None:
        def store(connection: sa.Connection) -> Calibration | None:
            """What another server has measured first under these settings: its rows are promised."""
            mine = _ENDPOINTS.c.id == endpoint.id
            query = sa.select(_ENDPOINTS.c.calibration).where(mine).with_for_update()
            first = Calibration.from_json(connection.scalar(query))
            alike = first is not None and (first.fingerprint, first.info.form) == (
                calibration.fingerprint,
                calibration.info.form,
            )
            if self._is_shared and first and alike and first.info.rows != calibration.info.rows:
                return first
            connection.execute(_ENDPOINTS.update().where(mine).values(calibration=calibration.to_json()))
            return None

        async def write() -> None:
            first = await DATABASE.run(self._transact, store)
            if first is not None:
                endpoint.take_rows(first)

        self._write_soon(endpoint.id, write())

    def _given_up(self, endpoint: Endpoint, version: int) -> None:
        """The version that works is loaded at the next start too, unless another one has been recorded."""
        mine = (_ENDPOINTS.c.id == endpoint.id) & (_ENDPOINTS.c.version == version)
        back = endpoint.current.version
        change = _ENDPOINTS.update().where(mine).values(version=back)

        async def write() -> None:
            done = await DATABASE.run(self._transact, lambda c: c.execute(change).rowcount)
            if done and endpoint.id in self._seen:
                self._seen[endpoint.id] = replace(self._seen[endpoint.id], version=back)

        self._write_soon(endpoint.id, write())

    def _write_soon(self, endpoint_id: str, work: Coroutine[Any, Any, None]) -> None:
        async def write() -> None:
            try:
                await work
            except (sa.exc.SQLAlchemyError, UnavailableError) as error:
                log.error("endpoint could not be stored", endpoint=endpoint_id, error=str(error))

        task = asyncio.get_running_loop().create_task(write())
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)


def _row(row: sa.RowMapping) -> _Row:
    return _Row(**{name: row[name] for name in _Row.__dataclass_fields__})


def _commanded(command: Command) -> dict[str, Any]:
    """What a command changes in an endpoint's row."""
    return {
        "desired": str(DESIRED_BY[command]),
        "command": str(command),
        "commands": _ENDPOINTS.c.commands + 1,
    }


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
