"""The history of the database's schema, one module per revision, and the way to the newest one.

A change of the schema is a new module in `versions`, written by hand, and a new HEAD. Tests compare the
tables that the revisions make with `database.metadata`. Alembic is imported only where a database is not at
HEAD, since most starts do not need it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from mezzotint.errors import ConfigError

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0010"
"""The revision that this program needs."""
BEFORE_ALEMBIC = "0001"
"""The revision of the databases of version 0.1.0, which do not say so."""
LOCK_TIMEOUT_S = 60.0
"""How long one process waits while another upgrades the same database."""
_LOCK = 0x6D657A7A6F
"""The Postgres advisory lock that an upgrade holds."""
_VERSION = sa.table("alembic_version", sa.column("version_num"))


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What an upgrade found and did."""

    before: str | None
    """The revision found; None for an empty database."""
    after: str
    backup: Path | None = None
    """The copy of the database's file as it was; None where there was nothing to copy."""


def revision_of(connection: sa.Connection) -> str | None:
    """The revision of the database's schema; None for a database without tables of ours."""
    tables = set(sa.inspect(connection).get_table_names())
    if _VERSION.name in tables:
        return connection.scalar(sa.select(_VERSION.c.version_num))
    return BEFORE_ALEMBIC if "endpoint_versions" in tables else None


def bring_up(engine: sa.Engine) -> Upgrade:
    """Makes sure that the schema is at HEAD.

    An empty database and a SQLite file are upgraded. Postgres may serve other servers at the moment, so there
    ConfigError names the command that upgrades it.
    """
    with engine.connect() as connection:
        found = revision_of(connection)
    if found == HEAD:
        return Upgrade(found, HEAD)
    if found is not None and engine.dialect.name != "sqlite":
        _require_known(found)
        raise ConfigError(
            f"the database has schema version {found}, and this program needs {HEAD}; stop the other servers "
            "that use it, back it up, and run `mezzotint db upgrade`"
        )
    return upgrade(engine)


def upgrade(engine: sa.Engine) -> Upgrade:
    """Brings the schema to HEAD in one transaction, after a copy of a SQLite file.

    One process at a time: a second one waits, and then finds nothing to do. ConfigError means that the
    database was made by a newer program.
    """
    with engine.connect() as connection, _alone(connection):
        before = revision_of(connection)
        if before == HEAD:
            return Upgrade(before, HEAD)
        _require_known(before)
        backup = _back_up(engine) if before else None
        _run(connection, before)
    return Upgrade(before, HEAD, backup)


def _run(connection: sa.Connection, before: str | None) -> None:
    from alembic import command

    config = _config()
    config.attributes["connection"] = connection
    if before == BEFORE_ALEMBIC:
        command.stamp(config, before)
    command.upgrade(config, HEAD)


def _require_known(revision: str | None) -> None:
    from alembic.script import ScriptDirectory

    known = {each.revision for each in ScriptDirectory.from_config(_config()).walk_revisions()}
    if revision not in {None, *known}:
        raise ConfigError(
            f"the database has schema version {revision}, and this program knows {HEAD} at most; "
            "start the program that made it, or give another data_dir or database_url"
        )


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "mezzotint.server.store:migrations")
    return config


@contextlib.contextmanager
def _alone(connection: sa.Connection) -> Iterator[None]:
    """A transaction that no other process can have at the same time; committed at the end."""
    with connection.begin():
        if connection.dialect.name == "sqlite":
            usual = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
            connection.exec_driver_sql(f"PRAGMA busy_timeout={int(LOCK_TIMEOUT_S * 1000)}")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            connection.exec_driver_sql(f"PRAGMA busy_timeout={usual}")
        else:
            connection.exec_driver_sql(f"SET LOCAL statement_timeout = {int(LOCK_TIMEOUT_S * 1000)}")
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
        yield


def _back_up(engine: sa.Engine) -> Path | None:
    """Copies a SQLite database beside itself, as it was committed last."""
    if engine.dialect.name != "sqlite" or not engine.url.database:
        return None
    file = Path(engine.url.database)
    copy, part = (file.with_name(f"{file.name}.before-{HEAD}{end}") for end in ("", ".part"))
    part.unlink(missing_ok=True)
    part.touch(mode=0o600)
    with (
        contextlib.closing(sqlite3.connect(file)) as source,
        contextlib.closing(sqlite3.connect(part)) as target,
    ):
        source.backup(target)
    return part.replace(copy)
