"""Pictures in an S3-compatible store, and on this machine's disk for as long as that store does not answer.

The database knows every object: a row is written before its object, so that none is ever left over, and the
store is never asked for a list.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath

import obstore
import sqlalchemy as sa
import structlog
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from mezzotint.errors import ConfigError, MezzotintError, StorageFullError, UnavailableError
from mezzotint.images import MEDIA_TYPES
from mezzotint.server.store import database
from mezzotint.server.store.folder import OWNER_LENGTH, Folder, FolderFile
from mezzotint.server.threads import DATABASE

RETRY_S = 5.0
"""Retry-After while the store does not answer."""
REQUEST_BYTES = 2**20
"""Most bytes of an object that one request fetches."""
BATCH = 1000
"""Objects removed by one request, as S3 allows."""
CHECK_NAME = "mezzotint-storage-check"
"""Written and removed at the start, to see whether the store lets us."""
_METADATA_SERVICE = "169.254.169.254"
"""Where the machines of a cloud give credentials; asked when there are none elsewhere."""
_TABLE, _HELD = database.objects, database.held
_ERRORS = (BaseError, OSError, ValueError, MezzotintError)
"""What obstore raises; FileNotFoundError is a missing bucket or object."""
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ObjectFile:
    """An object of the store, read in pieces: no request to the store lasts as long as its slow client."""

    store: S3Store
    name: str
    size: int
    modified: float

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes]:
        while start < stop:
            end = min(stop, start + REQUEST_BYTES)
            with _unavailable():
                data = await obstore.get_range_async(self.store, self.name, start=start, end=end)
            yield data.to_bytes()
            start = end


@dataclass(frozen=True, slots=True)
class HeldFile:
    """A picture that waits on this machine's disk; it may be moved to the store before it is read."""

    file: FolderFile
    store: S3Store

    @property
    def size(self) -> int:
        return self.file.size

    @property
    def modified(self) -> float:
        return self.file.modified

    async def pieces(self, start: int, stop: int) -> AsyncGenerator[bytes]:
        pieces = self.file.pieces(start, stop)
        try:
            first = await anext(pieces)
        except FileNotFoundError:
            pieces = ObjectFile(self.store, self.file.path.name, self.size, self.modified).pieces(start, stop)
            first = await anext(pieces)
        async with contextlib.aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece


