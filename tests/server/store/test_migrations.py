"""Databases of earlier versions, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from typer.testing import CliRunner

from mezzotint.cli import app
from mezzotint.errors import ConfigError
from mezzotint.server.store import database, keys, migrations
from mezzotint.server.store.database import open_database, upgrade_database
from tests.attacks import attack
from tests.server.hosting import hosting, settings_for

SECRET = "mz_of-the-old-version"
NUM_AT_ONCE = 6


def make_0_1_0(url: str) -> None:
    """A database as version 0.1.0 left it, with one key."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement in TABLES_OF_0_1_0.split(";"):
            if statement.strip():
                connection.execute(sa.text(statement))
        connection.execute(sa.text("INSERT INTO meta VALUES ('schema_version', '1')"))
        row = "('key_old', 'old', :hash, true, '[]', '{}', 1.0, NULL)"
        connection.execute(sa.text(f"INSERT INTO keys VALUES {row}"), {"hash": keys.digest_of(SECRET)})
    engine.dispose()


def versions(url: str) -> tuple[str | None, str | None]:
    """The revision, and the version that programs without revisions see."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = migrations.revision_of(connection)
        old = connection.scalar(sa.text("SELECT value FROM meta WHERE name = 'schema_version'"))
    engine.dispose()
    return found, old


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()


def test_head_is_the_newest_revision() -> None:
    script = ScriptDirectory.from_config(migrations._config())
    assert script.get_heads() == [migrations.HEAD]
    assert script.get_bases() == [migrations.BEFORE_ALEMBIC]


def test_the_revisions_make_the_tables_that_the_program_uses(engine: sa.Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, database.metadata) == []


def layout(url: str) -> dict[str, tuple[object, ...]]:
    """Columns, primary key, indexes and unique columns of each table."""
    engine = sa.create_engine(url)
    inspector = sa.inspect(engine)
    found: dict[str, tuple[object, ...]] = {
        table: (
            [(each["name"], str(each["type"]), each["nullable"]) for each in inspector.get_columns(table)],
            inspector.get_pk_constraint(table)["constrained_columns"],
            [each["column_names"] for each in inspector.get_indexes(table)],
            [each["column_names"] for each in inspector.get_unique_constraints(table)],
        )
        for table in inspector.get_table_names()
        if table != "alembic_version"
    }
    engine.dispose()
    return found


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_first_revision_makes_the_tables_of_0_1_0(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "sqlite":
        made, old = (f"sqlite:///{tmp_path / name}" for name in ("made.db", "old.db"))
    else:
        new: Callable[[], str] = request.getfixturevalue("new_postgres")
        made, old = new(), new()
    monkeypatch.setattr(migrations, "HEAD", migrations.BEFORE_ALEMBIC)
    upgrade_database(made)
    make_0_1_0(old)
    assert layout(made) == layout(old)
    assert len(layout(old)) == 7


def test_a_database_of_0_1_0_is_upgraded_and_keeps_its_keys(database_url: str) -> None:
    make_0_1_0(database_url)
    done = upgrade_database(database_url)
    assert (done.before, done.after) == ("0001", migrations.HEAD)
    assert versions(database_url) == (migrations.HEAD, "2"), "which version 0.1.0 refuses with a sentence"
    engine = open_database(database_url)
    assert keys.authenticate(engine, SECRET).id == "key_old"
    engine.dispose()
    assert upgrade_database(database_url).backup is None, "there is nothing to do the second time"


def test_pictures_of_earlier_versions_have_no_star(database_url: str) -> None:
    make_0_1_0(database_url)
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO pictures VALUES ('owl.png', 'key_old', 1.0, '{}')"))
    engine.dispose()
    upgrade_database(database_url)
    engine = open_database(database_url)
    with engine.connect() as connection:
        assert connection.execute(sa.select(database.pictures)).all() == [
            ("owl.png", "key_old", 1.0, {}, False)
        ]
    engine.dispose()


def test_a_start_on_a_sqlite_file_of_0_1_0_upgrades_it_after_a_copy(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    settings.data_dir.mkdir()
    url = database.database_url(settings.data_dir, None)
    make_0_1_0(url)
    with hosting(settings, key=SECRET) as host:
        assert host.post().status_code == 200
    copy = settings.data_dir / f"mezzotint.db.before-{migrations.HEAD}"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert versions(f"sqlite:///{copy}") == ("0001", "1")
    with sqlite3.connect(copy) as connection:
        assert connection.execute("SELECT id FROM keys").fetchall() == [("key_old",)]
    copy.unlink()
    open_database(url).dispose()
    assert not copy.exists(), "a database at the newest version is not copied"


def test_a_start_on_a_postgres_database_of_0_1_0_names_the_command(new_postgres: Callable[[], str]) -> None:
    url = new_postgres()
    make_0_1_0(url)
    with pytest.raises(
        ConfigError, match=rf"schema version 0001, .*needs {migrations.HEAD}; .*`mezzotint db upgrade`"
    ):
        open_database(url)
    assert versions(url) == ("0001", "1"), "nothing has changed"
    upgrade_database(url)
    open_database(url).dispose()


def test_a_database_of_a_newer_program_is_left_alone(database_url: str) -> None:
    open_database(database_url).dispose()
    engine = sa.create_engine(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    for use in (open_database, upgrade_database):
        with pytest.raises(
            ConfigError, match=f"schema version 9999, and this program knows {migrations.HEAD} at most"
        ):
            use(database_url)
    assert versions(database_url)[0] == "9999"


@attack("Six servers that upgrade one database at once", outcome="one does, the others wait")
@pytest.mark.parametrize("empty", [True, False])
def test_of_many_that_start_at_once_one_upgrades(
    database_url: str, empty: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not empty:
        make_0_1_0(database_url)
    ran: list[str | None] = []
    run = migrations._run
    together = threading.Barrier(NUM_AT_ONCE)

    def counted(connection: sa.Connection, before: str | None) -> None:
        ran.append(before)
        run(connection, before)

    def start(_: int) -> None:
        together.wait(20)
        upgrade_database(database_url)
        open_database(database_url).dispose()

    monkeypatch.setattr(migrations, "_run", counted)
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        list(pool.map(start, range(NUM_AT_ONCE)))
    assert ran == [None if empty else "0001"]
    assert versions(database_url) == (migrations.HEAD, "2")


@attack("An upgrade that fails in the middle", outcome="nothing has changed")
def test_an_upgrade_that_fails_changes_nothing(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_0_1_0(database_url)
    run = migrations._run

    def failing(connection: sa.Connection, before: str | None) -> None:
        run(connection, before)
        connection.execute(sa.text("CREATE TABLE half (id INTEGER)"))
        connection.execute(sa.text("SELECT * FROM no_such_table"))

    monkeypatch.setattr(migrations, "_run", failing)
    with pytest.raises(ConfigError, match=r"cannot be opened: .*no_such_table"):
        upgrade_database(database_url)
    assert versions(database_url) == ("0001", "1")
    engine = sa.create_engine(database_url)
    assert "half" not in sa.inspect(engine).get_table_names()
    engine.dispose()


def test_the_command_upgrades_and_says_what_it_did(tmp_path: Path) -> None:
    make_0_1_0(database.database_url(tmp_path, None))
    command = ["db", "upgrade", "--data-dir", str(tmp_path), "--json"]
    copy = str(tmp_path / f"mezzotint.db.before-{migrations.HEAD}")
    for expected in (
        {"before": "0001", "after": migrations.HEAD, "backup": copy},
        {"before": migrations.HEAD, "after": migrations.HEAD, "backup": None},
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == expected


def test_the_command_upgrades_postgres_and_tells_no_password(
    new_postgres: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = new_postgres()
    make_0_1_0(url)
    monkeypatch.setenv("MEZZOTINT_DATABASE_URL", url.replace("tests@", "tests:sesame@"))
    command = ["db", "upgrade", "--data-dir", str(tmp_path)]
    for said in (f"schema version 0001 -> {migrations.HEAD}", f"at schema version {migrations.HEAD} already"):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert said in result.output
    with hosting(settings_for(tmp_path, database_url=url), key=SECRET) as host:
        assert host.post().status_code == 200
    monkeypatch.setenv("MEZZOTINT_DATABASE_URL", url.replace("tests@", "nobody:sesame@"))
    refused = CliRunner().invoke(app, command)
    assert isinstance(refused.exception, ConfigError)
    assert 'role "nobody" does not exist' in refused.exception.message
    assert "sesame" not in refused.exception.message


def test_the_revisions_are_part_of_the_package() -> None:
    folder = Path(migrations.__file__).parent
    for each in (folder, folder / "versions"):
        assert (each / "__init__.py").is_file(), "setuptools packs only folders that are packages"


TABLES_OF_0_1_0 = """
CREATE TABLE meta (
    name VARCHAR NOT NULL,
    value VARCHAR,
    PRIMARY KEY (name)
);
CREATE TABLE keys (
    id VARCHAR NOT NULL,
    name VARCHAR NOT NULL,
    hash VARCHAR(64) NOT NULL,
    admin BOOLEAN NOT NULL,
    endpoints JSON NOT NULL,
    limits JSON NOT NULL,
    created FLOAT NOT NULL,
    revoked FLOAT,
    PRIMARY KEY (id),
    UNIQUE (hash)
);
CREATE TABLE endpoints (
    id VARCHAR NOT NULL,
    version INTEGER NOT NULL,
    desired VARCHAR NOT NULL,
    from_file JSON,
    calibration JSON,
    created FLOAT NOT NULL,
    updated FLOAT NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE endpoint_versions (
    endpoint_id VARCHAR NOT NULL,
    version INTEGER NOT NULL,
    spec JSON NOT NULL,
    comment VARCHAR NOT NULL,
    created FLOAT NOT NULL,
    created_by VARCHAR NOT NULL,
    PRIMARY KEY (endpoint_id, version)
);
CREATE TABLE adapters (
    endpoint_id VARCHAR NOT NULL,
    route VARCHAR NOT NULL,
    source VARCHAR NOT NULL,
    path VARCHAR NOT NULL,
    scale FLOAT NOT NULL,
    checksum VARCHAR NOT NULL,
    facts JSON NOT NULL,
    created FLOAT NOT NULL,
    PRIMARY KEY (endpoint_id, route)
);
CREATE TABLE pictures (
    name VARCHAR NOT NULL,
    key_id VARCHAR NOT NULL,
    created FLOAT NOT NULL,
    parameters JSON NOT NULL,
    PRIMARY KEY (name)
);
CREATE INDEX pictures_of_key ON pictures (key_id, created);
CREATE TABLE usage (
    key_id VARCHAR NOT NULL,
    day VARCHAR(10) NOT NULL,
    step_seconds FLOAT NOT NULL,
    images INTEGER NOT NULL,
    PRIMARY KEY (key_id, day)
);
"""
