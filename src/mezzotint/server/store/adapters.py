"""The record of an adapter, and the table that keeps these records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from mezzotint.messages import AdapterAdded, AdapterFailed
from mezzotint.server.store import database
from mezzotint.spec import AdapterSpec

_TABLE = database.adapters
_FACTS = ("origin", "file_bytes", "family", "rank", "num_bytes", "target_modules")
"""The fields of a record that share the column `facts`."""


class AdapterState(StrEnum):
    """What the workers said about an adapter; the values are those that listings show."""

    REGISTERED = "unchecked"
    CHECKED = "ready"
    REFUSED = "failed"


class Origin(StrEnum):
    """Who registered an adapter."""

    CONFIGURATION = "configuration"
    BUILT_IN = "built-in"
    API = "api"


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter of one endpoint, from its registration on: REGISTERED, then CHECKED or REFUSED."""

    endpoint_id: str
    route: str
    source: str
    path: Path
    scale: float
    checksum: str
    """SHA-256 (hex) of the weights."""
    created: float
    origin: Origin
    file_bytes: int
    rank: int | None = None
    """As the file's header shows it; once CHECKED, as the worker counted it."""
    state: AdapterState = AdapterState.REGISTERED
    family: str | None = None
    """Class of the pipeline that it fits; None unless CHECKED."""
    num_bytes: int | None = None
    """Its size in a worker's memory; None unless CHECKED."""
    target_modules: tuple[str, ...] = ()
    """The modules that it changes; empty unless CHECKED."""
    failure: str = ""
    """Why a worker refused it; empty unless REFUSED."""
    failure_code: str = ""

    @property
    def spec(self) -> AdapterSpec:
        return AdapterSpec(self.route, str(self.path.absolute()), self.scale, self.checksum)

    def after(self, answer: AdapterAdded | AdapterFailed, family: str | None) -> Adapter:
        """The record once a worker with a pipeline of this class has answered."""
        if isinstance(answer, AdapterFailed):
            return replace(self, state=AdapterState.REFUSED, failure=answer.message, failure_code=answer.code)
        return replace(
            self,
            state=AdapterState.CHECKED,
            family=family,
            rank=answer.rank,
            num_bytes=answer.num_bytes,
            target_modules=tuple(answer.target_modules),
            failure="",
            failure_code="",
        )

    def shown(self) -> dict[str, Any]:
        """What listings show: everything but the place of the file."""
        hidden = ("endpoint_id", "path", "failure_code")
        shown = {name: value for name, value in asdict(self).items() if name not in hidden}
        return shown | {"name": f"{self.endpoint_id}:{self.route}", "failure": self.failure or None}


class AdapterTable:
    """The records in the database. Its methods block: call them from a thread."""

    def __init__(self, engine: sa.Engine, folder: Path) -> None:
        self._engine = engine
        self.folder = folder
        """Where the files lie; the table holds their paths relative to it."""

    def list(self, endpoint_id: str | None = None) -> list[Adapter]:
        """The adapters of one endpoint or of all, by endpoint and route."""
        query = sa.select(_TABLE).order_by(_TABLE.c.endpoint_id, _TABLE.c.route)
        if endpoint_id is not None:
            query = query.where(_TABLE.c.endpoint_id == endpoint_id)
        with self._engine.begin() as connection:
            return [_adapter(row, self.folder) for row in connection.execute(query).mappings()]

    def places(self) -> dict[str, dict[str, tuple[Path, float]]]:
        """By endpoint and route: file and scale, which tell whether a route has been changed."""
        names = ("endpoint_id", "route", "path", "scale")
        found: dict[str, dict[str, tuple[Path, float]]] = {}
        with self._engine.begin() as connection:
            for row in connection.execute(sa.select(*(_TABLE.c[name] for name in names))):
                found.setdefault(row.endpoint_id, {})[row.route] = (self.folder / row.path, row.scale)
        return found

    def save(self, adapter: Adapter) -> None:
        """Stores a record in place of an earlier one of the same endpoint and route."""
        facts = {name: getattr(adapter, name) for name in _FACTS}
        with self._engine.begin() as connection:
            connection.execute(_TABLE.delete().where(_of(adapter)))
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

    def delete(self, adapter: Adapter) -> None:
        """Forgets a record; its file goes when the server starts next."""
        with self._engine.begin() as connection:
            connection.execute(_TABLE.delete().where(_of(adapter)))


def _of(adapter: Adapter) -> sa.ColumnElement[bool]:
    return (_TABLE.c.endpoint_id == adapter.endpoint_id) & (_TABLE.c.route == adapter.route)


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
        origin=Origin(facts["origin"]),
        file_bytes=facts["file_bytes"],
        rank=facts["rank"],
        state=AdapterState.CHECKED if facts["family"] else AdapterState.REGISTERED,
        family=facts["family"],
        num_bytes=facts["num_bytes"],
        target_modules=tuple(facts["target_modules"]),
    )
