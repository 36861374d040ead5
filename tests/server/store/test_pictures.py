"""Pictures on a real disk."""

from __future__ import annotations

import asyncio
import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from mezzotint.errors import ConfigError, GoneError, NotFoundError, PermissionDeniedError
from mezzotint.images import Parameters
from mezzotint.server.store.database import open_database
from mezzotint.server.store.folder import Folder
from mezzotint.server.store.pictures import PictureFile, Pictures
from mezzotint.server.store.signing import Signer, load_signer
from mezzotint.spec import ImageSpec
from tests.attacks import attack
from tests.server.hosting import Host, hosting, settings_for

if TYPE_CHECKING:
    from tests.server.s3 import S3Server


def parts(url: str) -> tuple[str, str, str]:
    split = urlsplit(url)
    query = parse_qs(split.query)
    return split.path.rpartition("/")[2], query["expires"][0], query["signature"][0]


def save(pictures: Pictures, data: bytes) -> str:
    return pictures.save(
        data, ".png", "key_1", Parameters("one", ImageSpec(prompt="a cat", num_inference_steps=4))
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[Pictures]:
    engine = open_database(f"sqlite:///{tmp_path / 'mezzotint.db'}")
    folder = tmp_path / "images"
    folder.mkdir()
    yield Pictures(engine, Folder(folder), Signer(b"s" * 32), 3600, 0, 0)
    engine.dispose()


def find(pictures: Pictures, *parts: str) -> PictureFile:
    return asyncio.run(pictures.find(*parts))


def read(file: PictureFile) -> bytes:
    async def collect() -> bytes:
        return b"".join([piece async for piece in file.stored.pieces(0, file.stored.size)])

    return asyncio.run(collect())


@pytest.fixture
def folder(pictures: Pictures, tmp_path: Path) -> Path:
    return tmp_path / "images"


def test_what_was_saved_is_found_by_its_url(pictures: Pictures) -> None:
    name = save(pictures, b"picture")
    found = find(pictures, *parts(pictures.url("http://x", name)))
    assert (read(found), found.media_type) == (b"picture", "image/png")


def test_names_are_random_and_files_are_whole(pictures: Pictures, folder: Path) -> None:
    names = {save(pictures, b"same") for _ in range(50)}
    assert len(names) == 50
    assert {file.name for file in folder.iterdir()} == names


@attack("A signature used for another picture or a later end", outcome="403")
def test_a_signature_holds_for_one_name_and_one_expiry(pictures: Pictures) -> None:
    one, two = save(pictures, b"1"), save(pictures, b"2")
    name, expires, signature = parts(pictures.url("http://x", one))
    for forged in (
        (two, expires, signature),
        (name, str(int(expires) + 1), signature),
        (name, expires, signature[:-1] + ("0" if signature[-1] != "0" else "1")),
        (name, expires, ""),
        (name, expires, "é"),
    ):
        with pytest.raises(PermissionDeniedError):
            find(pictures, *forged)


def test_another_secret_makes_other_signatures(pictures: Pictures) -> None:
    name = save(pictures, b"1")
    expires = int(time.time()) + 60
    with pytest.raises(PermissionDeniedError):
        find(pictures, name, str(expires), Signer(b"t" * 32).signature(name, expires))


@attack("A picture's name with ../ or of another shape", outcome="404")
@pytest.mark.parametrize("name", ["../signing-key", "x.png", "", "a" * 32 + ".svg", "a" * 32 + ".png\n"])
def test_what_no_save_ever_made_is_not_found(pictures: Pictures, name: str) -> None:
    with pytest.raises(NotFoundError):
        find(pictures, name, "99999999999", "x")


def test_an_expiry_that_is_no_number_is_not_found(pictures: Pictures) -> None:
    name = save(pictures, b"1")
    for expires in ("", "-1", "1e9", "²", "9" * 13):
        with pytest.raises(NotFoundError):
            find(pictures, name, expires, "x")


def test_expired_is_gone_and_so_is_a_file_that_was_cleaned_away(pictures: Pictures, folder: Path) -> None:
    name = save(pictures, b"1")
    with pytest.raises(GoneError):
        find(pictures, *parts(pictures.url("http://x", name, expires=int(time.time()) - 1)))
    url = pictures.url("http://x", name)
    (folder / name).unlink()
    with pytest.raises(GoneError):
        find(pictures, *parts(url))


def test_cleaning_removes_what_is_past_its_life_and_counts_the_rest(pictures: Pictures, folder: Path) -> None:
    old, new, part = save(pictures, b"old"), save(pictures, b"newer"), folder / "x.png.part"
    part.write_bytes(b"half")
    for file in (folder / old, part):
        os.utime(file, (time.time() - 3601, time.time() - 3601))
    assert pictures.clean() == (2, 5)
    assert [file.name for file in folder.iterdir()] == [new]


def test_the_secret_is_made_once_private_and_kept(tmp_path: Path) -> None:
    first = load_signer(tmp_path).signature("a", 1)
    assert len((tmp_path / "signing-key").read_bytes()) == 32
    assert load_signer(tmp_path).signature("a", 1) == first
    assert (tmp_path / "signing-key").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["signing-key"]


@attack("A signing key that is cut short", outcome="the start stops with a sentence")
def test_a_damaged_secret_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "signing-key").write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        load_signer(tmp_path)


