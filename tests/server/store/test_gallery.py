"""The pictures that the server keeps for a key, and the page that shows them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mezzotint.server.store import keys
from tests.attacks import attack
from tests.server.hosting import GENERATE, Host, client, folder_of, hosting, settings_for

SIZE = 4
STARS = 2
LONG_AGO_S = 1_000_000


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, server_database: str | None) -> Iterator[Host]:
    settings = settings_for(
        tmp_path_factory.mktemp("server"),
        gallery_size=SIZE,
        max_starred=STARS,
        database_url=server_database,
    )
    with hosting(settings) as running:
        yield running


@pytest.fixture
def http(host: Host) -> Iterator[httpx2.Client]:
    """A client with a key of its own."""
    with host.new_client() as client:
        yield client


def make(host: Host, http: httpx2.Client, seed: int, **fields: Any) -> str:
    """Makes a picture; its URL."""
    answer = http.post(GENERATE, json=host.body(seed=seed, response_format="url", **fields))
    assert answer.status_code == 200, answer.text
    url: str = answer.json()["data"][0]["url"]
    return url


def seeds(http: httpx2.Client, query: str = "") -> list[int]:
    return [item["parameters"]["seed"] for item in http.get(f"/dedicated/v1/images{query}").json()["data"]]


def test_a_picture_is_listed_with_what_gives_it_again(host: Host, http: httpx2.Client) -> None:
    url = make(host, http, 7, guidance_scale=2.5, negative_prompt="text")
    (item,) = http.get("/dedicated/v1/images").json()["data"]
    assert httpx2.get(item["url"]).content == httpx2.get(url).content
    again = http.post(GENERATE, json=item["parameters"] | {"response_format": "url"})
    assert httpx2.get(again.json()["data"][0]["url"]).content == httpx2.get(url).content


def test_openais_pictures_are_kept_too_and_base64_is_not(host: Host, http: httpx2.Client) -> None:
    http.post("/v1/images/generations", json={"model": "one", "prompt": "a cat", "seed": 1})
    http.post(GENERATE, json=host.body(seed=2))
    assert seeds(http) == [1]


def test_the_newest_come_first_in_pages(host: Host, http: httpx2.Client) -> None:
    for seed in (1, 2, 3):
        make(host, http, seed)
    first = http.get("/dedicated/v1/images?limit=2").json()
    assert [item["parameters"]["seed"] for item in first["data"]] == [3, 2]
    assert first["has_more"]
    assert seeds(http, f"?limit=2&before={first['data'][-1]['name']}") == [1]


@attack("Another key's pictures in the gallery", outcome="404")
def test_nobody_sees_or_deletes_another_keys_pictures(host: Host, http: httpx2.Client) -> None:
    make(host, http, 1)
    name = http.get("/dedicated/v1/images").json()["data"][0]["name"]
    with host.new_client() as other:
        assert seeds(other) == []
        assert other.delete(f"/dedicated/v1/images/{name}").status_code == 404
        assert other.get(f"/dedicated/v1/images?before={name}").status_code == 404
    assert httpx2.get(f"{host.url}/dedicated/v1/images").status_code == 401


def test_a_deleted_picture_is_gone_with_its_url(host: Host, http: httpx2.Client) -> None:
    url = make(host, http, 1)
    name = http.get("/dedicated/v1/images").json()["data"][0]["name"]
    assert http.delete(f"/dedicated/v1/images/{name}").status_code == 204
    assert seeds(http) == []
    assert httpx2.get(url).status_code == 410
    assert http.delete(f"/dedicated/v1/images/{name}").status_code == 404


def test_the_newest_outlive_their_urls_and_older_ones_do_not(host: Host, http: httpx2.Client) -> None:
    for seed in range(SIZE + 2):
        make(host, http, seed)
    mine = {item["name"] for item in http.get("/dedicated/v1/images").json()["data"]}
    folder = folder_of(host)
    then = time.time() - LONG_AGO_S
    for file in folder.iterdir():
        os.utime(file, (then, then))
    host.service.pictures.clean()
    assert seeds(http) == [5, 4, 3, 2]
    left = {file.name for file in folder.iterdir()} & mine
    assert left == {item["name"] for item in http.get("/dedicated/v1/images").json()["data"]}


@pytest.mark.parametrize("end", ["revoked", "deleted"])
def test_pictures_of_a_key_that_is_no_more_end_with_their_urls(host: Host, end: str) -> None:
    engine = host.service.engine
    key, secret = keys.create_key(engine, f"to be {end}")
    with client(host.url, secret) as http:
        url = make(host, http, 1)
    (keys.revoke_key if end == "revoked" else keys.delete_key)(engine, key.id)
    host.service.pictures.clean()
    assert httpx2.get(url).status_code == 200, "the URL has not expired"
    file = folder_of(host) / httpx2.URL(url).path.rpartition("/")[2]
    os.utime(file, (time.time() - LONG_AGO_S,) * 2)
    host.service.pictures.clean()
    assert not file.exists()


def test_without_keys_everybodys_pictures_outlive_their_urls(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, auth=False)) as host:
        make(host, host.client, 1)
        (file,) = folder_of(host).iterdir()
        os.utime(file, (time.time() - LONG_AGO_S,) * 2)
        host.service.pictures.clean()
        assert seeds(host.client) == [1]
        assert file.exists()


def test_the_page_and_its_files_are_served_without_a_key(host: Host) -> None:
    page = httpx2.get(f"{host.url}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    script = httpx2.get(f"{host.url}/playground/app.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert script.headers["cache-control"] == "no-cache", "a newer server has newer files"
    known = httpx2.get(f"{host.url}/playground/app.js", headers={"if-none-match": script.headers["etag"]})
    assert known.status_code == 304
    missing = httpx2.get(f"{host.url}/playground/../__init__.py")
    assert missing.status_code == 404


def star(http: httpx2.Client, seed: int, starred: bool = True) -> httpx2.Response:
    """Stars the key's picture of this seed."""
    data = http.get("/dedicated/v1/images").json()["data"]
    name = next(item["name"] for item in data if item["parameters"]["seed"] == seed)
    return http.patch(f"/dedicated/v1/images/{name}", json={"starred": starred})


