"""The accounts of the keys: what each has used, and the limits it must keep.

Work counts as it is done, even if its picture is never delivered, because limits protect the machine. Images
count when a request has been answered, so nobody is charged for a request that failed or was cancelled.

Requests per minute are a token bucket in memory. Step-seconds per day (UTC) are read from the database once,
counted in memory and written every minute, so a crash forgets at most the last minute.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

import sqlalchemy as sa

from mezzotint.errors import RateLimitError
from mezzotint.server.store import database
from mezzotint.server.store.keys import Key

DAY_S = 86_400
_USAGE = database.usage


@dataclass(slots=True)
class _Bucket:
    """The requests that one key may send; `spend_request` fills and empties it."""

    tokens: float
    filled_at: float
    """Seconds of the event loop's clock."""


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

    def load(self, key: Key) -> None:
        """Reads what a key with a daily limit has used today; later calls on the same day do nothing."""
        account = (key.id, utc_day())
        if key.limits.step_seconds_per_day is None or account in self._stored:
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
        self._require_daily(key, step_seconds)
        self._spend_token(key, now)
        self._reserved[key.id] = self._reserved.get(key.id, 0.0) + step_seconds

    def release(self, key: Key, step_seconds: float) -> None:
        """Gives back what a job had reserved; what it did is booked."""
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
        bucket.tokens = min(max(1.0, limit), bucket.tokens + (now - bucket.filled_at) * limit / 60)
        bucket.filled_at = now
        if bucket.tokens < 1:
            raise RateLimitError(
                f"this key may send {limit:g} requests a minute; wait for the time in Retry-After",
                retry_after=(1 - bucket.tokens) * 60 / limit if limit > 0 else 60.0,
            )
        bucket.tokens -= 1

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
                if not unwritten.images and unwritten.step_seconds <= 1e-9:
                    del self._fresh[account]
            for account in [account for account in self._stored if account[1] != utc_day()]:
                del self._stored[account]

    def _require_daily(self, key: Key, step_seconds: float) -> None:
        limit = key.limits.step_seconds_per_day
        if limit is None:
            return
        used = self.used_today(key) + self._reserved.get(key.id, 0.0)
        if used >= limit or used + step_seconds > limit * (1 + 1e-9):
            raise RateLimitError(
                f"this key has used {used:.4g} of its {limit:g} step-seconds of today, what runs included, "
                f"and this request needs {step_seconds:.4g}; the next day begins at midnight UTC",
                code="quota_exceeded",
                retry_after=DAY_S - time.time() % DAY_S,
            )


def utc_day() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def _add(connection: sa.Connection, key_id: str, day: str, use: _Usage) -> None:
    account = (_USAGE.c.key_id == key_id) & (_USAGE.c.day == day)
    change = _USAGE.update().where(account).values(
        step_seconds=_USAGE.c.step_seconds + use.step_seconds, images=_USAGE.c.images + use.images
    )  # fmt: skip
    if connection.execute(change).rowcount == 0:
        row = {"key_id": key_id, "day": day, "step_seconds": use.step_seconds, "images": use.images}
        connection.execute(_USAGE.insert().values(row))
