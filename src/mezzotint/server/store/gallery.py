"""The gallery: which stored pictures are whose, what made them, and how long they stay.

The newest pictures of a living key stay when their URLs have expired, so that their maker finds them again;
whoever else held such a URL cannot use it any more. Methods touch the database and the disk: call them from
a thread.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import structlog

from mezzotint.errors import NotFoundError, echo
from mezzotint.images import Parameters
from mezzotint.server.store import database
from mezzotint.server.store.keys import ANONYMOUS
from mezzotint.server.store.storage import Storage

_TABLE = database.pictures
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Print:
    """One picture in the gallery."""

    name: str
    created: float
    parameters: dict[str, Any]
    """The fields of the request that gives this picture again."""


class Gallery:
    """The pictures of every key. `size` is how many of a key's newest outlive their URLs; 0 keeps none."""

    def __init__(self, engine: sa.Engine, storage: Storage, size: int) -> None:
        self._engine = engine
        self._storage = storage
        self._size = size

    def save(self, data: bytes, suffix: str, key_id: str, parameters: Parameters) -> str:
        """Stores a picture for this key and answers its name; a picture is worth more than its entry here."""
        name = self._storage.save(data, suffix)
        if not self._size:
            return name
        values = parameters.to_dict()
        row = _TABLE.insert().values(name=name, key_id=key_id, created=time.time(), parameters=values)
        try:
            with self._engine.begin() as connection:
                connection.execute(row)
        except sa.exc.SQLAlchemyError as error:
            log.warning("picture is missing from the gallery", reason=str(error).splitlines()[0])
        return name

    def list(self, key_id: str, limit: int, before: str | None = None) -> list[Print]:
        """The key's pictures, newest first, beginning after the one named `before`."""
        query = (
            sa.select(_TABLE)
            .where(_TABLE.c.key_id == key_id)
            .order_by(_TABLE.c.created.desc(), _TABLE.c.name)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            if before is not None:
                query = query.where(_TABLE.c.created < self._find(connection, before, key_id).created)
            return [_print(row) for row in connection.execute(query)]

    def remove(self, name: str, key_id: str) -> None:
        """Deletes one of the key's pictures; its URLs end with it."""
        with self._engine.begin() as connection:
            self._find(connection, name, key_id)
            connection.execute(_TABLE.delete().where(_TABLE.c.name == name))
        (self._storage.folder / name).unlink(missing_ok=True)

    def clean(self) -> tuple[int, int]:
        """Removes what is past its life; answers how many files went and how many bytes stay."""
        newest = sa.func.row_number().over(
            partition_by=_TABLE.c.key_id, order_by=(_TABLE.c.created.desc(), _TABLE.c.name)
        )
        ranked = sa.select(_TABLE.c.name, newest.label("rank")).subquery()
        beyond = sa.select(ranked.c.name).where(ranked.c.rank > self._size)
        living = sa.select(database.keys.c.id).where(database.keys.c.revoked.is_(None))
        orphan = _TABLE.c.key_id.not_in(living) & (_TABLE.c.key_id != ANONYMOUS.id)
        with self._engine.begin() as connection:
            connection.execute(_TABLE.delete().where(_TABLE.c.name.in_(beyond) | orphan))
            kept = frozenset(connection.scalars(sa.select(_TABLE.c.name)))
        return self._storage.clean(kept)

    def _find(self, connection: sa.Connection, name: str, key_id: str) -> sa.Row[Any]:
        query = sa.select(_TABLE).where(_TABLE.c.name == name, _TABLE.c.key_id == key_id)
        row = connection.execute(query).first()
        if row is None:
            raise NotFoundError(
                f"this key has no picture {echo(name)}; list its pictures to see which it has"
            )
        return row


def _print(row: sa.Row[Any]) -> Print:
    return Print(row.name, row.created, row.parameters)
