"""Pictures behind signed URLs, and the list of each key's newest ones.

A file's name is random, and a URL's signature covers name and expiry, so that a name alone opens nothing.
The newest pictures of a living key, and those that it has starred, stay when their URLs have expired;
whoever else held such a URL cannot use it any more.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import re
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import sqlalchemy as sa
import structlog

from mezzotint.errors import (
    ConflictError,
    GoneError,
    NotFoundError,
    PermissionDeniedError,
    StorageFullError,
    UnavailableError,
    echo,
)
from mezzotint.images import MEDIA_TYPES, Parameters
from mezzotint.server.store import database
from mezzotint.server.store.folder import OWNER_LENGTH, Storage, StoredFile
from mezzotint.server.store.keys import ANONYMOUS
from mezzotint.server.store.signing import Signer
from mezzotint.server.threads import GALLERY

PATH = "/images/"
"""The path of all pictures below the server's address."""
_NAME = re.compile(rf"[A-Za-z0-9_-]{{32}}({'|'.join(map(re.escape, MEDIA_TYPES))})")
_EXPIRY = re.compile(r"[0-9]{1,12}")
_TABLE = database.pictures
MAX_UNLISTED = 1000
"""Most pictures that wait for their entry in the gallery while the database does not answer."""
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PictureFile:
    """The file behind a valid URL."""

    stored: StoredFile
    media_type: str
    expires: int
    """When the URL ends, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class GalleryEntry:
    """One picture in a key's gallery."""

    name: str
    created: float
    parameters: dict[str, Any]
    """The fields of the request that gives this picture again."""
    starred: bool = False

    def matches(self, words: Sequence[str]) -> bool:
        """Whether each of these case-folded words is somewhere in what the picture was made with."""
        fields = self.parameters
        names = ("model", "prompt", "negative_prompt", "seed")
        text = " ".join(str(fields.get(name, "")) for name in names).casefold()
        text += f" {fields.get('width')}x{fields.get('height')}"
        return all(word in text for word in words)


