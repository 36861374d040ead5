"""What Client and AsyncClient share of `client.adapters`: the managing routes, which want an admin key."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypedDict
from urllib.parse import quote, urlencode

from mezzotint import hub
from mezzotint.adapter_sources import choose_weights
from mezzotint.client.exchange import Options, Send, Steps, exchange
from mezzotint.errors import InvalidRequestError


class AdapterView(TypedDict, total=False):
    """A registered adapter as the server shows it; docs/http.md says what each field means."""

    name: str
    route: str
    source: str
    scale: float
    checksum: str
    family: str | None
    rank: int | None
    num_bytes: int | None
    file_bytes: int
    target_modules: list[str]
    origin: str
    created: float
    state: str
    failure: str | None


def split_name(name: str) -> tuple[str, str]:
    """Endpoint and route of `ID:ROUTE`; InvalidRequestError for anything else."""
    id, _, route = name.partition(":")
    if not id or not route or ":" in route or "/" in name:
        raise InvalidRequestError(f"an adapter is named ID:ROUTE, like emoji:flat (got {name})", param="name")
    return id, route


def upload(
    options: Options, name: str, file: str | os.PathLike[str], scale: float, replace: bool
) -> Steps[AdapterView]:
    """Sends a safetensors file, or that of a folder, with PEFT's configuration where it lies beside."""
    id, route = split_name(name)
    weights = Path(file)
    try:
        if weights.is_dir():
            names = [entry.name for entry in weights.iterdir()]
            weights = weights / choose_weights(names, f"the folder {weights.name}")
        query = {"name": weights.name, "scale": str(scale), "replace": str(replace).lower()}
        config = weights.with_name(hub.PEFT_CONFIG)
        if weights.name == hub.PEFT_WEIGHTS and config.is_file():
            query["peft_config"] = config.read_text(encoding="utf-8")
        content = weights.read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{file}: cannot be read ({error.strerror})", param="file") from None
    headers = {"Content-Type": "application/octet-stream"}
    send = options.own("PUT", f"{_path(id, route)}?{urlencode(query)}", headers=headers, content=content)
    added: AdapterView = yield from _asked(options, send)
    return added


def show_all(options: Options, endpoint_id: str) -> Steps[list[AdapterView]]:
    answer = yield from _asked(options, options.own("GET", _path(endpoint_id)))
    found: list[AdapterView] = answer["data"]
    return found


def remove(options: Options, name: str) -> Steps[AdapterView]:
    removed: AdapterView = yield from _asked(options, options.own("DELETE", _path(*split_name(name))))
    return removed


def _path(endpoint_id: str, route: str | None = None) -> str:
    path = f"/dedicated/beta/endpoint/{quote(endpoint_id, safe='')}/adapters"
    return path if route is None else f"{path}/{quote(route, safe='')}"


def _asked(options: Options, send: Send) -> Steps[Any]:
    response = yield from exchange(send, options.max_retries)
    return response.json()
