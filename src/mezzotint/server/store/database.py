"""The server's memory: keys, endpoints with their history and calibration, adapters, use per key.

SQLAlchemy Core; SQLite in WAL mode by default, Postgres by URL. The tables here are those of the newest
revision in `migrations`, which makes them on first use and upgrades older databases.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from mezzotint.errors import ConfigError, MezzotintError, UnavailableError, echo
from mezzotint.server.store import migrations

CLOCK = sa.func.date_part("epoch", sa.func.clock_timestamp())
"""Seconds since 1970 by the clock of Postgres, which all its servers have in common."""
ANSWER_TIMEOUT_S = 5.0
"""How long Postgres may take to connect or to answer."""
BUSY_TIMEOUT_S = 2.0
"""How long a write waits for another process's write (the command line beside the server)."""

metadata = sa.MetaData()

meta = sa.Table(  # for programs of version 0.1.0, which look here whether the database is theirs
    "meta", metadata, sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.String)
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("hash", sa.String(64), nullable=False, unique=True),
    sa.Column("admin", sa.Boolean, nullable=False),
    sa.Column("endpoints", sa.JSON, nullable=False),  # [] is every endpoint
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("revoked", sa.Float),
)

endpoints = sa.Table(
    "endpoints",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("desired", sa.String, nullable=False),  # running, sleeping or terminated
    sa.Column("command", sa.String),  # the last one, and how many there were: servers follow it
    sa.Column("commands", sa.Integer, nullable=False, server_default="0"),
    sa.Column("from_file", sa.JSON),  # the settings as the configuration file last gave them
    sa.Column("calibration", sa.JSON),  # see endpoints.Calibration
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("updated", sa.Float, nullable=False),
)