class ObjectStorage:
    """A Storage in a bucket. Pictures that cannot go there wait in `held`, up to `max_held_bytes`."""

    def __init__(
        self,
        engine: sa.Engine,
        store: S3Store,
        held: Folder,
        max_held_bytes: int,
        on_held: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """`on_held` is told how many bytes wait, whenever that changes."""
        self._engine = engine
        self._store = store
        self._held = held
        self._max_held_bytes = max_held_bytes
        self._on_held = on_held
        self._held_bytes = sum(file.size for file in held.files())
        self._counting = threading.Lock()
        """Guards `_held_bytes`."""
        self._moving = threading.Lock()
        """Held while a picture goes from the disk to the store, so that nobody removes it in between."""
        self._is_down = False
        """Whether the last write failed, at store or database. `write` then waits for `write_held`."""
        self._has_others = engine.dialect.name != "sqlite"
        """Whether other servers may be asked for what waits here; the table `held` then tells them."""
        self._is_database_down = False
        """Whether it was the database, as far as is known."""
        on_held(self._held_bytes)

    def check(self) -> None:
        """Writes and removes an object. ConfigError when the store refuses it; if it is away, a log line."""
        try:
            obstore.put(self._store, CHECK_NAME, b"", use_multipart=False)
            obstore.delete(self._store, CHECK_NAME)
        except _ERRORS as error:
            if isinstance(error, MezzotintError):
                raise
            if isinstance(error, PermissionDeniedError | UnauthenticatedError | FileNotFoundError):
                raise ConfigError(
                    f"storage: the store refuses to write and remove an object: {_reason(error)}; see that "
                    "the bucket exists and that the credentials allow to get, put and delete objects in it"
                ) from None
            if _METADATA_SERVICE in str(error):
                raise ConfigError(
                    "storage: there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                    "AWS_SHARED_CREDENTIALS_FILE"
                ) from None
            self._went_down(error)

    # ------------------------------------------------------------ in

    def write(self, name: str, data: bytes) -> None:
        if not self._is_down:
            try:
                self._put(name, data, time.time())
                return
            except (sa.exc.SQLAlchemyError, *_ERRORS) as error:
                self._went_down(error)
        self._hold(name, data)

    def require_room(self) -> None:
        """UnavailableError while the store is away and no more pictures can wait for it."""
        if self._is_down and self._held_bytes >= self._max_held_bytes:
            raise self._no_room()

    def is_shared(self) -> bool:
        return not self._held_bytes

    def write_held(self) -> int:
        """Writes what waits to the store, the oldest first, until that fails; returns how many went."""
        written = 0
        try:
            for file in self._held.files():
                with self._moving:
                    written += self._move(file)
        except sa.exc.SQLAlchemyError as error:
            log.error("pictures wait on disk, the database does not answer", reason=_reason(error))
            return written
        except _ERRORS as error:
            self._went_down(error)
            return written
        if self._is_down:
            log.info("storage answers again")
        self._is_down = False
        if written:
            log.info("held pictures written to storage", num=written)
        return written

    def _move(self, file: FolderFile) -> bool:
        if file.path.suffix not in MEDIA_TYPES:  # not a picture of ours
            return False
        try:
            data = file.path.read_bytes()
        except FileNotFoundError:  # removed meanwhile
            return False
        self._put(file.path.name, data, file.modified)
        self._held.remove(file.path.name)
        self._count(-file.size)
        return True

    def _put(self, name: str, data: bytes, created: float) -> None:
        with self._engine.begin() as connection:
            if not _has(connection, name):
                connection.execute(_TABLE.insert().values(name=name, created=created, bytes=len(data)))
        kind = MEDIA_TYPES[PurePath(name).suffix]
        obstore.put(self._store, name, data, attributes={"Content-Type": kind}, use_multipart=False)

    def _hold(self, name: str, data: bytes) -> None:
        with self._counting:
            if self._held_bytes + len(data) > self._max_held_bytes:
                raise self._no_room()
            self._held_bytes += len(data)
        try:
            self._tell_held(name)
            self._held.write(name, data)
        except BaseException as error:
            self._count(-len(data))
            if isinstance(error, StorageFullError):
                raise self._no_room() from None
            raise
        self._on_held(self._held_bytes)

    def _tell_held(self, name: str) -> None:
        """Says in the database that a picture waits, so that no other server takes it for expired."""
        if self._has_others and not self._is_database_down:
            try:
                with self._engine.begin() as connection:
                    connection.execute(_HELD.insert().values(name=name, created=time.time()))
            except sa.exc.SQLAlchemyError as error:
                self._is_database_down = True
                log.error("other servers do not know that a picture waits here", reason=_reason(error))

    def _no_room(self) -> UnavailableError:
        return UnavailableError(
            f"the server's picture storage does not answer, and {self._held_bytes} bytes of pictures wait "
            f"for it already (at most {self._max_held_bytes}, and what the disk takes); send the request "
            "again later, or ask for response_format png to have the picture in the answer",
            code="storage_unavailable",
            retry_after=RETRY_S,
        )

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self._held_bytes += num_bytes
        self._on_held(self._held_bytes)

    def _went_down(self, error: Exception) -> None:
        if not self._is_down:
            log.error("storage does not answer; pictures wait on disk", reason=_reason(error))
        self._is_down = True
        self._is_database_down = isinstance(error, sa.exc.SQLAlchemyError)

    # ------------------------------------------------------------ out

    async def find(self, name: str) -> ObjectFile | HeldFile | None:
        held = await self._held.find(name)
        if held is not None:
            return HeldFile(held, self._store)
        with _unavailable():
            try:
                meta = await obstore.head_async(self._store, name)
            except FileNotFoundError:
                meta = None
            except PermissionDeniedError:  # so AWS says that there is none to those who may not list
                if await DATABASE.run(self._is_known, name):
                    raise
                meta = None
        if meta is None:
            if await DATABASE.run(self._waits_elsewhere, name):
                raise _elsewhere()
            return None
        return ObjectFile(self._store, name, meta["size"], meta["last_modified"].timestamp())

    def _is_known(self, name: str) -> bool:
        with self._engine.connect() as connection:
            return _has(connection, name)

    def _waits_elsewhere(self, name: str) -> bool:
        """Whether a picture that is not here waits on another server's disk, for all that is known."""
        with self._engine.connect() as connection:
            return self._waits(connection, name)

    def _waits(self, connection: sa.Connection, name: str) -> bool:
        query = sa.select(_HELD.c.name).where(_HELD.c.name == name)
        return self._has_others and connection.scalar(query) is not None

    def remove(self, name: str) -> int:
        """UnavailableError when the store has it and does not answer; the picture is then still there."""
        with self._moving:
            with self._engine.connect() as connection:
                size = connection.scalar(sa.select(_TABLE.c.bytes).where(_TABLE.c.name == name))
                waits = self._waits(connection, name)
            if size is None and waits and self._held.stat(name) is None:
                raise _elsewhere()
            if size is not None:  # also while it waits: an attempt may have arrived without our knowing
                self._erase([name])
            held = self._held.remove(name)
            if held:
                self._count(-held)
            if size is None and waits:
                self._forget([name])
            return int(size or held)

    def _erase(self, names: list[str]) -> None:
        with _unavailable():
            obstore.delete(self._store, names)
        self._forget(names)

    def _forget(self, names: list[str]) -> None:
        with self._engine.begin() as connection:
            for table in (_TABLE, _HELD):
                connection.execute(table.delete().where(table.c.name.in_(names)))

    def clean(self, before: float, listed: frozenset[str]) -> tuple[int, Counter[str]]:
        with self._moving:
            removed, used = self._held.clean(before, listed)
            self._count(used.total() - self._held_bytes)
        kept = sa.select(database.pictures.c.name)
        past = sa.select(_TABLE.c.name).where(_TABLE.c.created < before, _TABLE.c.name.not_in(kept))
        while not self._is_down:
            with self._engine.connect() as connection:
                names = list(connection.scalars(past.limit(BATCH)))
            if not names:
                break
            try:
                self._erase(names)
            except UnavailableError as error:
                log.error("expired pictures stay for now", reason=error.message)
                break
            removed += len(names)
        with self._engine.begin() as connection:  # what never came: its server's disk is lost
            connection.execute(_HELD.delete().where(_HELD.c.created < before, _HELD.c.name.not_in(kept)))
        owner = sa.func.substr(_TABLE.c.name, 1, OWNER_LENGTH).label("owner")
        with self._engine.connect() as connection:
            sums = connection.execute(sa.select(owner, sa.func.sum(_TABLE.c.bytes)).group_by(owner))
            return removed, used + Counter({name: int(size) for name, size in sums})


def _has(connection: sa.Connection, name: str) -> bool:
    return connection.scalar(sa.select(_TABLE.c.name).where(_TABLE.c.name == name)) is not None


def _elsewhere() -> UnavailableError:
    return UnavailableError(
        "the picture waits on another server's disk for the picture storage; try again in a moment",
        code="storage_unavailable",
        retry_after=RETRY_S,
    )


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    """Turns what obstore raises into UnavailableError."""
    try:
        yield
    except _ERRORS as error:
        log.error("storage does not answer", reason=_reason(error))
        raise UnavailableError(
            "the server's picture storage does not answer; try again in a moment",
            code="storage_unavailable",
            retry_after=RETRY_S,
        ) from None


def _reason(error: Exception) -> str:
    """Why, in one line without the body of the store's answer, which may repeat what was signed."""
    text = str(error)
    line = (text.splitlines() or [type(error).__name__])[0].partition("<")[0].rstrip(": ")
    code = re.search(r"<Code>(\w+)</Code>", text)
    return f"{line} ({code[1]})" if code else line
