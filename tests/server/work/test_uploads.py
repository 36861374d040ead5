"""Adapters that come over the wire, with an admin key, from any folder of any machine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mezzotint import AsyncClient, Client
from mezzotint.errors import InvalidRequestError, MezzotintError
from tests.server.hosting import Host, client, endpoint, hosting, settings_for
from tests.server.work.test_adapters import write

ADAPTERS = "/dedicated/beta/endpoint/one/adapters"
HEADERS = {"content-type": "application/octet-stream"}
SMALL = 4096
"""Most bytes of an adapter's file here; `adapter_bytes` is a quarter."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    settings = settings_for(tmp_path_factory.mktemp("server"), endpoint(adapter_bytes=SMALL // 4))
    with hosting(settings) as running:
        yield running


@pytest.fixture
def host(server: Host) -> Iterator[Host]:
    """The server, which each test leaves without adapters."""
    yield server
    for adapter in server.client.get(ADAPTERS).json()["data"]:
        assert server.client.delete(f"{ADAPTERS}/{adapter['route']}").status_code == 200


def put(host: Host, content: Any, route: str = "ink", **query: Any) -> httpx2.Response:
    return host.client.put(f"{ADAPTERS}/{route}", params=query, content=content, headers=HEADERS)


def leftovers(host: Host) -> list[str]:
    folder = host.service.adapters.table.folder
    return [path.name for path in folder.iterdir() if path.name.startswith(".")] if folder.exists() else []


def test_an_uploaded_adapter_is_one_like_any_other(host: Host, tmp_path: Path) -> None:
    file = write(tmp_path / "ink.safetensors")
    answer = put(host, file.read_bytes(), name="C:\\loras\\ink.safetensors", scale=0.5)
    assert answer.status_code == 200, answer.text
    added = answer.json()
    assert (added["name"], added["source"], added["scale"]) == ("one:ink", "upload of ink.safetensors", 0.5)
    assert (added["origin"], added["state"], added["rank"]) == ("api", "ready", 4)
    file.unlink()
    assert host.picture(model="one:ink", seed=1) != host.picture(seed=1)
    assert leftovers(host) == []
    assert put(host, b"", route="ink").status_code == 409, "before anything is read"
    other = write(tmp_path / "other.safetensors", text="b")
    assert put(host, other.read_bytes(), replace=True).json()["checksum"] != added["checksum"]


@pytest.mark.parametrize(
    ("content", "query", "status", "code"),
    [
        (b"not weights", {}, 422, "adapter_broken"),
        (b"x" * (SMALL + 1), {}, 413, "body_too_large"),
        ([b"x" * SMALL, b"x"], {}, 413, "body_too_large"),  # sent without a length
        (b"x", {"name": "ink.pt"}, 422, "adapter_unsupported"),
        (b"x", {"scale": 1000}, 422, "invalid_value"),
        (b"x", {"scale": "nan"}, 422, "invalid_value"),
        (b"x", {"route": "a b"}, 422, "invalid_value"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    host: Host, content: Any, query: dict[str, Any], status: int, code: str
) -> None:
    answer = put(host, iter(content) if isinstance(content, list) else content, **query)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert leftovers(host) == []
    assert host.client.get(ADAPTERS).json()["data"] == []


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("..", "adapter.safetensors"),
        ("../../etc/passwd.safetensors", "passwd.safetensors"),
        ("a\0b.safetensors", "a_b.safetensors"),
        ("墨.safetensors", "_.safetensors"),
        ("x" * 150 + ".safetensors", "x" * 88 + ".safetensors"),
    ],
)
def test_a_name_is_only_a_name(host: Host, tmp_path: Path, name: str, kept: str) -> None:
    answer = put(host, write(tmp_path / "ink.safetensors").read_bytes(), name=name)
    assert answer.json()["source"] == f"upload of {kept}", answer.text


def test_only_an_admin_uploads_and_only_files(host: Host) -> None:
    with host.new_client() as plain, client(host.url, None) as stranger:
        for who, status in ((plain, 403), (stranger, 401)):
            assert who.put(f"{ADAPTERS}/ink", content=b"x", headers=HEADERS).status_code == status
    assert host.client.put(f"{ADAPTERS}/ink", json={}).status_code == 415
    assert leftovers(host) == []


def test_the_sdk_uploads_lists_and_removes(host: Host, tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    write(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    with Client(base_url=host.url, api_key=host.first_key) as sdk:
        assert sdk.adapters.add("one:ink", folder)["source"] == "upload of adapter_model.safetensors"
        kept = host.endpoint().adapters["ink"].path
        assert kept.with_name("adapter_config.json").read_text() == '{"lora_alpha": 8, "r": 4}'
        assert [adapter["route"] for adapter in sdk.adapters.list("one")] == ["ink"]
        with pytest.raises(MezzotintError, match="already"):
            sdk.adapters.add("one:ink", folder)
        assert sdk.adapters.remove("one:ink")["route"] == "ink"
        with pytest.raises(InvalidRequestError, match="cannot be read"):
            sdk.adapters.add("one:ink", tmp_path / "nowhere.safetensors")
        with pytest.raises(InvalidRequestError, match="ID:ROUTE"):
            sdk.adapters.add("ink", folder)

    async def awaited() -> list[str]:
        async with AsyncClient(base_url=host.url, api_key=host.first_key) as sdk:
            await sdk.adapters.add("one:ink", folder)
            routes = [adapter["route"] for adapter in await sdk.adapters.list("one")]
            await sdk.adapters.remove("one:ink")
            return routes

    assert asyncio.run(awaited()) == ["ink"]