class Pictures:
    """The pictures of every key. Methods that are no coroutines block: call them from a thread.

    `gallery_size` is how many of a key's newest outlive their URLs; 0 keeps none.
    `max_starred` is how many a key may star, which are kept besides. All pictures of one key may take
    `max_bytes`.
    """

    def __init__(
        self,
        engine: sa.Engine,
        storage: Storage,
        signer: Signer,
        ttl_s: float,
        gallery_size: int,
        max_starred: int,
        max_bytes: int = 2**62,
    ) -> None:
        self.storage = storage
        self._engine = engine
        self._signer = signer
        self._ttl_s = ttl_s
        self._gallery_size = gallery_size
        self._max_starred = max_starred
        self._max_bytes = max_bytes
        self._used: Counter[str] = Counter()
        """Bytes on disk by the key's `Signer.owner`: counted by `clean`, kept by `save` and `remove`."""
        self._saved: Counter[str] = Counter()
        """The part of `_used` that came while `clean` was counting."""
        self._lock = threading.Lock()
        """Guards the two above."""
        self._unlisted: deque[dict[str, Any]] = deque()
        """Rows of pictures that are not in the gallery yet: `save` adds them, `enter` takes them away."""
        self._entering = threading.Lock()

    # ------------------------------------------------------------ files and their URLs

    def save(self, data: bytes, suffix: str, key_id: str, parameters: Parameters) -> str:
        """Stores a picture for this key and returns its name; raises what `Storage.write` does.

        StorageFullError when the key may store no more; nothing is left behind. `listed` enters it into the
        gallery, because a database that does not answer must not keep a thread that makes answers.
        """
        owner = self._signer.owner(key_id)
        name = owner + secrets.token_urlsafe(18) + suffix
        self._take_room(owner, len(data))
        try:
            self.storage.write(name, data)
        except BaseException:
            self._free_room(owner, len(data))
            raise
        if self._gallery_size:
            values = parameters.request_fields()
            row = {"name": name, "key_id": key_id, "created": time.time(), "parameters": values}
            if len(self._unlisted) < MAX_UNLISTED:
                self._unlisted.append(row)
            else:  # a picture is worth more than its entry in the gallery
                log.warning("picture is missing from the gallery", reason=f"{MAX_UNLISTED} others wait")
        return name

    async def listed(self, key_id: str, limit_s: float | None = None) -> None:
        """Waits until the key's pictures are in the gallery, for `limit_s` at most.

        Those that are not by then follow when the database answers.
        """
        if any(row["key_id"] == key_id for row in tuple(self._unlisted)):
            with contextlib.suppress(UnavailableError, sa.exc.SQLAlchemyError, OSError):
                await GALLERY.run(self.enter, limit_s=limit_s)

    def enter(self) -> None:
        """Enters what `save` has stored into the gallery; what fails stays for the next call."""
        if not self._entering.acquire(blocking=False):  # by `clean` and by a request at once
            return
        try:
            while self._unlisted:
                self._enter_row(self._unlisted[0])
                self._unlisted.popleft()
        finally:
            self._entering.release()

    def _enter_row(self, row: dict[str, Any]) -> None:
        try:
            with self._engine.begin() as connection:
                connection.execute(database.insert_new(connection, _TABLE).values(row))
        except (sa.exc.OperationalError, sa.exc.TimeoutError) as error:
            reason = str(error).splitlines()[0]
            log.warning("pictures wait for the gallery", num=len(self._unlisted), reason=reason)
            raise
        except sa.exc.SQLAlchemyError as error:
            log.warning("picture is missing from the gallery", reason=str(error).splitlines()[0])

    def url(self, base: str, name: str, *, expires: int | None = None) -> str:
        """The address of a stored picture below `base`, valid for the time to live from now on."""
        until = int(time.time() + self._ttl_s) if expires is None else expires
        signature = self._signer.signature(name, until)
        return f"{base.rstrip('/')}{PATH}{name}?expires={until}&signature={signature}"

    async def find(self, name: str, expires: str, signature: str) -> PictureFile:
        """The file behind a URL.

        PermissionDeniedError for a forged URL, GoneError for an expired one, NotFoundError for a name that
        cannot be a picture's, UnavailableError when the storage does not answer.
        """
        if not _NAME.fullmatch(name) or not _EXPIRY.fullmatch(expires):
            raise NotFoundError("there is no such picture; take the URL from an answer as it is")
        expected = self._signer.signature(name, int(expires))
        if not hmac.compare_digest(expected.encode(), signature.encode()):
            raise PermissionDeniedError(
                "the signature of this picture URL is not valid; take the URL from an answer as it is",
                code="invalid_signature",
            )
        stored = await self.storage.find(name) if time.time() < int(expires) else None
        if stored is None:
            raise gone()
        return PictureFile(stored, MEDIA_TYPES[PurePath(name).suffix], int(expires))

    def _take_room(self, owner: str, size: int) -> None:
        with self._lock:
            if self._used[owner] + size > self._max_bytes:
                raise StorageFullError(
                    f"the stored pictures of this key take {self._used[owner]} bytes, and {size} more would "
                    f"be over {self._max_bytes}; ask for response_format png to have the picture in the "
                    "answer, delete stored ones, or wait until their URLs expire",
                    code="too_many_pictures",
                )
            self._used[owner] += size
            self._saved[owner] += size

    def _free_room(self, owner: str, size: int) -> None:
        with self._lock:
            self._used[owner] -= size
            self._saved[owner] -= size

    # ------------------------------------------------------------ the gallery

    def list(
        self, key_id: str, limit: int, before: str | None = None, *, search: str = "", starred: bool = False
    ) -> list[GalleryEntry]:
        """The key's pictures, newest first, beginning after the one named `before`.

        Only those in which each word of `search` occurs, and with `starred` only starred ones.
        """
        query = (
            sa.select(_TABLE.c.name, _TABLE.c.created, _TABLE.c.parameters, _TABLE.c.starred)
            .where(_TABLE.c.key_id == key_id)
            .order_by(_TABLE.c.created.desc(), _TABLE.c.name)
        )
        words = search.casefold().split()
        if starred:
            query = query.where(_TABLE.c.starred)
        if not words:
            query = query.limit(limit)
        with self._engine.connect() as connection:
            if before is not None:
                query = query.where(_TABLE.c.created < _created(connection, before, key_id))
            entries = (GalleryEntry(*row) for row in connection.execute(query))
            return list(itertools.islice((each for each in entries if each.matches(words)), limit))

    def star(self, name: str, key_id: str, starred: bool) -> None:
        """Stars one of the key's pictures, or takes its star away; ConflictError for one star too many."""
        mine = _TABLE.c.key_id == key_id
        with self._engine.begin() as connection:
            _created(connection, name, key_id)
            others = sa.select(sa.func.count()).where(mine, _TABLE.c.starred, _TABLE.c.name != name)
            if starred and (connection.scalar(others) or 0) >= self._max_starred:
                raise ConflictError(
                    f"this key has {self._max_starred} starred pictures already, which is the most "
                    "(max_starred); take the star from one first"
                )
            connection.execute(_TABLE.update().where(mine, _TABLE.c.name == name).values(starred=starred))

    def remove(self, name: str, key_id: str) -> None:
        """Deletes one of the key's pictures; its URLs end with it."""
        with self._engine.connect() as connection:
            _created(connection, name, key_id)
        freed = self.storage.remove(name)  # first, so that who is told that it failed can ask again
        self._free_room(name[:OWNER_LENGTH], freed)
        with self._engine.begin() as connection:
            connection.execute(_TABLE.delete().where(_TABLE.c.name == name))

    def clean(self) -> tuple[int, int]:
        """Removes what is past its life; returns how many files went and how many bytes stay."""
        self.enter()
        newest = sa.func.row_number().over(
            partition_by=_TABLE.c.key_id, order_by=(_TABLE.c.created.desc(), _TABLE.c.name)
        )
        ranked = (
            sa.select(_TABLE.c.name, newest.label("rank")).where(_TABLE.c.starred.is_(sa.false())).subquery()
        )
        beyond = sa.select(ranked.c.name).where(ranked.c.rank > self._gallery_size)
        living = sa.select(database.keys.c.id).where(database.keys.c.revoked.is_(None))
        orphan = _TABLE.c.key_id.not_in(living) & (_TABLE.c.key_id != ANONYMOUS.id)
        with self._engine.begin() as connection:
            connection.execute(_TABLE.delete().where(_TABLE.c.name.in_(beyond) | orphan))
            listed = frozenset(connection.scalars(sa.select(_TABLE.c.name)))
        with self._lock:
            self._saved.clear()
        removed, used = self.storage.clean(time.time() - self._ttl_s, listed)
        with self._lock:
            self._used = used + self._saved
        return removed, used.total()


def gone() -> GoneError:
    """What is said of a picture that is no more."""
    return GoneError(
        "this picture URL has expired; the same request with the same seed makes the picture again"
    )


def _created(connection: sa.Connection, name: str, key_id: str) -> float:
    """When the key made this picture; NotFoundError if it did not."""
    if not _NAME.fullmatch(name):  # NUL would be an error of Postgres
        raise _unknown(name)
    query = sa.select(_TABLE.c.created).where(_TABLE.c.name == name, _TABLE.c.key_id == key_id)
    created = connection.scalar(query)
    if created is None:
        raise _unknown(name)
    return float(created)


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(f"this key has no picture {echo(name)}; list its pictures to see which it has")
