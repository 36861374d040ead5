"""Pictures in a real object storage, which is killed and frozen meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import httpx2
import pytest
import sqlalchemy as sa

pytest.importorskip("obstore", reason="object storage needs obstore: pip install 'mezzotint[s3]'")

from obstore.exceptions import BaseError
from obstore.store import MemoryStore

from mezzotint.config import Settings
from mezzotint.errors import ConfigError, UnavailableError
from mezzotint.server.store import database
from mezzotint.server.store.aws import open_bucket
from mezzotint.server.store.database import open_database
from mezzotint.server.store.folder import Folder, StoredFile
from mezzotint.server.store.objects import REQUEST_BYTES, ObjectStorage
from tests.server.hosting import GENERATE, Host, hosting, settings_for
from tests.server.s3 import BUCKET, LIMITED, PATIENCE_S, S3Server

NAME, OTHER = "a" * 32 + ".png", "b" * 32 + ".jpg"
DATA = b"picture"
TIMEOUT_S = 1.0
FAR = 4e9
"""A time long after every test, in seconds since 1970."""


@dataclass(frozen=True)
class Place:
    """A prefix of the store that nobody else uses, and the settings that name it."""

    s3: S3Server
    prefix: str

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    def settings(self, folder: Path, **values: object) -> Settings:
        return settings_for(
            folder, storage=self.url, storage_endpoint=self.s3.endpoint, storage_timeout_s=TIMEOUT_S, **values
        )

    def storage(self, engine: sa.Engine, folder: Path, max_held_bytes: int = 2**20) -> ObjectStorage:
        folder.mkdir(exist_ok=True)
        bucket = open_bucket(self.url, self.s3.endpoint, TIMEOUT_S)
        return ObjectStorage(engine, bucket, Folder(folder), max_held_bytes)

    def names(self) -> set[str]:
        return self.s3.names(self.prefix)


@pytest.fixture
def place(s3: S3Server) -> Place:
    return Place(s3, f"test/{uuid4().hex}")


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = open_database(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def storage(place: Place, engine: sa.Engine, tmp_path: Path) -> ObjectStorage:
    return place.storage(engine, tmp_path / "images")


def read(file: StoredFile | None, start: int = 0) -> bytes:
    async def collect() -> bytes:
        assert file is not None
        return b"".join([piece async for piece in file.pieces(start, file.size)])

    return asyncio.run(collect())


def find(storage: ObjectStorage, name: str = NAME) -> StoredFile | None:
    return asyncio.run(storage.find(name))


def cleaned(storage: ObjectStorage, before: float, *listed: str) -> tuple[int, int]:
    removed, used = storage.clean(before, frozenset(listed))
    return removed, used.total()


def until(attempt: Callable[[], object]) -> None:
    """Repeats an attempt that waits for the store: one that has just come back may take its time."""
    deadline = time.monotonic() + PATIENCE_S
    while not attempt():
        assert time.monotonic() < deadline


def files(tmp_path: Path) -> list[str]:
    return [file.name for file in (tmp_path / "images").iterdir()]


def test_a_locked_database_is_tried_once_and_pictures_wait_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.01)
    (tmp_path / "images").mkdir()
    lite = open_database(f"sqlite:///{tmp_path / 'x.db'}")
    store: Any = MemoryStore()
    storage = ObjectStorage(lite, store, Folder(tmp_path / "images"), 2**20)
    tries, put = [], storage._put

    def counted(name: str, data: bytes, created: float) -> None:
        tries.append(name)
        put(name, data, created)

    monkeypatch.setattr(storage, "_put", counted)
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        storage.write(NAME, DATA)
        storage.write(OTHER, DATA)
        assert (tries, sorted(files(tmp_path))) == ([NAME], [NAME, OTHER])
        assert storage.write_held() == 0
    assert storage.write_held() == 2
    assert files(tmp_path) == []
    lite.dispose()


# ---------------------------------------------------------------- one storage, on both databases


def test_a_picture_goes_to_the_store_and_is_found_there(
    place: Place, storage: ObjectStorage, tmp_path: Path
) -> None:
    storage.write(NAME, DATA)
    file = find(storage)
    assert file is not None
    assert (read(file), read(file, 3), file.size) == (DATA, DATA[3:], len(DATA))
    assert abs(file.modified - time.time()) < 60
    assert (place.names(), files(tmp_path)) == ({NAME}, [])
    found = place.s3.store().get(f"{place.prefix}/{NAME}")
    assert found.attributes["Content-Type"] == "image/png"
    assert find(storage, OTHER) is None
    for path in (f"{BUCKET}/{place.prefix}/{NAME}", f"{BUCKET}?list-type=2"):
        assert httpx2.get(f"{place.s3.endpoint}/{path}").status_code == 403, (
            "the signed URL is the only way in"
        )


def test_cleaning_removes_what_is_old_and_not_in_a_gallery_without_listing_the_store(
    place: Place, storage: ObjectStorage, engine: sa.Engine
) -> None:
    storage.write(NAME, DATA)
    storage.write(OTHER, DATA)
    assert cleaned(storage, time.time() - 60) == (0, 2 * len(DATA))
    entry = {"name": NAME, "key_id": "key_1", "created": 1.0, "parameters": {}}
    with engine.begin() as connection:
        connection.execute(database.pictures.insert().values(entry))
    assert cleaned(storage, FAR, NAME) == (1, len(DATA))
    assert place.names() == {NAME}
    with pytest.raises(BaseError, match="AccessDenied"):  # so it cannot have listed anything
        open_bucket(place.url, place.s3.endpoint, TIMEOUT_S).list().collect()


def test_a_removed_picture_is_gone_from_the_store(place: Place, storage: ObjectStorage) -> None:
    storage.write(NAME, DATA)
    storage.remove(NAME)
    storage.remove(NAME)
    assert (place.names(), find(storage)) == (set(), None)
    assert cleaned(storage, FAR) == (0, 0)


# ---------------------------------------------------------------- on SQLite, where only the store matters


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = open_database(f"sqlite:///{tmp_path / 'mezzotint.db'}")
    yield engine
    engine.dispose()


def test_pictures_wait_while_the_store_is_dead_and_a_restart_loses_none(
    place: Place, lite: sa.Engine, tmp_path: Path
) -> None:
    storage = place.storage(lite, tmp_path / "images")
    with place.s3.away():
        storage.write(NAME, DATA)
        storage.write(OTHER, DATA)
        assert sorted(files(tmp_path)) == [NAME, OTHER]
        assert read(find(storage)) == DATA
        storage = place.storage(lite, tmp_path / "images")  # as after a restart
        assert storage.write_held() == 0
        assert read(find(storage)) == DATA
        held = find(storage, OTHER)
    until(lambda: storage.write_held() and not files(tmp_path))
    assert (place.names(), files(tmp_path)) == ({NAME, OTHER}, [])
    assert read(held) == DATA, "what was found on disk is read from where it went"
    assert read(find(storage)) == DATA
    assert cleaned(storage, FAR) == (2, 0)
    assert place.names() == set()


def tried_in(engine: sa.Engine) -> list[str]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.select(database.objects.c.name)))


def test_a_frozen_store_holds_up_one_picture_and_no_other(
    place: Place, lite: sa.Engine, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    bucket = open_bucket(place.url, place.s3.endpoint, 0.3)
    reports: list[int] = []
    storage = ObjectStorage(lite, bucket, Folder(tmp_path / "images"), 2**20, reports.append)
    with place.s3.frozen():
        storage.write(NAME, DATA)
        tried = tried_in(lite)
        storage.write(OTHER, DATA)
        assert tried == tried_in(lite) == [NAME], "the second one does not even try"
        third = "c" * 32 + ".png"
        storage.write(third, DATA)
        storage.remove(third)  # nor does removing what was never tried there
        with pytest.raises(UnavailableError):
            find(storage, third)
    until(lambda: storage.write_held() >= 0 and reports[-1] == 0)
    assert place.names() == {NAME, OTHER}
    assert (max(reports), reports[-1]) == (3 * len(DATA), 0)
    with place.s3.frozen():
        assert cleaned(storage, FAR) == (0, 2 * len(DATA)), "cleaning tries again another time"
    until(lambda: cleaned(storage, FAR)[1] == 0)
    assert place.names() == set()


def test_a_picture_that_waits_on_another_servers_disk_is_not_taken_for_expired(
    place: Place, new_postgres: Callable[[], str], tmp_path: Path
) -> None:
    engine = open_database(new_postgres())
    here, there = (place.storage(engine, tmp_path / name) for name in ("images", "others"))
    third, lost = "c" * 32 + ".png", "d" * 32 + ".png"
    with place.s3.away():
        for name in (NAME, OTHER, third, lost):  # only the first one is tried at the store
            here.write(name, DATA)
        assert not here.is_shared()
        assert here.remove(third) == len(DATA)

    def answers() -> bool:
        with contextlib.suppress(UnavailableError):
            return find(there, third) is None
        return False

    until(answers)
    for name in (NAME, OTHER):
        with pytest.raises(UnavailableError):
            find(there, name)
    with pytest.raises(UnavailableError):
        there.remove(OTHER)
    (tmp_path / "images" / lost).unlink()
    until(here.write_held)
    assert read(find(there)) == read(find(there, OTHER)) == DATA
    assert there.remove(OTHER) == len(DATA)
    assert find(there, OTHER) is None
    with pytest.raises(UnavailableError):
        find(there, lost)
    assert cleaned(there, FAR) == (1, 0)
    assert find(there, lost) is None
    engine.dispose()


def test_what_does_not_fit_the_limit_is_refused_and_leaves_nothing(
    place: Place, lite: sa.Engine, tmp_path: Path
) -> None:
    storage = place.storage(lite, tmp_path / "images", max_held_bytes=len(DATA))
    storage.require_room()
    with place.s3.frozen():
        storage.write(NAME, DATA)
        for refused in (storage.require_room, lambda: storage.write(OTHER, DATA)):
            with pytest.raises(UnavailableError, match=r"7 bytes of pictures wait .*at most 7") as caught:
                refused()
            assert (caught.value.code, caught.value.retry_after) == ("storage_unavailable", 5)
        assert files(tmp_path) == [NAME]
        with pytest.raises(UnavailableError):  # the store may have it after all
            storage.remove(NAME)
    until(lambda: storage.write_held() == 1)
    assert place.names() == {NAME}


def test_a_picture_waits_too_while_the_database_does_not_answer(
    place: Place, lite: sa.Engine, tmp_path: Path
) -> None:
    storage = place.storage(lite, tmp_path / "images")
    with lite.begin() as connection:
        connection.execute(sa.text("ALTER TABLE objects RENAME TO away"))
    storage.write(NAME, DATA)
    assert (storage.write_held(), files(tmp_path), place.names()) == (0, [NAME], set())
    with lite.begin() as connection:
        connection.execute(sa.text("ALTER TABLE away RENAME TO objects"))
    assert storage.write_held() == 1
    assert place.names() == {NAME}


def test_a_store_that_hides_what_is_missing_is_understood(
    place: Place, lite: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.storage(lite, tmp_path / "images").write(NAME, DATA)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")  # so all is 403, as AWS says without leave to list
    storage = place.storage(lite, tmp_path / "images")
    assert find(storage, OTHER) is None
    with pytest.raises(UnavailableError):
        find(storage, NAME)


# ---------------------------------------------------------------- settings and credentials


@pytest.mark.parametrize("wrong", ["secret", "bucket"])
def test_a_store_that_refuses_stops_the_start_without_telling_secrets(
    place: Place,
    tmp_path: Path,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = place.settings(tmp_path)
    if wrong == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    else:
        settings = settings.model_copy(update={"storage": "s3://another-bucket"})
    with pytest.raises(ConfigError, match="storage: the store refuses") as caught, hosting(settings):
        pass
    said = caught.value.message + "".join(capfd.readouterr())
    assert "not-the-secret" not in said
    assert LIMITED["secret_access_key"] not in said
    assert "<" not in caught.value.message


@pytest.mark.parametrize(
    "url", ["s3://", "s3://user:sesame@bucket/x", "https://bucket", "s3://Bucket", "s3://b/?x=sesame"]
)
def test_a_url_of_another_form_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="storage must be s3://BUCKET") as caught:
        open_bucket(url, None, 1.0, {})
    assert "sesame" not in caught.value.message


def test_credentials_may_come_from_a_file_that_changes(
    place: Place, lite: sa.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "pictures")
    with pytest.raises(ConfigError, match=r"no usable profile 'pictures' \(FileNotFoundError\)"):
        place.storage(lite, tmp_path / "images")
    file.write_text("[pictures]\naws_access_key_id = sesame\n")
    with pytest.raises(ConfigError, match="no usable profile") as caught:
        place.storage(lite, tmp_path / "images")
    assert "sesame" not in caught.value.message
    lines = [f"aws_{name} = {value}" for name, value in LIMITED.items()]
    file.write_text("\n".join(["[pictures]", *lines]))
    storage = place.storage(lite, tmp_path / "images")
    storage.check()
    storage.write(NAME, DATA)
    assert place.names() == {NAME}


# ---------------------------------------------------------------- the whole server


def make(host: Host, seed: int) -> httpx2.Response:
    return host.client.post(GENERATE, json=host.body(seed=seed, response_format="url"))


def url_of(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    url: str = answer.json()["data"][0]["url"]
    return url


def test_a_server_goes_on_without_its_store_and_across_its_own_restart(
    place: Place, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = place.settings(tmp_path)
    with hosting(settings) as host:
        first = url_of(make(host, 1))
        picture = httpx2.get(first).content
        place.s3.kill()
        second = url_of(make(host, 2))
        held = httpx2.get(second).content
        assert len(held) > 100
        away = httpx2.get(first)
        assert (away.status_code, away.json()["error"]["code"]) == (503, "storage_unavailable")
        assert away.headers["retry-after"] == "5"
    with hosting(settings, key=host.first_key) as host:
        assert httpx2.get(_at(host, second)).content == held, "with the store still dead"
        place.s3.start()
        images = settings.data_dir / "images"
        host.until(lambda: not any(images.iterdir()))
        assert httpx2.get(_at(host, second)).content == held
        assert httpx2.get(_at(host, first)).content == picture
        assert len(place.names()) == 2
        assert b"mezzotint_held_bytes 0.0" in host.client.get("/metrics").content
    assert LIMITED["secret_access_key"] not in "".join(capfd.readouterr())


def _at(host: Host, url: str) -> str:
    """The same URL at a server that has come back on another port."""
    parts = urlsplit(url)
    return f"{host.url}{parts.path}?{parts.query}"


def test_a_server_whose_held_pictures_fill_the_limit_says_so_before_it_works(
    s3: S3Server, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        absent = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    settings = settings_for(
        tmp_path, storage=f"s3://{BUCKET}", storage_endpoint=absent, storage_held_bytes=1024
    )
    (settings.data_dir / "images").mkdir(parents=True)
    (settings.data_dir / "images" / OTHER).write_bytes(bytes(1024))
    with hosting(settings) as host:
        for path in (GENERATE, "/v1/images/generations"):
            body = host.body(seed=1, response_format="url")
            refused = host.client.post(path, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
            assert refused.headers["retry-after"] == "5"
        assert not host.service.admission.tickets.by_id, "nothing was queued"
        assert host.post(seed=1).status_code == 200, "a picture in the answer needs no storage"


def test_a_download_that_the_store_breaks_off_goes_on_afterwards(place: Place, tmp_path: Path) -> None:
    size = 32 * REQUEST_BYTES
    place.s3.store().put(f"{place.prefix}/{NAME}", bytes(size))
    with hosting(place.settings(tmp_path)) as host:
        url = host.service.pictures.url(host.url, NAME)
        received = 0
        with httpx2.stream("GET", url) as answer, place.s3.frozen():
            etag, parts = answer.headers["etag"], answer.iter_bytes(2**16)
            with contextlib.suppress(httpx2.RemoteProtocolError):
                for part in parts:
                    received += len(part)
        assert 0 < received < size
        until(lambda: httpx2.head(url).status_code == 200)
        rest = httpx2.get(url, headers={"range": f"bytes={received}-", "if-range": etag})
        assert (rest.status_code, len(rest.content)) == (206, size - received)


def test_a_deleted_picture_is_gone_or_the_deletion_is_refused(place: Place, tmp_path: Path) -> None:
    with hosting(place.settings(tmp_path)) as host:
        url = url_of(make(host, 1))
        (item,) = host.client.get("/dedicated/v1/images").json()["data"]
        path = f"/dedicated/v1/images/{item['name']}"
        with place.s3.frozen():
            refused = host.client.delete(path, timeout=60)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_unavailable")
        until(lambda: httpx2.get(url).status_code == 200)
        until(lambda: host.client.delete(path).status_code == 204)
        assert httpx2.get(url).status_code == 410
        assert place.names() == set()
