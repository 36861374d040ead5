"""The servers on one Postgres database ("gateways"), and which of them has which accepted request.

All functions block on the database. All times are those of its clock.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

from mezzotint.server.store import database
from mezzotint.server.threads import require_caller

DEAD_AFTER_S = 6.0
"""A gateway that has not said that it lives for this long is dead; another one takes its requests over."""
_GATEWAYS, _REQUESTS = database.gateways, database.requests
_AS_IT_CAME = ("id", "key_id", "idempotency_key", "path", "headers", "body")


@dataclass(frozen=True, slots=True)
class Kept:
    """The answer of a request that is done, for when its gateway has died."""

    content: bytes
    facts: Mapping[str, Any]
    """What its headers show: `warnings`, and the fields of an Answer that are seconds."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """A request as it came, so that any gateway can run it. Without a body it never runs again."""

    id: str
    key_id: str
    idempotency_key: str | None
    path: str
    headers: Mapping[str, str]
    body: bytes | None
    kept: Kept | None = None
    """Its answer, if it is done and need not run."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request is."""

    id: str
    owner: str
    url: str | None
    """The address of its gateway; None if that is dead."""
    may_run_again: bool


class Ledger:
    """What one gateway writes about itself and its requests, and reads of the others."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self.id = f"gw_{secrets.token_hex(6)}"

    def beat(self, url: str) -> None:
        """Says that this gateway lives, and where."""
        row = {"id": self.id, "url": url, "heartbeat": database.CLOCK, "started": database.CLOCK}
        beat = postgresql.insert(_GATEWAYS).values(row)
        beat = beat.on_conflict_do_update(index_elements=["id"], set_={"heartbeat": database.CLOCK})
        with self._engine.begin() as connection:
            connection.execute(beat)

    def leave(self) -> None:
        """Says that this gateway has ended."""
        with self._engine.begin() as connection:
            connection.execute(_GATEWAYS.delete().where(_GATEWAYS.c.id == self.id))

    def claim(self, request: Accepted) -> Place | None:
        """Writes a request down as this gateway's; the place of the one with its idempotency key, if any."""
        values = {
            "id": request.id,
            "key_id": request.key_id,
            "idempotency_key": request.idempotency_key,
            "path": request.path,
            "headers": dict(request.headers),
            "body": request.body,
            "state": "open",
            "owner": self.id,
            "updated": database.CLOCK,
        }
        insert = (
            postgresql.insert(_REQUESTS).values(values).on_conflict_do_nothing().returning(_REQUESTS.c.id)
        )
        same = (_REQUESTS.c.key_id == request.key_id) & (
            _REQUESTS.c.idempotency_key == request.idempotency_key
        )
        with self._engine.begin() as connection:
            while connection.execute(insert).first() is None:
                place = _place(connection, same)
                if place is not None:  # else it was removed between the two
                    return place
            require_caller()
        return None

    def living(self) -> set[str]:
        """The ids of the gateways that live."""
        with self._engine.connect() as connection:
            return set(connection.scalars(sa.select(_GATEWAYS.c.id).where(_lives())))

    def others(self) -> list[str]:
        """The addresses of the other gateways that live."""
        query = sa.select(_GATEWAYS.c.url).where(_lives(), _GATEWAYS.c.id != self.id)
        with self._engine.connect() as connection:
            return list(connection.scalars(query))

    def find(self, request_id: str, key_id: str) -> Place | None:
        """Where a request of this key is."""
        with self._engine.connect() as connection:
            return _place(connection, (_REQUESTS.c.id == request_id) & (_REQUESTS.c.key_id == key_id))

    def orphans(self) -> list[Place]:
        """Unfinished requests of dead gateways that may run again."""
        unfinished = (_REQUESTS.c.state == "open") & _REQUESTS.c.body.is_not(None)
        with self._engine.connect() as connection:
            rows = connection.execute(_places().where(unfinished, _GATEWAYS.c.id.is_(None))).mappings()
            return [Place(**row) for row in rows]

    def take_over(self, place: Place) -> Accepted | None:
        """The request, which is now this gateway's; None if another gateway was first or its owner lives."""
        lives = sa.exists().where(_GATEWAYS.c.id == _REQUESTS.c.owner, _lives())
        state = sa.case((_REQUESTS.c.answer.is_not(None), "done"), else_="open")
        change = (
            _REQUESTS.update()
            .where(_REQUESTS.c.id == place.id, _REQUESTS.c.owner == place.owner, ~lives)
            .where(_REQUESTS.c.body.is_not(None))
            .values(owner=self.id, state=state, updated=database.CLOCK)
            .returning(*(_REQUESTS.c[name] for name in (*_AS_IT_CAME, "answer", "answer_facts")))
        )
        with self._engine.begin() as connection:
            row = connection.execute(change).mappings().first()
        if row is None:
            return None
        kept = None if row["answer"] is None else Kept(row["answer"], row["answer_facts"])
        return Accepted(**{name: row[name] for name in _AS_IT_CAME}, kept=kept)

    def end(self, request_id: str, state: str, kept: Kept | None = None) -> None:
        """Notes how a request of this gateway has ended; a failed one frees its idempotency key."""
        values: dict[str, object] = {"state": state, "updated": database.CLOCK}
        if kept is not None:
            values |= {"answer": kept.content, "answer_facts": dict(kept.facts)}
        if state != "done":
            values |= {"idempotency_key": None, "body": None}
        with self._engine.begin() as connection:
            connection.execute(_REQUESTS.update().where(*self._own(request_id)).values(values))

    def drop(self, request_id: str) -> None:
        """Forgets a request of this gateway."""
        with self._engine.begin() as connection:
            connection.execute(_REQUESTS.delete().where(*self._own(request_id)))

    def tidy(self, known: Collection[str], ttl_s: float) -> None:
        """Forgets what nobody may ask for any more: of this gateway all but `known`, and of dead ones.

        Only what has not changed for `ttl_s` is forgotten, because `known` may be older than a new request.
        """
        old = _REQUESTS.c.updated < database.CLOCK - ttl_s
        ended = (_REQUESTS.c.state != "open") | _REQUESTS.c.body.is_(None)
        lives = sa.exists().where(_GATEWAYS.c.id == _REQUESTS.c.owner, _lives())
        own = (_REQUESTS.c.owner == self.id) & _REQUESTS.c.id.not_in(list(known))
        with self._engine.begin() as connection:
            connection.execute(_REQUESTS.delete().where(old, own | (ended & ~lives)))
            connection.execute(_GATEWAYS.delete().where(_GATEWAYS.c.heartbeat < database.CLOCK - ttl_s))

    def _own(self, request_id: str) -> tuple[sa.ColumnElement[bool], ...]:
        return _REQUESTS.c.id == request_id, _REQUESTS.c.owner == self.id


def _lives() -> sa.ColumnElement[bool]:
    return _GATEWAYS.c.heartbeat > database.CLOCK - DEAD_AFTER_S


def _places() -> sa.Select[tuple[str, str, str | None, bool]]:
    joined = _REQUESTS.outerjoin(_GATEWAYS, (_GATEWAYS.c.id == _REQUESTS.c.owner) & _lives())
    again = _REQUESTS.c.body.is_not(None).label("may_run_again")
    return sa.select(_REQUESTS.c.id, _REQUESTS.c.owner, _GATEWAYS.c.url, again).select_from(joined)


def _place(connection: sa.Connection, which: sa.ColumnElement[bool]) -> Place | None:
    row = connection.execute(_places().where(which)).mappings().first()
    return None if row is None else Place(**row)
