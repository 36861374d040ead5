"""What the shell offers for a half-written word: endpoints, routes and formats.

The running server is asked, as the command itself would ask it. What cannot be known is not offered.
"""

from __future__ import annotations

import contextlib
from typing import Any

import typer

from mezzotint.cli.reach import ENDPOINTS, managed
from mezzotint.errors import MezzotintError

FORMATS = ("png", "jpeg", "jpg", "raw", "url")


def endpoint_ids(context: typer.Context, incomplete: str) -> list[str]:
    """The endpoints of the server that the command would ask."""
    return [id for id in _endpoints(context) if id.startswith(incomplete)]


def models(context: typer.Context, incomplete: str) -> list[str]:
    """Its endpoints, and each with its routes."""
    found = [name for id, routes in _endpoints(context).items() for name in (id, *routes)]
    return [name for name in found if name.startswith(incomplete)]


def formats(incomplete: str) -> list[str]:
    """The response formats."""
    return [name for name in FORMATS if name.startswith(incomplete)]


def _endpoints(context: typer.Context) -> dict[str, list[str]]:
    """`ID:ROUTE` of each adapter, by endpoint."""
    given: dict[str, Any] = context.params
    with (
        contextlib.suppress(MezzotintError),
        managed(given.get("server"), given.get("config"), given.get("data_dir")) as server,
    ):
        return {
            id: [f"{id}:{route}" for route in server.ask("GET", f"{ENDPOINTS}/{id}")["mezzotint"]["adapters"]]
            for id in server.ask("GET", ENDPOINTS)["data"]
        }
    return {}
