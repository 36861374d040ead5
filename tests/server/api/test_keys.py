"""Keys over HTTP: everybody's own, and for admins all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mezzotint.server.store import keys
from tests.server.hosting import Host, client, hosting, settings_for

KEYS = "/dedicated/beta/keys"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(settings_for(tmp_path_factory.mktemp("server"))) as running:
        yield running


def test_a_key_is_told_who_it_is(host: Host) -> None:
    with host.new_client(endpoints=("one",)) as http:
        told = http.get("/dedicated/v1/key").json()
    assert (told["admin"], told["endpoints"], told["revoked"]) == (False, ["one"], None)
    assert "secret" not in told
    assert "hash" not in told
    assert host.client.get("/dedicated/v1/key").json()["admin"] is True


def test_an_admin_makes_a_key_lists_it_and_revokes_it(host: Host) -> None:
    made = host.client.post(KEYS, json={"name": "website", "endpoints": ["one"]}).json()
    with client(host.url, made["secret"]) as http:
        assert http.get("/v1/models").status_code == 200
        listed = {key["id"]: key for key in host.client.get(KEYS).json()["data"]}
        assert listed[made["id"]]["name"] == "website"
        assert made["secret"] not in str(listed)
        assert host.client.delete(f"{KEYS}/{made['id']}").status_code == 200
        assert http.get("/v1/models").status_code == 401
    listed = {key["id"]: key for key in host.client.get(KEYS).json()["data"]}
    assert listed[made["id"]]["revoked"] > 0
    assert host.client.delete(f"{KEYS}/{made['id']}").status_code == 404


def test_only_admins_may(host: Host) -> None:
    with host.new_client() as http:
        answers = [http.get(KEYS), http.post(KEYS, json={"name": "mine"}), http.delete(f"{KEYS}/first")]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert "mine" not in {key.name for key in keys.list_keys(host.service.engine)}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"name": " "}, 422, "name must be 1 to"),
        ({"name": "x", "endpoints": ["ona"]}, 422, "did you mean one?"),
        ({"name": "x", "admin": True, "endpoints": ["one"]}, 422, "endpoint has no effect on an admin key"),
        ({"name": "x", "role": "admin"}, 422, "role"),
        ({"name": "first"}, 409, "exists already"),
    ],
)
def test_nonsense_is_refused(host: Host, body: dict[str, object], status: int, message: str) -> None:
    answer = host.client.post(KEYS, json=body)
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]["message"]


def test_the_key_that_asks_cannot_revoke_itself(host: Host) -> None:
    own = host.client.get("/dedicated/v1/key").json()
    for name in (own["id"], own["name"]):
        assert host.client.delete(f"{KEYS}/{name}").status_code == 409
    assert host.client.get("/dedicated/v1/key").status_code == 200
