"""What is changed at one server reaches the other one on the same Postgres database while both run."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mezzotint.server.api.gateways import FILES_PATH
from mezzotint.server.store import database
from mezzotint.server.work import adapters as registry
from mezzotint.server.work.lifecycle import Command, State
from mezzotint.server.work.registry import Registry
from tests.server.hosting import PATIENCE_S, Host, hosting, settings_for
from tests.server.work.test_adapters import write

ENDPOINTS = "/dedicated/beta/endpoint"
ADAPTERS = f"{ENDPOINTS}/one/adapters"


def change(host: Host, method: str, path: str, body: dict[str, Any] | None = None) -> None:
    answer = host.client.request(method, ENDPOINTS + path, json=body)
    assert answer.status_code == 200, answer.text


def until(host: Host, endpoint_id: str, status: str | None) -> None:
    """Waits until the endpoint has this status at this server; None is none at all."""
    end, found = time.monotonic() + PATIENCE_S, None
    while time.monotonic() < end:
        listed = host.client.get(ENDPOINTS).json()["data"].get(endpoint_id)
        found = listed and listed["status"]
        if found == status:
            return
        time.sleep(0.02)
    raise AssertionError(f"{endpoint_id} is {found}, not {status}")


def spec(host: Host, endpoint_id: str = "one") -> dict[str, Any]:
    values: dict[str, Any] = host.client.get(f"{ENDPOINTS}/{endpoint_id}").json()["mezzotint"]
    return values


def has_other_worker(host: Host, pid: int | None) -> bool:
    return host.endpoint().current.replicas[0].pid not in (None, pid)


def test_an_endpoint_is_made_changed_and_deleted_on_both(pair: tuple[Host, Host]) -> None:
    first, second = pair
    change(first, "POST", "", {"name": "two", "settings": {"model": "fake", "deadline_s": 50}})
    until(second, "two", "RUNNING")
    picture = first.picture(model="two", seed=3)
    assert second.picture(model="two", seed=3) == picture

    change(second, "PUT", "/two", {"settings": {"deadline_s": 40}})
    first.until(lambda: first.endpoint("two").spec.deadline_s == 40)
    until(first, "two", "RUNNING")
    change(first, "PUT", "/two", {"settings": {"max_queue_s": 30}})
    second.until(lambda: second.endpoint("two").spec.max_queue_s == 30)
    for host in pair:
        until(host, "two", "RUNNING")
        settings = spec(host, "two")["settings"]
        assert (settings["deadline_s"], settings["max_queue_s"]) == (40, 30), "neither undid the other"
        assert spec(host, "two")["version"] == 3

    change(second, "DELETE", "/two")
    until(first, "two", None)
    answer = first.post(model="two")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "endpoint_not_found")
    change(first, "POST", "", {"name": "two", "settings": {"model": "fake"}})
    until(second, "two", "RUNNING")


def test_commands_to_one_server_are_carried_out_by_both(pair: tuple[Host, Host]) -> None:
    first, second = pair
    change(first, "PUT", "/one/sleep")
    until(second, "one", "SLEEPING")
    second.picture()  # wakes it there alone
    until(second, "one", "RUNNING")
    until(first, "one", "SLEEPING")
    change(first, "PUT", "/one/sleep")
    until(second, "one", "SLEEPING")
    change(second, "PUT", "/one/wake")
    until(first, "one", "RUNNING")

    before = [host.endpoint().current.replicas[0].pid for host in pair]
    change(first, "PUT", "/one/restart")
    for host, pid in zip(pair, before, strict=True):
        host.until(partial(has_other_worker, host, pid))
        until(host, "one", "RUNNING")
    change(second, "PUT", "/one/terminate")
    until(first, "one", "TERMINATED")
    change(first, "PUT", "/one/restart")
    change(first, "PUT", "/one/sleep")  # before the other may have seen that it was restarted
    until(second, "one", "SLEEPING")


def test_an_update_that_would_undo_one_of_another_server_is_refused(
    pair: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = pair

    async def follow(registry: Registry, drain_s: float) -> None:
        """The moment before a server has noticed."""

    body = {"settings": {"max_queue_s": 30}}
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "follow", follow)
        change(first, "PUT", "/one", {"settings": {"deadline_s": 40}})
        answer = second.client.put(f"{ENDPOINTS}/one", json=body)
        assert answer.status_code == 409, answer.text
        assert "another server" in answer.json()["error"]["message"]
        made = {"name": "two", "settings": {"model": "fake"}}
        change(first, "POST", "", made)
        answer = second.client.post(ENDPOINTS, json=made)
        assert answer.status_code == 409, answer.text
    second.until(lambda: second.endpoint().spec.deadline_s == 40)
    until(second, "one", "RUNNING")
    change(second, "PUT", "/one", body)


def test_rows_are_those_of_the_server_that_measured_first(pair: tuple[Host, Host]) -> None:
    first, _ = pair
    with first.service.engine.begin() as connection:
        values = connection.scalar(sa.select(database.endpoints.c.calibration))
        assert values is not None
        assert values["info"]["rows"] == 4
        values["info"]["rows"] = 2
        connection.execute(database.endpoints.update().values(calibration=values))
    first.command(Command.RESTART)  # it goes on with 4, which it knows, and finds 2

    def has_two() -> bool:
        info = first.endpoint().info
        return info is not None and info.rows == 2

    first.until(has_two)
    assert first.wait_for(State.READY) is State.READY


def test_an_adapter_added_to_one_server_serves_and_leaves_on_both(
    pair: tuple[Host, Host], tmp_path: Path
) -> None:
    first, second = pair
    file = write(tmp_path / "ink.safetensors").read_bytes()
    headers = {"content-type": "application/octet-stream"}

    def put(host: Host, content: bytes, **query: Any) -> None:
        answer = host.client.put(f"{ADAPTERS}/ink", params=query, content=content, headers=headers)
        assert answer.status_code == 200, answer.text

    def scale(host: Host) -> Any:
        adapter = host.endpoint().adapters.get("ink")
        return adapter and adapter.scale

    put(first, file, scale=0.5)
    second.until(lambda: scale(second) == 0.5)
    drawn = first.picture(model="one:ink", seed=1)
    assert second.picture(model="one:ink", seed=1) == drawn != second.picture(seed=1)

    config = '{"peft_type": "LORA", "r": 4, "lora_alpha": 8}'
    other = write(tmp_path / "other.safetensors", text="b").read_bytes()
    put(second, other, scale=0.7, replace=True, peft_config=config)
    first.until(lambda: scale(first) == 0.7)
    adapter = first.endpoint().adapters["ink"]
    assert adapter.path.read_bytes() == other
    assert adapter.path.with_name("adapter_config.json").read_text() == config

    assert first.client.delete(f"{ADAPTERS}/ink").status_code == 200
    second.until(lambda: scale(second) is None)
    assert second.post(model="one:ink").json()["error"]["code"] == "adapter_not_found"

    place = f"{FILES_PATH}/{adapter.path.parent.name}/{adapter.path.name}"
    assert second.client.get(place).status_code == 404, "files are for servers, not for keys"


def test_an_adapter_whose_file_nobody_has_is_asked_for_again(
    pair: tuple[Host, Host], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "FETCH_AGAIN_S", 0.0)
    first, second = pair
    source = write(tmp_path / "ink.safetensors")
    added = first.client.post(ADAPTERS, json={"route": "ink", "source": str(source)})
    assert added.status_code == 200, added.text
    second.until(lambda: "ink" in second.endpoint().adapters)
    file = first.endpoint().adapters["ink"].path
    whole = file.read_bytes()
    file.write_bytes(b"damaged")
    second.endpoint().adapters["ink"].path.unlink()
    second.call(second.endpoint().adapters.close_route, "ink")  # as after a start with an empty folder
    waiting = second.service.adapters._fetch_again
    second.until(lambda: waiting)
    assert "ink" not in second.endpoint().adapters, "what is damaged is no adapter"
    file.write_bytes(whole)
    second.until(lambda: "ink" in second.endpoint().adapters)
    assert not waiting
    assert second.picture(model="one:ink", seed=1) == first.picture(model="one:ink", seed=1)


def test_a_server_with_an_empty_folder_gets_the_adapters_at_its_start(
    pair: tuple[Host, Host], tmp_path: Path
) -> None:
    first, _ = pair
    source = write(tmp_path / "ink.safetensors")
    added = first.client.post(ADAPTERS, json={"route": "ink", "source": str(source)})
    assert added.status_code == 200, added.text
    source.unlink()
    url = first.service.settings.database_url
    with hosting(settings_for(tmp_path / "third", database_url=url), key=first.first_key) as third:
        third.until(lambda: "ink" in third.endpoint().adapters)
        assert third.picture(model="one:ink", seed=1) == first.picture(model="one:ink", seed=1)
