"""API keys: made, listed, revoked and checked against the database, which holds only their SHA-256.

The command line calls these functions on the data folder directly. A running server sees a change with the
next request, because every request asks the database.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import sqlalchemy as sa

from mezzotint.errors import (
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    echo,
    nearest,
)
from mezzotint.server.store import database

PREFIX = "mz_"
MAX_NAME = 100
MIN_WEIGHT, MAX_WEIGHT = 0.01, 1000.0
MAX_PRIORITY = 10
_TABLE = database.keys
_BY_HASH = sa.select(_TABLE).where(_TABLE.c.hash == sa.bindparam("digest"))
"""Every request asks it, so it is made once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one key; None is no limit."""

    requests_per_minute: float | None = None
    step_seconds_per_day: float | None = None
    weight: float = 1.0
    """Share of a busy endpoint relative to other keys of the same priority."""
    priority: int = 0
    """Keys of higher priority go first, but requests that have waited `max_wait_s` take turns with them."""


@dataclass(frozen=True, slots=True)
class Key:
    """An API key without its secret. An empty `endpoints` means every endpoint."""

    id: str
    name: str
    admin: bool = False
    endpoints: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    created: float = 0.0
    revoked: float | None = None

    def may_use(self, endpoint_id: str) -> bool:
        return self.admin or not self.endpoints or endpoint_id in self.endpoints

    def require_endpoint(self, endpoint_id: str, name: str = "") -> None:
        """PermissionDeniedError unless it may use the endpoint, which the request may call `name`."""
        if not self.may_use(endpoint_id):
            raise PermissionDeniedError(
                f"this key may not use endpoint {echo(name or endpoint_id)}; "
                f"it may use {', '.join(self.endpoints)}",
                param="model",
            )

    def require_admin(self) -> None:
        if not self.admin:
            raise PermissionDeniedError(
                "only an admin key may do this; make one with `mezzotint keys create NAME --admin`",
                code="forbidden",
            )


ANONYMOUS = Key("anonymous", "anonymous", admin=True)
"""Everybody, on a server that runs without authentication."""


def require_sensible(name: str, admin: bool, endpoints: Sequence[str], limits: Limits) -> None:
    """InvalidRequestError for a key that could do nothing, and for a name that nobody can mean."""
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME:
        raise _nonsense("name", f"must be 1 to {MAX_NAME} printable characters (got {echo(name)})")
    if name.startswith(PREFIX):
        raise _nonsense("name", f"must not begin with {PREFIX}, as keys do: a name is shown in lists")
    if admin and endpoints:
        raise _nonsense("endpoint", "has no effect on an admin key, which may use every one; leave one out")
    for field_name in ("requests_per_minute", "step_seconds_per_day", "weight"):
        value = getattr(limits, field_name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise _nonsense(field_name, f"must be above 0 (got {value}); leave it out for none")
    if not MIN_WEIGHT <= limits.weight <= MAX_WEIGHT:
        raise _nonsense("weight", f"must be {MIN_WEIGHT} to {MAX_WEIGHT} (got {limits.weight:g})")
    if abs(limits.priority) > MAX_PRIORITY:
        raise _nonsense("priority", f"must be {-MAX_PRIORITY} to {MAX_PRIORITY} (got {limits.priority})")


def require_endpoints(engine: sa.Engine, endpoint_ids: Sequence[str]) -> None:
    """InvalidRequestError names the first that this database does not know, and the nearest one."""
    with engine.connect() as connection:
        known = list(connection.scalars(sa.select(database.endpoints.c.id)))
    for endpoint_id in endpoint_ids:
        if known and endpoint_id not in known:
            hint = nearest(endpoint_id, known)
            nearby = f"did you mean {hint}?" if hint else f"there are {', '.join(known[:10])}"
            raise _nonsense("endpoint", f"{echo(endpoint_id)} is no endpoint; {nearby}")


def _nonsense(param: str, text: str) -> InvalidRequestError:
    return InvalidRequestError(f"--{param.replace('_', '-')} {text}", param=param)


def create_key(
    engine: sa.Engine,
    name: str,
    *,
    admin: bool = False,
    endpoints: Sequence[str] = (),
    limits: Limits | None = None,
) -> tuple[Key, str]:
    """A new key and its secret, which is not stored and cannot be shown again."""
    require_sensible(name, admin, endpoints, limits or Limits())
    with _alone(engine) as connection:
        taken = connection.scalar(
            sa.select(_TABLE.c.id).where(_TABLE.c.name == name, _TABLE.c.revoked.is_(None))
        )
        if taken is not None:
            raise ConflictError(
                f"a key named {echo(name)} exists already ({taken}); revoke it or take another name"
            )
        return _insert(connection, name, admin, endpoints, limits or Limits())


def create_first_key(engine: sa.Engine) -> tuple[Key, str] | None:
    """Makes an admin key, to be printed once, on a database that never had a key; None on any other."""
    with _alone(engine) as connection:
        if connection.scalar(sa.select(sa.func.count()).select_from(_TABLE)):
            return None
        return _insert(connection, "first", True, (), Limits())


@contextlib.contextmanager
def _alone(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction beside which nobody makes a key, so that what it has looked for stays true."""
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.exec_driver_sql("LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE")
        yield connection


