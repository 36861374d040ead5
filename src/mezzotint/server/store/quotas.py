"""The accounts of the keys: what each has used, and the limits it must keep.

Work counts as it is done, even if its picture is never delivered, because limits protect the machine. Images
count when a request has been answered, so nobody is charged for a request that failed or was cancelled.

On SQLite, requests per minute are a token bucket in memory. Step-seconds per day (UTC) are read from the
database once, counted in memory and written every minute, so a crash forgets at most the last minute.

On Postgres several servers count together. A request of a key with limits is paid for in the database before
it is let in: its token, and all the work that it may take. What it did not take is given back within seconds.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from mezzotint.errors import RateLimitError
from mezzotint.server.store import database
from mezzotint.server.store.keys import Key
from mezzotint.server.threads import require_caller

DAY_S = 86_400
_RATES = database.rates
_USAGE = database.usage


@dataclass(slots=True)
class _Bucket:
    """The requests that one key may send; `spend_request` fills and empties it."""

    tokens: float
    filled_at: float
    """Seconds of the clock of those who call `take`."""

    def take(self, limit: float, now: float) -> None:
        """Takes a token; RateLimitError when there is none. `limit` is the requests per minute."""
        passed_s = max(0.0, now - self.filled_at)
        self.tokens = min(max(1.0, limit), self.tokens + passed_s * limit / 60)
        self.filled_at = now
        if self.tokens < 1:
            raise RateLimitError(
                f"this key may send {limit:g} requests a minute; wait for the time in Retry-After",
                retry_after=(1 - self.tokens) * 60 / limit if limit > 0 else 60.0,
            )
        self.tokens -= 1


@dataclass(slots=True)
class _Usage:
    step_seconds: float = 0.0
    images: int = 0


class Quotas:
    """The accounts of all keys. `load` and `store` block on the database; the other methods do not."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._buckets: dict[str, _Bucket] = {}
        self._reserved: dict[str, float] = {}
        """Step-seconds of jobs that have not ended, by key; `spend_request` adds, `release` takes away."""
        self._stored: dict[tuple[str, str], float] = {}
        """Step-seconds in the database, by key and day; `load` and `store` fill it."""
        self._fresh: dict[tuple[str, str], _Usage] = {}
        """What is not yet in the database, by key and day; `book` adds to it, `store` takes from it."""
        self._lock = threading.Lock()
        """Guards `_stored` and `_fresh`, because `load` and `store` run in threads."""
        self._writing = threading.Lock()
        """Held by the one thread that writes to the database."""

    @property
    def shared(self) -> bool:
        """Whether other servers may count with this one."""
        return self._engine.dialect.name != "sqlite"

    def load(self, key: Key) -> None:
        """Reads what a key with a daily limit has used today; later calls on the same day do nothing."""
        account = (key.id, utc_day())
        if self.shared or key.limits.step_seconds_per_day is None or account in self._stored:
            return
        query = sa.select(_USAGE.c.step_seconds).where(
            _USAGE.c.key_id == account[0], _USAGE.c.day == account[1]
        )
        with self._engine.connect() as connection:
            found = float(connection.scalar(query) or 0.0)
        with self._lock:
            self._stored.setdefault(account, found)

    def spend_request(self, key: Key, now: float, step_seconds: float = 0.0) -> None:
        """Counts one request of this key, and reserves the work that it will take until `release`.

        RateLimitError says when the next one may come; nothing is counted or reserved then.
        """
        if self.shared:
            return
        self._require_daily(key, step_seconds)
        self._spend_token(key, now)
        self._reserved[key.id] = self._reserved.get(key.id, 0.0) + step_seconds

    def must_pay(self, key: Key) -> bool:
        """Whether `pay` comes before a request of this key is let in."""
        limits = key.limits
        limited = limits.requests_per_minute is not None or limits.step_seconds_per_day is not None
        return self.shared and limited

    def pay(self, key: Key, step_seconds: float) -> None:
        """Counts a request over all servers, with the work that it may take (blocking).

        RateLimitError as in `spend_request`. `release` gives back what a job had been paid for.
        """
        with self._engine.begin() as connection:
            if key.limits.requests_per_minute is not None:
                _take_token(connection, key)
            if key.limits.step_seconds_per_day is not None:
                day = utc_day()
                _add(connection, key.id, day, _Usage())  # there is a row, and nobody else changes it
                used = float(connection.scalar(sa.select(_USAGE.c.step_seconds).where(_of(key.id, day))) or 0)
                _require_left(key.limits.step_seconds_per_day, used, step_seconds)
                _add(connection, key.id, day, _Usage(step_seconds))
            require_caller()

    def pay_back(self, key: Key, step_seconds: float) -> None:
        """Undoes `pay` for a request that was not let in (blocking)."""
        self.release(key, step_seconds)
        with self._engine.begin() as connection:
            own = _RATES.c.key_id == key.id
            connection.execute(_RATES.update().where(own).values(tokens=_RATES.c.tokens + 1))

    def release(self, key: Key, step_seconds: float) -> None:
        """Gives back what a job had reserved; what it did is booked."""
        if self.shared:
            if key.limits.step_seconds_per_day is not None:
                self.book(key, step_seconds=-step_seconds)
            return
        left = self._reserved.get(key.id, 0.0) - step_seconds
        if left > 1e-9:
            self._reserved[key.id] = left
        else:
            self._reserved.pop(key.id, None)

    def _spend_token(self, key: Key, now: float) -> None:
        limit = key.limits.requests_per_minute
        if limit is None:
            return
        bucket = self._buckets.setdefault(key.id, _Bucket(max(1.0, limit), now))
        bucket.take(limit, now)

    def book(self, key: Key, *, step_seconds: float = 0.0, images: int = 0) -> None:
        """Adds work done for this key, or images that it was sent, to its account."""
        if step_seconds or images:
            with self._lock:
                use = self._fresh.setdefault((key.id, utc_day()), _Usage())
                use.step_seconds += step_seconds
                use.images += images

    def used_today(self, key: Key) -> float:
        """Step-seconds that this key has used today, without what other servers have not written."""
        account = (key.id, utc_day())
        with self._lock:
            fresh = self._fresh.get(account)
            return self._stored.get(account, 0.0) + (fresh.step_seconds if fresh else 0.0)

    def store(self) -> None:
        """Writes what was booked since the last time; after an error the next call writes it."""
        with self._writing:
            self._store()

    def _store(self) -> None:
        with self._lock:
            fresh = {account: replace(use) for account, use in self._fresh.items()}
        if not fresh:
            return
        with self._engine.begin() as connection:
            for (key_id, day), use in fresh.items():
                _add(connection, key_id, day, use)
        with self._lock:
            for account, use in fresh.items():
                unwritten = self._fresh[account]
                unwritten.step_seconds -= use.step_seconds
                unwritten.images -= use.images
                self._stored[account] = self._stored.get(account, 0.0) + use.step_seconds
                if not unwritten.images and abs(unwritten.step_seconds) <= 1e-9:
                    del self._fresh[account]
            for account in [account for account in self._stored if account[1] != utc_day()]:
                del self._stored[account]

    def _require_daily(self, key: Key, step_seconds: float) -> None:
        limit = key.limits.step_seconds_per_day
        if limit is None:
            return
        _require_left(limit, self.used_today(key) + self._reserved.get(key.id, 0.0), step_seconds)


