"""Two servers on one Postgres database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from mezzotint.errors import ConfigError
from mezzotint.server.store import database, keys
from mezzotint.server.store.database import open_database
from mezzotint.server.store.shared import share_signer
from mezzotint.server.store.signing import Signer
from tests.server.hosting import client, hosting, settings_for

if TYPE_CHECKING:
    from tests.server.s3 import S3Server

FIRST, SECOND = Signer(b"1" * 32), Signer(b"2" * 32)


@pytest.fixture
def postgres(new_postgres: Callable[[], str]) -> Iterator[sa.Engine]:
    engine = open_database(new_postgres())
    yield engine
    engine.dispose()


def sign(signer: Signer) -> str:
    return signer.signature("a", 1)


def test_the_first_server_on_postgres_gives_its_secret_to_the_others(postgres: sa.Engine) -> None:
    assert [sign(share_signer(postgres, each)) for each in (FIRST, SECOND, FIRST)] == [sign(FIRST)] * 3


def test_a_secret_on_sqlite_stays_out_of_the_database(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'mezzotint.db'}")
    assert [sign(share_signer(engine, each)) for each in (FIRST, SECOND)] == [sign(FIRST), sign(SECOND)]
    with engine.connect() as connection:
        assert connection.execute(sa.select(database.secrets)).all() == []
    engine.dispose()


@pytest.mark.parametrize("value", ["", "00ff", "no hex"])
def test_a_damaged_shared_secret_stops_the_start_with_a_sentence(postgres: sa.Engine, value: str) -> None:
    with postgres.begin() as connection:
        connection.execute(database.secrets.insert().values(name="signing", value=value))
    with pytest.raises(ConfigError, match="table secrets is damaged"):
        share_signer(postgres, FIRST)


def test_a_url_of_one_server_is_served_by_the_other_and_a_key_ends_on_both(
    tmp_path: Path, new_postgres: Callable[[], str], s3: S3Server
) -> None:
    values = {
        "database_url": new_postgres(),
        "storage": f"s3://{s3.bucket}/test/shared",
        "storage_endpoint": s3.endpoint,
    }
    with (
        hosting(settings_for(tmp_path / "first", **values)) as first,
        hosting(settings_for(tmp_path / "second", **values), key=first.first_key) as second,
    ):
        for made, other in ((first, second), (second, first)):
            answer = made.post(response_format="url")
            assert answer.status_code == 200, answer.text
            url = urlsplit(answer.json()["data"][0]["url"])
            pictures = [each.client.get(f"{url.path}?{url.query}") for each in (made, other)]
            assert [each.status_code for each in pictures] == [200, 200]
            assert pictures[0].content == pictures[1].content
            forged = other.client.get(f"{url.path}?{url.query[:-4]}0000")
            assert forged.status_code == 403

        _, secret = keys.create_key(first.service.engine, "guest")
        with client(first.url, secret) as here, client(second.url, secret) as there:
            assert [each.get("/v1/models").status_code for each in (here, there)] == [200, 200]
            keys.revoke_key(first.service.engine, "guest")
            assert [each.get("/v1/models").status_code for each in (there, here)] == [401, 401]
