"""The container that the routes of every dialect work with, and who is calling."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass, field
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import Scope

from mezzotint.config import Settings
from mezzotint.errors import AuthenticationError, DeadlineError, UnavailableError
from mezzotint.server.api.picture_urls import PictureFetcher
from mezzotint.server.metrics import Metrics
from mezzotint.server.store import keys
from mezzotint.server.store.keys import Key
from mezzotint.server.store.pictures import Pictures
from mezzotint.server.store.quotas import Quotas
from mezzotint.server.store.signing import Signer
from mezzotint.server.threads import DATABASE, OWNER, STRANGERS
from mezzotint.server.tracing import Tracing
from mezzotint.server.work.adapters import AdapterRegistry
from mezzotint.server.work.admission import Admission
from mezzotint.server.work.registry import Registry

BASIC_PREFIX = "/sdapi/"
ADMIN_PREFIX = "/dedicated/beta/"
MAX_TIMEOUT_S = 3600.0
"""Most that X-Request-Timeout-S may say."""


@dataclass(slots=True)
class Context:
    """What the routes of every dialect work with; `app.state.context`."""

    settings: Settings
    engine: sa.Engine
    registry: Registry
    adapters: AdapterRegistry
    admission: Admission
    signer: Signer
    pictures: Pictures
    metrics: Metrics
    quotas: Quotas
    fetcher: PictureFetcher | None
    """None: URLs of pictures are refused."""
    tracing: Tracing | None
    _good: dict[str, None] = field(default_factory=dict)
    """Hashes of the secrets that were those of a key; the others wait in a queue of their own."""

    async def authenticate(self, authorization: str | None, limit_s: float | None = None) -> Key:
        """The key behind an Authorization header; everybody on a server without authentication.

        UnavailableError when the database does not answer, DeadlineError when that takes `limit_s`.
        """
        if not self.settings.auth:
            return keys.ANONYMOUS
        scheme, _, secret = (authorization or "").partition(" ")
        if not secret.strip() or scheme.lower() != "bearer":
            raise AuthenticationError(
                "no API key was sent; send the header Authorization: Bearer YOUR_KEY", code="missing_api_key"
            )
        return await self._look_up(secret.strip(), limit_s)

    async def _look_up(self, secret: str, limit_s: float | None) -> Key:
        digest = keys.digest_of(secret)
        threads = DATABASE if digest in self._good else STRANGERS
        now = asyncio.get_running_loop().time
        began = now()
        try:
            key = await threads.run(self._find_key, secret, limit_s=limit_s)
        except UnavailableError:
            if limit_s is None or now() < began + limit_s:
                raise
            raise DeadlineError("the request reached its deadline while its key was looked up") from None
        except AuthenticationError:
            self._good.pop(digest, None)
            raise
        self._good[digest] = None
        return key

    def _find_key(self, secret: str) -> Key:
        key = keys.authenticate(self.engine, secret)
        self.quotas.load(key)
        return key

    def base_url(self, request: Request) -> str:
        return self.settings.public_url or str(request.base_url)


async def context_of(request: Request) -> Context:
    """Dependency. It is no plain function, because FastAPI would call that in a thread."""
    context: Context = request.app.state.context
    return context


def timeout_of(headers: Headers) -> float | None:
    """The seconds that a request allows itself; None without the header, and for what is no such number."""
    try:
        seconds = float(headers.get("x-request-timeout-s", ""))
    except ValueError:
        return None
    return seconds if 0 < seconds <= MAX_TIMEOUT_S else None


async def caller_of(scope: Scope) -> Key:
    """Who sends this request, by its headers alone; an admin where only admins may send any.

    AUTOMATIC1111's routes take the key as the password of Basic authentication too.
    """
    context: Context = scope["app"].state.context
    headers = Headers(scope=scope)
    authorization = headers.get("authorization")
    if scope["path"].startswith(BASIC_PREFIX):
        authorization = _as_bearer(authorization)
    key = await context.authenticate(authorization, timeout_of(headers))
    OWNER.set(key.id)
    if scope["path"].startswith(ADMIN_PREFIX):
        key.require_admin()
    return key


def _as_bearer(authorization: str | None) -> str | None:
    scheme, _, text = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        _, _, secret = base64.b64decode(text.strip(), validate=True).decode().partition(":")
    except ValueError:  # no base64, or no text in it
        secret = ""
    return f"Bearer {secret}"


async def key_of(request: Request) -> Key:
    """Dependency: who is calling. A request with a body has said so before its body was read."""
    known: Key | None = getattr(request.state, "key", None)
    return await caller_of(request.scope) if known is None else known


async def admin_of(key: Annotated[Key, Depends(key_of)]) -> Key:
    """Dependency: who is calling, and it must be an admin."""
    key.require_admin()
    return key


CurrentContext = Annotated[Context, Depends(context_of)]
CurrentKey = Annotated[Key, Depends(key_of)]
AdminKey = Annotated[Key, Depends(admin_of)]