def utc_day() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def _require_left(limit: float, used: float, step_seconds: float) -> None:
    """RateLimitError if this work does not fit into the day's limit of step-seconds."""
    if used >= limit or used + step_seconds > limit * (1 + 1e-9):
        raise RateLimitError(
            f"this key has used {used:.4g} of its {limit:g} step-seconds of today, what runs included, "
            f"and this request needs {step_seconds:.4g}; the next day begins at midnight UTC",
            code="quota_exceeded",
            retry_after=DAY_S - time.time() % DAY_S,
        )


def _take_token(connection: sa.Connection, key: Key) -> None:
    limit = key.limits.requests_per_minute
    assert limit is not None, "the caller looks"
    own = _RATES.c.key_id == key.id
    full = {"key_id": key.id, "tokens": max(1.0, limit), "filled_at": database.CLOCK}
    connection.execute(postgresql.insert(_RATES).values(full).on_conflict_do_nothing())
    # The row is locked by a query of its own, so that the clock is read after the wait for it.
    connection.execute(sa.select(_RATES.c.key_id).where(own).with_for_update())
    row = connection.execute(sa.select(_RATES.c.tokens, _RATES.c.filled_at, database.CLOCK).where(own)).one()
    bucket = _Bucket(row[0], row[1])
    bucket.take(limit, float(row[2]))
    connection.execute(_RATES.update().where(own).values(tokens=bucket.tokens, filled_at=bucket.filled_at))


def _of(key_id: str, day: str) -> sa.ColumnElement[bool]:
    return (_USAGE.c.key_id == key_id) & (_USAGE.c.day == day)


def _add(connection: sa.Connection, key_id: str, day: str, use: _Usage) -> None:
    row = {"key_id": key_id, "day": day, "step_seconds": use.step_seconds, "images": use.images}
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    more = {"step_seconds": _USAGE.c.step_seconds + use.step_seconds, "images": _USAGE.c.images + use.images}
    connection.execute(
        insert(_USAGE).values(row).on_conflict_do_update(index_elements=["key_id", "day"], set_=more)
    )
