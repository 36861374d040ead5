"""Limits and keys of two servers on one Postgres database."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa

from mezzotint.errors import ConflictError, MezzotintError, RateLimitError
from mezzotint.server.store import database, keys
from mezzotint.server.store.database import open_database
from mezzotint.server.store.keys import Key, Limits
from mezzotint.server.store.quotas import Quotas
from mezzotint.spec import ImageSpec
from tests.server.hosting import GENERATE, PATIENCE_S, Host, client, endpoint, hosting, settings_for

NUM_AT_ONCE = 8


@pytest.fixture
def engines(new_postgres: Callable[[], str]) -> Iterator[tuple[sa.Engine, sa.Engine]]:
    url = new_postgres()
    engines = open_database(url), open_database(url)
    yield engines
    for engine in engines:
        engine.dispose()


@pytest.fixture
def hosts(tmp_path: Path, new_postgres: Callable[[], str]) -> Iterator[tuple[Host, Host]]:
    url, slow = new_postgres(), endpoint("fake:step_s=0.01")
    with (
        hosting(settings_for(tmp_path / "first", slow, database_url=url)) as first,
        hosting(settings_for(tmp_path / "second", slow, database_url=url), key=first.first_key) as second,
    ):
        yield first, second


def statuses(key: str, *hosts: Host) -> list[int]:
    found = []
    for host in hosts:
        with client(host.url, key) as http:
            found.append(http.post(GENERATE, json=host.body()).status_code)
    return found


def used(engine: sa.Engine, key: Key) -> float:
    with engine.connect() as connection:
        query = sa.select(database.usage.c.step_seconds).where(database.usage.c.key_id == key.id)
        return float(connection.scalar(query) or 0.0)


def test_requests_per_minute_are_counted_over_both_servers(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    _, secret = keys.create_key(first.service.engine, "fast", limits=Limits(requests_per_minute=3))
    assert statuses(secret, first, second, first, second, first) == [200, 200, 200, 429, 429]


def test_step_seconds_are_counted_over_both_servers_and_what_was_not_done_is_given_back(
    hosts: tuple[Host, Host],
) -> None:
    first, second = hosts
    whole_s = first.endpoint().profile.work_s(ImageSpec(prompt="a cat", num_inference_steps=4))
    limits = Limits(step_seconds_per_day=2.6 * whole_s)
    key, secret = keys.create_key(first.service.engine, "poor", limits=limits)
    with client(first.url, secret) as http:
        failed = http.post(GENERATE, json=first.body("a !fail@3"))
        assert failed.status_code == 500
    given_back_by = time.monotonic() + PATIENCE_S
    while used(second.service.engine, key) > 0.6 * whole_s:  # two steps of four were done
        assert time.monotonic() < given_back_by
    assert statuses(secret, second, first, second) == [200, 200, 429]


def test_two_servers_never_let_in_more_than_the_limits_together(
    engines: tuple[sa.Engine, sa.Engine],
) -> None:
    quotas = [Quotas(engine) for engine in engines]
    key = Key("k", "k", limits=Limits(requests_per_minute=5))
    worker = Key("w", "w", limits=Limits(step_seconds_per_day=5.5))

    def pays(number: int) -> list[bool]:
        return [_pays(quotas[number % 2], each) for each in (key, worker)]

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        paid = list(pool.map(pays, range(4 * NUM_AT_ONCE)))
    assert sum(each[1] for each in paid) == 5
    assert 5 <= sum(each[0] for each in paid) <= 6, "one more token comes in after 12 seconds"


def _pays(quotas: Quotas, key: Key) -> bool:
    try:
        quotas.pay(key, 1.0)
    except RateLimitError:
        return False
    return True


def test_a_request_that_is_refused_after_it_was_paid_for_costs_nothing(
    engines: tuple[sa.Engine, sa.Engine],
) -> None:
    first, second = map(Quotas, engines)
    key = Key("k", "k", limits=Limits(requests_per_minute=1, step_seconds_per_day=1))
    first.pay(key, 1.0)
    assert not _pays(second, key)
    first.pay_back(key, 1.0)
    first.store()
    assert _pays(second, key)


def test_identical_resent_requests_of_a_limited_key_are_paid_for_once(hosts: tuple[Host, Host]) -> None:
    first, _ = hosts
    _, secret = keys.create_key(first.service.engine, "twice", limits=Limits(requests_per_minute=2))
    headers = {"idempotency-key": "the same"}
    with client(first.url, secret) as http, ThreadPoolExecutor(NUM_AT_ONCE) as pool:

        def post(_: int) -> httpx2.Response:
            return http.post(GENERATE, json=first.body(), headers=headers)

        answers = list(pool.map(post, range(2)))
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].content == answers[1].content
        assert http.post(GENERATE, json=first.body("another")).status_code == 200
        assert http.post(GENERATE, json=first.body("a third")).status_code == 429


def test_a_key_made_or_revoked_through_one_server_counts_at_the_other_at_once(
    hosts: tuple[Host, Host],
) -> None:
    first, second = hosts
    made = first.client.post("/dedicated/beta/keys", json={"name": "guest"}).json()
    assert statuses(made["secret"], second, first) == [200, 200]
    assert second.client.delete(f"/dedicated/beta/keys/{made['id']}").status_code == 200
    assert statuses(made["secret"], first, second) == [401, 401]


def test_servers_that_start_at_once_make_one_first_key(engines: tuple[sa.Engine, sa.Engine]) -> None:
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        made = list(pool.map(keys.create_first_key, engines * (NUM_AT_ONCE // 2)))
    assert sum(each is not None for each in made) == 1
    assert len(keys.list_keys(engines[0])) == 1


def test_a_name_that_two_servers_give_at_once_has_one_key(engines: tuple[sa.Engine, sa.Engine]) -> None:
    def make(engine: sa.Engine) -> MezzotintError | None:
        try:
            keys.create_key(engine, "ada")
        except MezzotintError as error:
            return error
        return None

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        errors = list(pool.map(make, engines * (NUM_AT_ONCE // 2)))
    assert errors.count(None) == 1
    assert all(isinstance(error, ConflictError) for error in errors if error is not None)