# ---------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module", params=["folder", "s3"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A server with each kind of storage in turn: nobody can tell from outside which it is."""
    values = {}
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        values = {"storage": f"s3://{s3.bucket}/test/pictures", "storage_endpoint": s3.endpoint}
    with hosting(settings_for(tmp_path_factory.mktemp("server"), url_ttl_s=100, **values)) as running:
        yield running


@pytest.fixture(scope="module")
def url(host: Host) -> str:
    """The URL of a picture; it needs no key."""
    answer = host.post(seed=1, response_format="url")
    url: str = answer.json()["data"][0]["url"]
    return url


def test_a_picture_may_be_cached_as_long_as_its_url_holds_and_no_longer(url: str) -> None:
    expires = int(parts(url)[1])
    most = expires - time.time()
    answer = httpx2.get(url)
    least = expires - time.time() - 1
    private, age, immutable = answer.headers["cache-control"].split(", ")
    assert (private, immutable) == ("private", "immutable")
    assert least <= int(age.removeprefix("max-age=")) <= most


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_format_of_file_is_served_as_what_it_is(host: Host, kind: str) -> None:
    body = {"model": "one", "prompt": "a cat", "seed": 1, "output_format": kind, "response_format": "url"}
    made = host.client.post("/v1/images/generations", json=body).json()["data"][0]["url"]
    answer = httpx2.get(made)
    assert (answer.status_code, answer.headers["content-type"]) == (200, f"image/{kind}")


def test_head_tells_of_a_picture_what_get_does_and_sends_none(url: str) -> None:
    get, head = httpx2.get(url), httpx2.head(url)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length", "etag", "last-modified", "accept-ranges"):
        assert head.headers[name] == get.headers[name]
    assert int(head.headers["content-length"]) == len(get.content)
    forged = httpx2.head(url[:-1] + ("0" if url[-1] != "0" else "1"))
    assert (forged.status_code, forged.content) == (403, b"")


@pytest.mark.parametrize(
    ("asked", "part"),
    [("bytes=0-9", slice(0, 10)), ("bytes=10-", slice(10, None)), ("bytes=-7", slice(-7, None)),
     ("bytes=5-999999", slice(5, None))],
)  # fmt: skip
def test_a_range_is_that_part_of_the_file(url: str, asked: str, part: slice) -> None:
    whole = httpx2.get(url).content
    answer = httpx2.get(url, headers={"range": asked})
    assert (answer.status_code, answer.content) == (206, whole[part])
    start, stop, _ = part.indices(len(whole))
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"


@pytest.mark.parametrize(
    "asked", ["bytes=9-3", "bytes=x", "lines=1-2", "bytes=", "bytes=0-1,4-5", "bytes=٣-٥"]
)
def test_a_range_of_another_form_gives_the_whole_picture(url: str, asked: str) -> None:
    answer = httpx2.get(url, headers={b"range": asked.encode()})
    assert (answer.status_code, answer.content) == (200, httpx2.get(url).content)


def test_a_range_beyond_the_end_is_416_and_names_the_length(url: str) -> None:
    size = len(httpx2.get(url).content)
    answer = httpx2.get(url, headers={"range": f"bytes={size}-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{size}")


def test_a_broken_off_download_goes_on_only_with_the_same_picture(url: str) -> None:
    etag = httpx2.get(url).headers["etag"]
    same = httpx2.get(url, headers={"range": "bytes=5-", "if-range": etag})
    other = httpx2.get(url, headers={"range": "bytes=5-", "if-range": '"another"'})
    assert (same.status_code, other.status_code) == (206, 200)


def test_a_known_picture_is_not_sent_again(url: str) -> None:
    etag = httpx2.get(url).headers["etag"]
    for known in (etag, f"W/{etag}", f'"another", {etag}', "*"):
        answer = httpx2.get(url, headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert httpx2.get(url, headers={"if-none-match": '"another"'}).status_code == 200


@attack("Many downloads of a large picture", outcome="sent from the disk in pieces")
def test_a_large_picture_is_never_whole_in_memory(host: Host) -> None:
    name, size = "a" * 32 + ".png", 48 * 2**20
    host.service.pictures.storage.write(name, bytes(size))
    tracemalloc.start()
    try:
        with httpx2.stream("GET", host.service.pictures.url(host.url, name)) as answer:
            received = sum(len(part) for part in answer.iter_bytes(2**16))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert received == size
    assert peak < 16 * 2**20


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/docs", "/openapi.json", "/playground/app.js"])
def test_a_load_balancer_may_ask_with_head(host: Host, path: str) -> None:
    get, head = httpx2.get(host.url + path), httpx2.head(host.url + path)
    assert (get.status_code, head.status_code, head.content) == (200, 200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