def _insert(
    connection: sa.Connection, name: str, admin: bool, endpoints: Sequence[str], limits: Limits
) -> tuple[Key, str]:
    secret = PREFIX + secrets.token_urlsafe(32)
    key = Key(f"key_{secrets.token_hex(6)}", name, admin, tuple(endpoints), limits, time.time())
    connection.execute(
        _TABLE.insert().values(
            id=key.id,
            name=name,
            hash=digest_of(secret),
            admin=admin,
            endpoints=list(key.endpoints),
            limits=asdict(limits),
            created=key.created,
        )
    )
    return key, secret


def list_keys(engine: sa.Engine) -> list[Key]:
    with engine.connect() as connection:
        return [
            _key(row) for row in connection.execute(sa.select(_TABLE).order_by(_TABLE.c.created)).mappings()
        ]


def revoke_key(engine: sa.Engine, name_or_id: str) -> Key:
    """Ends a key at once; NotFoundError lists the names of the live keys."""
    with engine.begin() as connection:
        rows = connection.execute(
            sa.select(_TABLE).where(
                sa.or_(_TABLE.c.id == name_or_id, _TABLE.c.name == name_or_id), _TABLE.c.revoked.is_(None)
            )
        )
        found = rows.mappings().first()
        if found is None:
            names = connection.scalars(sa.select(_TABLE.c.name).where(_TABLE.c.revoked.is_(None))).all()
            raise NotFoundError(
                f"no live key is named {echo(name_or_id)}; there are {', '.join(names) or 'none'}"
            )
        connection.execute(_TABLE.update().where(_TABLE.c.id == found["id"]).values(revoked=time.time()))
    return _key(found)


def delete_key(engine: sa.Engine, key_id: str) -> None:
    """Ends a key and removes its row, for a key that a command made for its own use."""
    with engine.begin() as connection:
        connection.execute(_TABLE.delete().where(_TABLE.c.id == key_id))


def authenticate(engine: sa.Engine, secret: str) -> Key:
    """The live key that this secret belongs to; AuthenticationError for every other string."""
    digest = digest_of(secret)
    with engine.connect() as connection:
        row = connection.execute(_BY_HASH, {"digest": digest}).mappings().first()
    # The index's comparison takes a time that depends on the hash, which tells nothing of 256 random bits.
    if row is None or not hmac.compare_digest(row["hash"], digest) or row["revoked"] is not None:
        raise AuthenticationError(
            "this API key is unknown or has been revoked; ask the server's owner for another"
        )
    return _key(row)


def live_key(engine: sa.Engine, key_id: str) -> Key:
    """The key of this id; AuthenticationError if it has been revoked since."""
    if key_id == ANONYMOUS.id:
        return ANONYMOUS
    with engine.connect() as connection:
        live = sa.select(_TABLE).where(_TABLE.c.id == key_id, _TABLE.c.revoked.is_(None))
        row = connection.execute(live).mappings().first()
    if row is None:
        raise AuthenticationError("the API key of this request has been revoked")
    return _key(row)


def digest_of(secret: str) -> str:
    """The SHA-256 (hex) by which the database knows a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _key(row: Mapping[str, object] | sa.RowMapping) -> Key:
    return Key(
        id=str(row["id"]),
        name=str(row["name"]),
        admin=bool(row["admin"]),
        endpoints=tuple(row["endpoints"]),  # type: ignore[arg-type]
        limits=Limits(**row["limits"]),  # type: ignore[arg-type]
        created=float(row["created"]),  # type: ignore[arg-type]
        revoked=row["revoked"],  # type: ignore[arg-type]
    )