endpoint_versions = sa.Table(
    "endpoint_versions",
    metadata,
    sa.Column("endpoint_id", sa.String, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("comment", sa.String, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("created_by", sa.String, nullable=False),
)

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("endpoint_id", sa.String, primary_key=True),
    sa.Column("route", sa.String, primary_key=True),
    sa.Column("source", sa.String, nullable=False),
    sa.Column("path", sa.String, nullable=False),
    sa.Column("scale", sa.Float, nullable=False),
    sa.Column("checksum", sa.String, nullable=False),
    sa.Column("facts", sa.JSON, nullable=False),  # rank, bytes, target modules: as the worker reported them
    sa.Column("created", sa.Float, nullable=False),
)

pictures = sa.Table(
    "pictures",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("key_id", sa.String, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("parameters", sa.JSON, nullable=False),  # the request's fields, as the picture's file has them
    sa.Column("starred", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Index("pictures_of_key", "key_id", "created"),
)

objects = sa.Table(  # what is, or may be, in object storage
    "objects",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Index("objects_by_age", "created"),
)

held = sa.Table(  # pictures that wait on the disk of one of the servers on Postgres; empty on SQLite
    "held",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("created", sa.Float, nullable=False),
)

secrets = sa.Table(  # what servers on one Postgres database share; empty on SQLite
    "secrets",
    metadata,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),  # hex
)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("key_id", sa.String, primary_key=True),
    sa.Column("day", sa.String(10), primary_key=True),  # UTC, 2026-11-22
    sa.Column("step_seconds", sa.Float, nullable=False),
    sa.Column("images", sa.Integer, nullable=False),
)

rates = sa.Table(  # requests that keys may still send through any server on Postgres; empty on SQLite
    "rates",
    metadata,
    sa.Column("key_id", sa.String, primary_key=True),
    sa.Column("tokens", sa.Float, nullable=False),
    sa.Column("filled_at", sa.Float, nullable=False),  # by the database's clock
)

gateways = sa.Table(  # the servers on this Postgres database; empty on SQLite
    "gateways",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("url", sa.String, nullable=False),  # where the other servers reach it
    sa.Column("heartbeat", sa.Float, nullable=False),  # by the database's clock, as all times here
    sa.Column("started", sa.Float, nullable=False),
)

requests = sa.Table(  # what the servers on this Postgres database have accepted; empty on SQLite
    "requests",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("key_id", sa.String, nullable=False),
    sa.Column("idempotency_key", sa.String),  # null also once the request has failed
    sa.Column("path", sa.String, nullable=False),
    sa.Column("headers", sa.JSON, nullable=False),
    sa.Column("body", sa.LargeBinary),  # null: nobody may ask for the answer later, so it never runs again
    sa.Column("answer", sa.LargeBinary),  # of a request that is done, where it is small enough
    sa.Column("answer_facts", sa.JSON),  # see gateways.Kept
    sa.Column("state", sa.String, nullable=False),  # open, done, failed or cancelled
    sa.Column("owner", sa.String, nullable=False),  # id of a gateway
    sa.Column("updated", sa.Float, nullable=False),
    sa.UniqueConstraint("key_id", "idempotency_key"),
    sa.Index("requests_of_owner", "owner"),
)


def database_url(data_dir: Path, url: str | None) -> str:
    """The URL in force: the setting, or SQLite in the data folder."""
    return url or f"sqlite:///{data_dir / 'mezzotint.db'}"


def open_database(
    url: str, on_upgrade: Callable[[migrations.Upgrade], None] = lambda upgrade: None
) -> sa.Engine:
    """A connected engine whose schema is the newest; ConfigError when there is no such database to be had.

    `on_upgrade` is told when an older database has been upgraded first.
    """
    with _refusals(url):
        engine = _engine(url)
        try:
            done = migrations.bring_up(engine)
        except BaseException:
            engine.dispose()
            raise
        if done.before not in (None, done.after):
            on_upgrade(done)
        return engine


def upgrade_database(url: str) -> migrations.Upgrade:
    """Brings the schema to the newest revision, on Postgres too."""
    with _refusals(url):
        engine = _engine(url)
        try:
            return migrations.upgrade(engine)
        finally:
            engine.dispose()


def _engine(url: str) -> sa.Engine:
    parsed = sa.make_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    in_memory = is_sqlite and parsed.database in (None, "", ":memory:")
    pool: dict[str, Any] = {} if in_memory else {"pool_timeout": BUSY_TIMEOUT_S}
    if parsed.get_driver_name() == "psycopg":
        limit_ms = int(ANSWER_TIMEOUT_S * 1000)
        limits: dict[str, Any] = {"connect_timeout": int(ANSWER_TIMEOUT_S), "tcp_user_timeout": limit_ms}
        if "options" not in parsed.query:
            limits["options"] = f"-c statement_timeout={limit_ms}"
        pool["connect_args"] = limits
    engine = sa.create_engine(parsed, pool_pre_ping=not is_sqlite, **pool)
    if engine.dialect.name == "sqlite":
        file = engine.url.database
        if file and file != ":memory:":
            Path(file).touch(mode=0o600)  # SQLite gives its other files the mode of this one
        event.listen(engine, "connect", _prepare_sqlite)
    return engine


@contextlib.contextmanager
def _refusals(url: str) -> Iterator[None]:
    """Turns what the drivers raise into a ConfigError without the URL's password."""
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error, ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"database_url: {_without_password(url)} cannot be opened: {_reason(error)}"
        ) from None


def _without_password(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):  # no URL: nobody knows what in it is a password
        return echo(url.partition("://")[0]) + ("://..." if "://" in url else "")


def insert_new(connection: sa.Connection, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """An insert that leaves a row alone whose key is there already."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    return insert(table).on_conflict_do_nothing()


def unavailable(error: SQLAlchemyError) -> MezzotintError:
    """What a caller is told when the database does not answer (locked, gone, full): try again soon."""
    return UnavailableError(
        f"the server's database does not answer ({_reason(error)}); send the request again in a moment",
        code="database_unavailable",
        retry_after=BUSY_TIMEOUT_S,
    )


def _prepare_sqlite(connection: object, _record: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    # The time first, because the others wait for a lock too.
    for pragma in (f"busy_timeout={int(BUSY_TIMEOUT_S * 1000)}", "journal_mode=WAL", "synchronous=NORMAL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _reason(error: Exception) -> str:
    if isinstance(error, OperationalError) and error.orig is not None:
        return str(error.orig)
    return (str(error).splitlines() or [type(error).__name__])[0]
