"""The endpoint API over real HTTP, in the official client's shapes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from mezzotint.server.store import database
from mezzotint.server.work.lifecycle import Command, State
from tests.attacks import attack
from tests.server.hosting import Host, endpoint, hosting, settings_for

BASE = "/dedicated/beta/endpoint"
REQUIRED = [
    "name", "gpuType", "numGpu", "projectId", "creatorId", "teamId", "autoscalingMin", "autoscalingMax",
    "autoscalingCooldown", "maxBatchSize", "tokenizerSkipSpecialTokens", "tokenizerAddSpecialTokens",
]  # fmt: skip
"""Fields without which the official client refuses a spec."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(settings_for(tmp_path_factory.mktemp("server"), drain_s=5)) as running:
        yield running


def put(host: Host, path: str, expected: int = 200) -> dict[str, Any]:
    answer = host.client.put(BASE + path)
    assert answer.status_code == expected, answer.text
    values: dict[str, Any] = answer.json()
    return values


def status(host: Host, endpoint_id: str = "one") -> str:
    answer = host.client.get(f"{BASE}/{endpoint_id}/status").json()
    assert answer["createdAt"] <= answer["updatedAt"]
    word: str = answer["status"]
    return word


@attack("Managing endpoints with an ordinary key", outcome="403")
def test_only_admin_keys_may_call_it(host: Host) -> None:
    with host.new_client() as plain:
        for method, path in (
            ("GET", ""),
            ("POST", ""),
            ("GET", "/one"),
            ("PUT", "/one/sleep"),
            ("DELETE", "/one"),
        ):
            answer = plain.request(method, BASE + path, json={} if method == "POST" else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), path


def test_an_unknown_endpoint_is_404(host: Host) -> None:
    for path in ("/none", "/none/status", "/none/version"):
        assert host.client.get(BASE + path).json()["error"]["code"] == "endpoint_not_found"


def test_a_spec_has_what_the_official_client_requires(host: Host) -> None:
    spec = host.client.get(f"{BASE}/one").json()
    assert [name for name in REQUIRED if spec.get(name) is None] == []
    assert spec["mezzotint"]["settings"]["id"] == "one"
    assert spec["mezzotint"]["replicas"][0]["state"] == "ready"
    assert (spec["currReplicaCnt"], spec["desiredReplicaCnt"]) == (1, 1)


def test_sleep_wake_terminate_restart(host: Host) -> None:
    assert status(host) == "RUNNING"
    assert put(host, "/one/sleep")["status"] == "STOPPING"
    host.wait_for(State.SLEEPING)
    assert status(host) == "SLEEPING"
    assert put(host, "/one/wake")["status"] == "AWAKING"
    host.wait_for(State.READY)
    assert status(host) == "RUNNING"
    assert put(host, "/one/terminate")["status"] == "TERMINATING"
    host.wait_for(State.STOPPED)
    assert status(host) == "TERMINATED"
    assert put(host, "/one/wake", 409)["error"]["code"] == "conflict"
    put(host, "/one/restart")
    host.wait_for(State.READY)
    assert host.post().status_code == 200


def test_an_endpoint_is_made_updated_and_deleted(host: Host) -> None:
    body = {
        "name": "made",
        "projectId": "p",
        "instanceOptionId": "i",
        "advanced": {
            "tokenizer_skip_special_tokens": True,
            "tokenizer_add_special_tokens": True,
            "max_batch_size": 8,
        },
        "autoscalingPolicy": {"minReplica": 0, "maxReplica": 1, "cooldownPeriod": 900},
        "initialVersionComment": "first",
        "settings": {"model": "fake:size=24"},
    }
    made = host.client.post(BASE, json=body)
    assert made.status_code == 200, made.text
    assert made.json()["status"] in ("INITIALIZING", "RUNNING")
    assert set(host.client.get(BASE).json()["data"]) == {"one", "made"}
    item = host.post(model="made").json()["data"][0]
    assert item["width"] == 24
    spec = host.client.get(f"{BASE}/made").json()
    assert (spec["maxBatchSize"], spec["autoscalingMin"], spec["autoscalingCooldown"]) == (8, 0, 900)
    changed = host.client.put(
        f"{BASE}/made", json={"newVersionComment": "larger", "settings": {"model": "fake:size=32"}}
    )
    assert changed.json()["mezzotint"]["version"] == 2
    host.wait_for(State.READY, endpoint_id="made")
    assert host.post(model="made").json()["data"][0]["width"] == 32
    versions = host.client.get(f"{BASE}/made/version").json()["data"]
    assert {number: entry["mezzotint"]["comment"] for number, entry in versions.items()} == {
        "2": "larger",
        "1": "first",
    }
    assert host.client.post(BASE, json=body).status_code == 409
    assert host.client.delete(f"{BASE}/made").status_code == 200
    assert host.post(model="made").status_code == 404
    assert host.client.delete(f"{BASE}/one").status_code == 409, "it stands in the configuration file"


