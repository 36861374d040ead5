"""Keys against real databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mezzotint.errors import (
    AuthenticationError,
    ConfigError,
    ConflictError,
    NotFoundError,
    PermissionDeniedError,
)
from mezzotint.server.store import database, keys
from mezzotint.server.store.keys import Limits
from tests.attacks import attack


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = database.open_database(database_url)
    yield engine
    engine.dispose()


def test_a_key_is_found_by_its_secret_and_by_nothing_else(engine: sa.Engine) -> None:
    limits = Limits(requests_per_minute=5, weight=2.0)
    key, secret = keys.create_key(engine, "ada", endpoints=["one"], limits=limits)
    assert keys.authenticate(engine, secret) == key
    assert (key.endpoints, key.limits) == (("one",), limits)
    for wrong in (secret[:-1], secret + "x", "", key.id, "mz_'; drop table keys; --", "\ud800"):
        with pytest.raises(AuthenticationError):
            keys.authenticate(engine, wrong)


def test_a_key_made_before_there_were_priorities_has_the_ordinary_one(engine: sa.Engine) -> None:
    _, secret = keys.create_key(engine, "old", limits=Limits(weight=2.0))
    old = {"requests_per_minute": None, "step_seconds_per_day": None, "weight": 2.0}
    with engine.begin() as connection:
        connection.execute(database.keys.update().values(limits=old))
    assert keys.authenticate(engine, secret).limits == Limits(weight=2.0, priority=0)


@attack("Reading keys out of the database", outcome="it has their hashes only")
def test_secrets_are_random_and_only_their_hash_is_stored(engine: sa.Engine, tmp_path: Path) -> None:
    secrets = {keys.create_key(engine, f"key{number}")[1] for number in range(20)}
    assert len(secrets) == 20
    stored = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    with engine.connect() as connection:
        stored += repr(connection.execute(sa.select(database.keys)).all()).encode()
    assert not any(secret.removeprefix("mz_").encode() in stored for secret in secrets)


def test_a_revoked_key_is_refused_and_its_name_is_free_again(engine: sa.Engine) -> None:
    _, secret = keys.create_key(engine, "ada")
    with pytest.raises(ConflictError, match="exists already"):
        keys.create_key(engine, "ada")
    keys.revoke_key(engine, "ada")
    with pytest.raises(AuthenticationError, match="revoked"):
        keys.authenticate(engine, secret)
    second, _ = keys.create_key(engine, "ada")
    assert [key.revoked is not None for key in keys.list_keys(engine)] == [True, False]
    assert keys.revoke_key(engine, second.id).name == "ada"


def test_revoking_an_unknown_key_lists_the_names_there_are(engine: sa.Engine) -> None:
    keys.create_key(engine, "ada")
    with pytest.raises(NotFoundError, match="ada"):
        keys.revoke_key(engine, "bob")


def test_scopes(engine: sa.Engine) -> None:
    scoped, _ = keys.create_key(engine, "scoped", endpoints=["one"])
    free, _ = keys.create_key(engine, "free")
    admin, _ = keys.create_key(engine, "admin", admin=True)
    assert [key.may_use("two") for key in (scoped, free, admin)] == [False, True, True]
    with pytest.raises(PermissionDeniedError, match="it may use one"):
        scoped.require_endpoint("two")
    with pytest.raises(PermissionDeniedError, match="--admin"):
        free.require_admin()
    admin.require_admin()


def test_the_first_key_is_made_once(engine: sa.Engine) -> None:
    first = keys.create_first_key(engine)
    assert first is not None
    assert first[0].admin
    keys.revoke_key(engine, first[0].id)
    assert keys.create_first_key(engine) is None


def test_a_database_of_another_version_stops_the_start(database_url: str) -> None:
    engine = database.open_database(database_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '999'"))
    engine.dispose()
    with pytest.raises(ConfigError, match="version 999"):
        database.open_database(database_url)


def test_a_file_that_is_no_database_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mezzotint.db").write_text("not a database, and long enough to be looked at")
    with pytest.raises(ConfigError, match="cannot be opened"):
        database.open_database(database.database_url(tmp_path, None))


@attack("A database URL that is wrong, in a log", outcome="its password is not shown")
def test_a_password_in_the_url_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        database.open_database("postgresql+psycopg://user:hunter2@127.0.0.1:1/nowhere")
    assert "hunter2" not in caught.value.message
