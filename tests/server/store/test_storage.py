"""Pictures on a real disk."""

from __future__ import annotations

import os
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from mezzotint.errors import ConfigError, GoneError, NotFoundError, PermissionDeniedError
from mezzotint.server.store.storage import Storage, load_secret


def parts(url: str) -> tuple[str, str, str]:
    split = urlsplit(url)
    query = parse_qs(split.query)
    return split.path.rpartition("/")[2], query["expires"][0], query["signature"][0]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "images", b"s" * 32, 3600)


def test_what_was_saved_is_found_by_its_url(storage: Storage) -> None:
    name = storage.save(b"picture")
    assert storage.read(*parts(storage.url("http://x", name))) == (b"picture", "image/png")


def test_names_are_random_and_files_are_whole(storage: Storage) -> None:
    names = {storage.save(b"same") for _ in range(50)}
    assert len(names) == 50
    assert {file.name for file in storage.folder.iterdir()} == names


def test_a_signature_holds_for_one_name_and_one_expiry(storage: Storage) -> None:
    one, two = storage.save(b"1"), storage.save(b"2")
    name, expires, signature = parts(storage.url("http://x", one))
    for forged in (
        (two, expires, signature),
        (name, str(int(expires) + 1), signature),
        (name, expires, signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        (name, expires, ""),
        (name, expires, "é"),
    ):
        with pytest.raises(PermissionDeniedError):
            storage.read(*forged)


def test_another_secret_makes_other_signatures(storage: Storage) -> None:
    name = storage.save(b"1")
    other = Storage(storage.folder, b"t" * 32, 3600)
    with pytest.raises(PermissionDeniedError):
        storage.read(*parts(other.url("http://x", name)))


@pytest.mark.parametrize("name", ["../signing-key", "x.png", "", "a" * 32 + ".svg", "a" * 32 + ".png\n"])
def test_what_no_save_ever_made_is_not_found(storage: Storage, name: str) -> None:
    with pytest.raises(NotFoundError):
        storage.read(name, "99999999999", "x")


def test_an_expiry_that_is_no_number_is_not_found(storage: Storage) -> None:
    name = storage.save(b"1")
    for expires in ("", "-1", "1e9", "²", "9" * 13):
        with pytest.raises(NotFoundError):
            storage.read(name, expires, "x")


def test_expired_is_gone_and_so_is_a_file_that_was_cleaned_away(storage: Storage) -> None:
    name = storage.save(b"1")
    with pytest.raises(GoneError):
        storage.read(*parts(storage.url("http://x", name, expires=int(time.time()) - 1)))
    url = storage.url("http://x", name)
    (storage.folder / name).unlink()
    with pytest.raises(GoneError):
        storage.read(*parts(url))


def test_cleaning_removes_what_is_past_its_life_and_counts_the_rest(storage: Storage) -> None:
    old, new, part = storage.save(b"old"), storage.save(b"newer"), storage.folder / "x.png.part"
    part.write_bytes(b"half")
    for file in (storage.folder / old, part):
        os.utime(file, (time.time() - 3601, time.time() - 3601))
    assert storage.clean() == (2, 5)
    assert [file.name for file in storage.folder.iterdir()] == [new]


def test_the_secret_is_made_once_private_and_kept(tmp_path: Path) -> None:
    first = load_secret(tmp_path)
    assert len(first) == 32
    assert load_secret(tmp_path) == first
    assert (tmp_path / "signing-key").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["signing-key"]


def test_a_damaged_secret_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "signing-key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        load_secret(tmp_path)