@attack(
    "Giving an endpoint the permission for remote code by API", outcome="422; the operator's file alone can"
)
@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_field", "name"),
        ({"name": "no good"}, "invalid_value", "name"),
        ({"name": "x", "sise": 1}, "unknown_field", "sise"),
        ({"name": "x", "settings": {"sise": 1}}, "unknown_field", "settings.sise"),
        ({"name": "x", "settings": {"max_rows": 0}}, "invalid_value", "settings.max_rows"),
        (
            {"name": "x", "settings": {"allow_remote_code": True}},
            "not_supported",
            "settings.allow_remote_code",
        ),
        ({"name": "x", "uploadedModelId": "m"}, "not_supported", "uploadedModelId"),
        ({"name": "x", "simplescale": {"replicas": 0}}, "invalid_value", "replicas"),
    ],
)
def test_bad_bodies_are_refused(host: Host, body: dict[str, Any], code: str, param: str) -> None:
    answer = host.client.post(BASE, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, code, param)


@attack(
    "An endpoint made with an adapter that is not there",
    outcome="422; nothing is stored that stops the next start",
)
def test_an_endpoint_whose_adapter_cannot_be_had_is_not_made(tmp_path: Path) -> None:
    adapters = [{"route": "ink", "source": str(tmp_path / "none.safetensors")}]
    body = {"name": "made", "settings": {"model": "fake", "adapters": adapters}}
    with hosting(settings_for(tmp_path)) as host:
        answer = host.client.post(BASE, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "settings.adapters")
        changed = host.client.put(f"{BASE}/one", json={"settings": {"adapters": adapters}})
        assert (changed.status_code, changed.json()["error"]["code"]) == (422, "not_supported")
        assert set(host.client.get(BASE).json()["data"]) == {"one"}
        key = host.first_key
    with hosting(settings_for(tmp_path), key=key) as host:  # nothing stored stops the next start
        assert host.post().status_code == 200


def test_an_endpoint_cannot_be_renamed(host: Host) -> None:
    assert host.client.put(f"{BASE}/one", json={"name": "two"}).json()["error"]["param"] == "name"


PERMISSION = "studio/own@" + "0" * 40


@attack(
    "An admin key changes the model of an endpoint whose file permits remote code",
    outcome="the permission ends with the change, and no key can give it",
)
@pytest.mark.parametrize(
    "body",
    [{"settings": {"model": "fake:size=24"}}, {"hfModelRepo": "fake"}, {"hfModelRepoRevision": "v2"}],
)
def test_another_model_does_not_keep_the_permission_for_remote_code(
    tmp_path: Path, body: dict[str, Any]
) -> None:
    with hosting(
        settings_for(tmp_path, endpoint("fake:size=16", allow_remote_code=PERMISSION)), ready=False
    ) as host:
        same = host.client.put(f"{BASE}/one", json={"settings": {"max_rows": 3}}).json()["mezzotint"]
        assert same["settings"]["allow_remote_code"] == PERMISSION
        host.wait_for(State.READY)
        other = host.client.put(f"{BASE}/one", json=body).json()["mezzotint"]
        assert other["settings"]["allow_remote_code"] is None
        host.until(lambda: host.endpoint().next is None)
        back = {"settings": {"model": "fake:size=16", "revision": None}}
        answer = host.client.put(f"{BASE}/one", json=back).json()["mezzotint"]
        assert answer["settings"]["allow_remote_code"] is None, "naming the first model again does not help"


@pytest.mark.parametrize("stored", [True, False])
def test_a_stored_permission_that_names_nothing_ends(tmp_path: Path, stored: bool) -> None:
    settings = settings_for(tmp_path)
    with hosting(settings) as host:
        key = host.first_key
        url = database.database_url(settings.data_dir, None)
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for table, column in ((database.endpoints, "from_file"), (database.endpoint_versions, "spec")):
            values = connection.execute(sa.select(table.c[column])).scalar_one()
            changed = values | {"allow_remote_code": stored}
            connection.execute(table.update().values({column: changed}))
    engine.dispose()
    with hosting(settings, key=key) as host:
        assert host.endpoint().spec.allow_remote_code is None
        version = host.endpoint().current.version
        assert version == (2 if stored else 1), "a file that has not changed makes no version"


@attack("Two admins update a sleeping endpoint at once", outcome="both changes count, one after the other")
def test_of_two_updates_at_once_none_undoes_the_other(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path)) as host:
        host.command(Command.SLEEP)
        bodies = [{"settings": {"max_rows": 3}}, {"settings": {"default_steps": 7}}]
        answers = list(host.pool.map(lambda body: host.client.put(f"{BASE}/one", json=body), bodies))
        assert [answer.status_code for answer in answers] == [200, 200]
        settings = host.client.get(f"{BASE}/one").json()["mezzotint"]["settings"]
        assert (settings["max_rows"], settings["default_steps"]) == (3, 7)


def test_a_failed_endpoint_says_why_to_its_admin(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:fail_load=permanent")), ready=False) as host:
        host.wait_for(State.FAILED)
        values = host.client.get(f"{BASE}/one/status").json()
        assert (values["status"], values["message"]) == ("FAILED", "the fake model cannot be loaded")
        host.client.put(f"{BASE}/one", json={"settings": {"model": "fake"}})
        host.wait_for(State.READY)
        assert host.post().status_code == 200
