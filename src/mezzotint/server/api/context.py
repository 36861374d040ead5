"""The container that the routes of every dialect work with, and who is calling."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import sqlalchemy as sa
from fastapi import Depends, Header, Request

from mezzotint.config import Settings
from mezzotint.errors import AuthenticationError
from mezzotint.server.metrics import Metrics
from mezzotint.server.store import keys
from mezzotint.server.store.keys import Key
from mezzotint.server.store.pictures import Pictures
from mezzotint.server.store.quotas import Quotas
from mezzotint.server.store.signing import Signer
from mezzotint.server.work.adapters import AdapterRegistry
from mezzotint.server.work.admission import Admission
from mezzotint.server.work.registry import Registry


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
    pool: ThreadPoolExecutor

    async def authenticate(self, authorization: str | None) -> Key:
        """The key behind an Authorization header; everybody on a server without authentication."""
        if not self.settings.auth:
            return keys.ANONYMOUS
        scheme, _, secret = (authorization or "").partition(" ")
        if not secret.strip() or scheme.lower() != "bearer":
            raise AuthenticationError(
                "no API key was sent; send the header Authorization: Bearer YOUR_KEY", code="missing_api_key"
            )
        return await asyncio.to_thread(self._find_key, secret.strip())

    def _find_key(self, secret: str) -> Key:
        key = keys.authenticate(self.engine, secret)
        self.quotas.load(key)
        return key

    def base_url(self, request: Request) -> str:
        return self.settings.public_url or str(request.base_url)


def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def key_of(request: Request, authorization: Annotated[str | None, Header()] = None) -> Key:
    """Dependency: who is calling."""
    return await context_of(request).authenticate(authorization)


async def admin_of(key: Annotated[Key, Depends(key_of)]) -> Key:
    """Dependency: who is calling, and it must be an admin."""
    key.require_admin()
    return key


CurrentContext = Annotated[Context, Depends(context_of)]
CurrentKey = Annotated[Key, Depends(key_of)]
AdminKey = Annotated[Key, Depends(admin_of)]