def test_starred_pictures_stay_beside_the_newest(host: Host, http: httpx2.Client) -> None:
    make(host, http, 1)
    assert star(http, 1).status_code == 204
    for seed in range(2, SIZE + 3):
        make(host, http, seed)
    host.service.pictures.clean()
    assert seeds(http) == [6, 5, 4, 3, 1]
    assert seeds(http, "?starred=true") == [1]
    assert http.get("/dedicated/v1/images?starred=true").json()["data"][0]["starred"] is True
    star(http, 1, starred=False)
    host.service.pictures.clean()
    assert seeds(http) == [6, 5, 4, 3]


def test_a_key_has_so_many_stars_and_none_for_others(host: Host, http: httpx2.Client) -> None:
    for seed in range(1, STARS + 2):
        make(host, http, seed)
    assert [star(http, seed).status_code for seed in (1, 2, 1)] == [204] * 3, "the same one twice is one"
    refused = star(http, 3)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
    assert "has 2 starred pictures already" in refused.text
    name = http.get("/dedicated/v1/images").json()["data"][0]["name"]
    with host.new_client() as other:
        assert other.patch(f"/dedicated/v1/images/{name}", json={"starred": True}).status_code == 404
    assert http.patch(f"/dedicated/v1/images/{name}", json={"stars": 1}).status_code == 422


def test_pictures_are_found_by_words(host: Host, http: httpx2.Client) -> None:
    make(host, http, 71, prompt="an Owl at night")
    make(host, http, 72, prompt="a cat", negative_prompt="owls", width=24)
    make(host, http, 73, prompt="a cat")
    for search, found in {
        "owl": [72, 71],
        "CAT 72": [72],
        "24x16": [72],
        "one": [73, 72, 71],
        "dog": [],
    }.items():
        assert seeds(http, f"?search={search}") == found, search
    first = http.get("/dedicated/v1/images?search=cat&limit=1").json()
    assert (first["data"][0]["parameters"]["seed"], first["has_more"]) == (73, True)
    assert seeds(http, f"?search=cat&before={first['data'][0]['name']}") == [72]
