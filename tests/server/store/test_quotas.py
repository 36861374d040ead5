"""Limits per key."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from mezzotint.errors import RateLimitError
from mezzotint.server.store import database
from mezzotint.server.store.keys import Key, Limits, create_key
from mezzotint.server.store.quotas import Quotas
from mezzotint.spec import ImageSpec
from tests.server.hosting import GENERATE, client, endpoint, hosting, settings_for


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = database.open_database(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[sa.Engine]:
    """A database with one server, which counts in memory."""
    engine = database.open_database(database.database_url(tmp_path, None))
    yield engine
    engine.dispose()


def test_requests_per_minute_refill_with_time(alone: sa.Engine) -> None:
    quotas, key = Quotas(alone), Key("k", "k", limits=Limits(requests_per_minute=3))
    for _ in range(3):
        quotas.spend_request(key, 100.0)
    with pytest.raises(RateLimitError) as caught:
        quotas.spend_request(key, 105.0)
    assert caught.value.retry_after == pytest.approx(15.0)
    with pytest.raises(RateLimitError):
        quotas.spend_request(key, 119.0)
    quotas.spend_request(key, 120.1)
    quotas.spend_request(Key("other", "other", limits=Limits(requests_per_minute=3)), 120.1)


def test_step_seconds_of_a_day_are_counted_and_kept(alone: sa.Engine) -> None:
    key = Key("k", "k", limits=Limits(step_seconds_per_day=10))
    quotas = Quotas(alone)
    quotas.load(key)
    quotas.book(key, step_seconds=6.0, images=1)
    quotas.spend_request(key, 0.0)
    quotas.store()
    quotas.book(key, step_seconds=3.0, images=1)
    assert quotas.used_today(key) == pytest.approx(9.0)
    quotas.store()
    again = Quotas(alone)
    again.load(key)
    assert again.used_today(key) == pytest.approx(9.0)
    again.book(key, step_seconds=1.0, images=1)
    with pytest.raises(RateLimitError) as caught:
        again.spend_request(key, 0.0)
    assert caught.value.code == "quota_exceeded"
    assert 0 < (caught.value.retry_after or 0) <= 86_400


def test_what_is_used_while_it_is_written_is_not_forgotten(alone: sa.Engine) -> None:
    key, quotas = Key("k", "k", limits=Limits(step_seconds_per_day=10)), Quotas(alone)
    for _ in range(5):
        quotas.book(key, step_seconds=1.0, images=1)
        quotas.store()
    again = Quotas(alone)
    again.load(key)
    assert again.used_today(key) == pytest.approx(5.0)


def test_two_who_write_at_once_write_it_once(engine: sa.Engine) -> None:
    """The writing of each minute may still be under way when the server ends and writes for the last time."""
    key, quotas = Key("k", "k", limits=Limits(step_seconds_per_day=10)), Quotas(engine)
    quotas.book(key, step_seconds=1.0, images=1)
    other = threading.Thread(target=quotas.store)

    def meanwhile(_: sa.Connection) -> None:
        if other.ident is None:
            other.start()
            other.join(0.2)  # it waits for its turn; were there none, it would be done by now

    sa.event.listen(engine, "begin", meanwhile)
    quotas.store()
    other.join()
    with engine.connect() as connection:
        assert connection.execute(sa.select(database.usage.c.images)).scalars().all() == [1]


def test_past_days_are_not_kept_in_memory(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    key, quotas = Key("k", "k", limits=Limits(step_seconds_per_day=10)), Quotas(engine)
    for day in ("2026-11-21", "2026-11-22", "2026-11-23"):
        monkeypatch.setattr("mezzotint.server.store.quotas.utc_day", lambda day=day: day)
        quotas.book(key, step_seconds=1.0, images=1)
        quotas.store()
        assert quotas.used_today(key) == pytest.approx(1.0)
    assert len(quotas._stored) == 1


def test_both_limits_over_http_and_across_a_restart(tmp_path: Path, database_url: str) -> None:
    settings = settings_for(tmp_path, endpoint("fake:step_s=0.01"), database_url=database_url)
    with hosting(settings) as host:
        engine = host.service.engine
        _, fast = create_key(engine, "fast", limits=Limits(requests_per_minute=2))
        with client(host.url, fast) as http:
            answers = [http.post(GENERATE, json=host.body()) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 200, 429]
            assert answers[2].json()["error"]["code"] == "rate_limited"
            assert 1 <= int(answers[2].headers["retry-after"]) <= 30
        _, poor = create_key(engine, "poor", limits=Limits(step_seconds_per_day=0.06))
        with client(host.url, poor) as http:
            assert http.post(GENERATE, json=host.body()).status_code == 200
            refused = http.post(GENERATE, json=host.body())
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    with hosting(settings, key=poor) as host:
        assert host.post().json()["error"]["code"] == "quota_exceeded"


def test_only_images_that_were_answered_are_counted_and_all_work_that_was_done(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.01"))) as host:
        engine = host.service.engine
        key, secret = create_key(engine, "payer")
        with client(host.url, secret) as http:
            assert http.post(GENERATE, json=host.body(n=3)).status_code == 200
            assert http.post(GENERATE, json=host.body("a !fail@3")).status_code == 500
            headers = {"x-request-timeout-s": "2"}
            assert http.post(GENERATE, json=host.body("a !hang@3"), headers=headers).status_code == 504
        host.service.quotas.store()
        with engine.connect() as connection:
            (row,) = connection.execute(
                sa.select(database.usage).where(database.usage.c.key_id == key.id)
            ).mappings()
        assert row["images"] == 3
        whole_s = host.endpoint().profile.work_s(ImageSpec(prompt="a cat", num_inference_steps=4))
        assert row["step_seconds"] == pytest.approx(whole_s * (3 + 2 / 4 + 2 / 4))
