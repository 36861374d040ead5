"""What holds for every request: keys, errors, headers, bodies, health."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from mezzotint.errors import ConfigError
from mezzotint.server import app
from mezzotint.server.app import create_app, serve
from mezzotint.server.store.keys import create_first_key, create_key, list_keys, revoke_key
from mezzotint.server.work.lifecycle import Command
from tests.attacks import attack
from tests.server.hosting import FAKE, GENERATE, Host, client, endpoint, hosting, settings_for


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    settings = settings_for(tmp_path_factory.mktemp("server"), max_body_bytes=2000, body_timeout_s=0.3)
    with hosting(settings) as running:
        yield running


@attack("A request without a key, or with one that is unknown", outcome="401")
def test_a_missing_and_an_unknown_key_are_401(host: Host) -> None:
    for key, code in ((None, "missing_api_key"), ("mz_wrong", "invalid_api_key"), ("ü", "invalid_api_key")):
        with client(host.url, None) as stranger:
            headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
            answer = stranger.post(GENERATE, json=host.body(), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "mz_wrong" not in answer.text


@attack("Using a key after it was revoked", outcome="401 from the next request on")
def test_a_revoked_key_ends_with_the_next_request(host: Host) -> None:
    _, secret = create_key(host.service.engine, "short-lived")
    with client(host.url, secret) as http:
        assert http.post(GENERATE, json=host.body()).status_code == 200
        revoke_key(host.service.engine, "short-lived")
        assert http.post(GENERATE, json=host.body()).status_code == 401


@attack("An endpoint outside the key's scope", outcome="403")
def test_a_scoped_key_reaches_its_endpoints_only(host: Host) -> None:
    _, secret = create_key(host.service.engine, "elsewhere", endpoints=["two"])
    with client(host.url, secret) as http:
        answer = http.post(GENERATE, json=host.body())
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_endpoint")
        unknown = http.post(GENERATE, json=host.body(model="onne"))
        assert unknown.status_code == 403
        assert unknown.json()["detail"] == answer.json()["detail"].replace("'one'", "'onne'")


@attack("Reading the metrics with an ordinary key", outcome="403")
def test_metrics_need_an_admin_key(host: Host) -> None:
    _, secret = create_key(host.service.engine, "plain")
    with client(host.url, secret) as http:
        answer = http.get("/metrics")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    text = host.client.get("/metrics").text
    assert 'mezzotint_ready_replicas{endpoint="one"} 1.0' in text


def test_metrics_count_the_workers_of_other_machines_by_machine(tmp_path: Path) -> None:
    away, here = endpoint("fake:node=10.0.0.7", id="away", replicas=2), endpoint(id="here")
    counted = 'mezzotint_node_replicas{endpoint="away",node="10.0.0.7"} 2.0'
    with hosting(settings_for(tmp_path, away, here)) as host:
        host.until(lambda: all(replica.node for replica in host.endpoint("away").current.replicas))
        for _ in range(2):
            lines = host.client.get("/metrics").text.splitlines()
            assert [line for line in lines if line.startswith("mezzotint_node_replicas{")] == [counted]
        host.command(Command.SLEEP, endpoint_id="away")
        assert "mezzotint_node_replicas{" not in host.client.get("/metrics").text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", GENERATE, 405, "method_not_allowed"),
        ("GET", "/dedicated/v1/requests/req_none", 404, "request_not_found"),
        ("DELETE", "/dedicated/v1/requests/req_none", 404, "request_not_found"),
        ("GET", "/dedicated/v1/requests/req_none/events", 404, "request_not_found"),
    ],
)
def test_every_refusal_has_the_one_error_body(
    host: Host, method: str, path: str, status: int, code: str
) -> None:
    answer = host.client.request(method, path)
    assert answer.status_code == status
    values = answer.json()
    assert set(values) == {"error", "detail", "request_id"}
    assert set(values["error"]) == {"message", "type", "param", "code"}
    assert values["error"]["code"] == code
    assert values["request_id"] == answer.headers["x-request-id"]


@attack("Framing or sniffing an answer in a browser", outcome="headers on every response forbid it")
def test_request_id_and_security_headers_are_on_every_response(host: Host) -> None:
    seen = set()
    for path in ("/healthz", "/nowhere", "/openapi.json", "/readyz"):
        answer = host.client.get(path)
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        seen.add(answer.headers["x-request-id"])
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"{}", "text/plain", 415, "unsupported_media_type"),
        (b"{}", None, 415, "unsupported_media_type"),
        (b" " * 2001, "application/json", 413, "body_too_large"),
        (b"", "application/json", 422, "invalid_json"),
        (b"[1]", "application/json", 422, "invalid_type"),
        (b'{"seed": NaN}', "application/json; charset=utf-8", 422, "invalid_json"),
    ],
)
def test_bad_bodies(host: Host, content: bytes, content_type: str | None, status: int, code: str) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = host.client.post(GENERATE, content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@attack("A body above the limit, sent in chunks", outcome="413")
def test_a_body_that_is_too_large_is_refused_without_its_length_being_told(host: Host) -> None:
    answer = host.client.post(
        GENERATE, content=(b" " * 500 for _ in range(5)), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


@attack("A body that never arrives, with a right key", outcome="408")
def test_a_body_that_does_not_arrive_is_408(host: Host) -> None:
    whole = host.raw_post().replace(b"Host: localhost", b"Host: localhost\r\nConnection: close")
    with host.connect() as raw:
        raw.sendall(whole[:-5])
        answer = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
    assert answer.startswith("HTTP/1.1 408")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "body_timeout"


def test_the_server_answers_while_the_endpoint_starts(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:hang_at_start=1")), ready=False) as host:
        assert host.client.get("/healthz").status_code == 200
        answer = host.client.get("/readyz")
        assert (answer.status_code, answer.json()["not_ready"]) == (503, 1)


def test_readiness_is_reported_once_all_endpoints_are_up(host: Host) -> None:
    assert host.client.get("/readyz").json() == {"status": "ready", "not_ready": 0}


def test_without_auth_anyone_may_ask(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, auth=False)) as host, client(host.url, None) as anyone:
        assert anyone.post(GENERATE, json=host.body()).status_code == 200
        assert host.first_key is None


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    settings = settings_for(
        tmp_path_factory.mktemp("keyless"),
        auth=False,
        public_url="https://pictures.example/mezzotint",
        cors_origins=("https://friend.example",),
    )
    with hosting(settings) as running:
        yield running


@pytest.mark.parametrize("name", ["localhost:{port}", "127.0.0.1:{port}", "[::1]:{port}", "pictures.example"])
def test_a_server_without_keys_answers_under_its_own_names(keyless: Host, name: str) -> None:
    host = name.format(port=httpx2.URL(keyless.url).port)
    assert keyless.client.get("/readyz", headers={"host": host}).status_code == 200
    own = keyless.client.post(
        GENERATE, json=keyless.body(), headers={"host": host, "origin": f"http://{host}"}
    )
    assert own.status_code == 200, own.text


@attack("DNS rebinding against a server without keys", outcome="421")
@pytest.mark.parametrize(
    "name", ["evil.example:{port}", "127.0.0.1.evil.example", "localhost@evil.example", "", "["]
)
def test_a_server_without_keys_refuses_names_that_anyone_may_point_at_it(keyless: Host, name: str) -> None:
    host = name.format(port=httpx2.URL(keyless.url).port)
    for method, path in (("GET", "/"), ("GET", "/dedicated/beta/endpoint"), ("POST", GENERATE)):
        answer = keyless.client.request(method, path, headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (421, "wrong_host")
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


@attack("A foreign page's request to a server without keys", outcome="403")
def test_a_server_without_keys_refuses_changes_that_foreign_pages_ask_for(keyless: Host) -> None:
    sleep = "/dedicated/beta/endpoint/one/sleep"
    for foreign in ("https://evil.example", "http://127.0.0.1:1", "null", ""):
        for method, path in (("POST", sleep), ("DELETE", "/dedicated/beta/endpoint/one")):
            answer = keyless.client.request(method, path, headers={"origin": foreign})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden_origin")
    for friendly in ("https://friend.example", "https://pictures.example"):
        answer = keyless.client.post(GENERATE, json=keyless.body(), headers={"origin": friendly})
        assert answer.status_code == 200, answer.text


def test_with_keys_the_name_and_the_page_do_not_matter(host: Host) -> None:
    headers = {"host": "pictures.example", "origin": "https://page.example"}
    assert host.client.post(GENERATE, json=host.body(), headers=headers).status_code == 200


def test_the_first_start_makes_one_key_and_the_second_none(tmp_path: Path) -> None:
    settings = settings_for(tmp_path)
    service = create_app(settings, worker=FAKE).state.context
    assert list_keys(service.engine) == [], "making the app makes no key"
    made = create_first_key(service.engine)
    assert made is not None
    assert made[1].startswith("mz_")
    again = create_app(settings, worker=FAKE).state.context
    assert create_first_key(again.engine) is None
    assert [key.name for key in list_keys(again.engine)] == ["first"]
    for one in (service, again):
        one.engine.dispose()


def test_a_start_that_fails_leaves_no_connection_to_the_database_open(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = settings_for(tmp_path, port=taken.getsockname()[1])
        app = create_app(settings, worker=FAKE)
        with pytest.raises(ConfigError, match="port"):
            asyncio.run(serve(app, settings))
    assert app.state.context.engine.pool.checkedin() == 0


def test_a_data_folder_that_is_a_file_stops_the_start_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="data_dir"):
        create_app(settings_for(tmp_path, data_dir=tmp_path / "file"), worker=FAKE)


@attack("A foreign page that reads answers", outcome="the browser is told no")
def test_cors_is_off_unless_set(host: Host, tmp_path: Path) -> None:
    origin = {"origin": "https://page.example"}
    assert "access-control-allow-origin" not in host.client.get("/healthz", headers=origin).headers
    with hosting(settings_for(tmp_path, cors_origins=("https://page.example",))) as open_host:
        answer = open_host.client.get("/healthz", headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        assert answer.headers["x-request-id"]


def test_a_page_may_read_why_its_body_was_refused_and_the_refusal_is_counted(tmp_path: Path) -> None:
    page = {"origin": "https://page.example", "content-type": "text/plain"}
    with hosting(settings_for(tmp_path, cors_origins=("https://page.example",))) as open_host:
        answer = open_host.client.post(GENERATE, content=b"{}", headers=page)
        assert answer.status_code == 415
        assert answer.headers["access-control-allow-origin"] == "https://page.example"
        counted = 'mezzotint_error_answers_total{code="unsupported_media_type"} 1.0'
        assert counted in open_host.client.get("/metrics").text


@attack("Another user of the machine reads the data folder", outcome="files and folder are the owner's alone")
def test_the_data_folder_keeps_its_secrets_to_its_owner(host: Host) -> None:
    folder = host.service.settings.data_dir
    files = [file for file in folder.iterdir() if file.is_file()]
    assert len(files) >= 1
    for file in files:
        assert file.stat().st_mode & 0o077 == 0, file.name
    assert folder.stat().st_mode & 0o077 == 0


def test_small_answers_do_not_wait_for_an_acknowledgement(tmp_path: Path) -> None:
    listener = app._listen(settings_for(tmp_path))
    with listener:
        assert listener.proto == socket.IPPROTO_TCP, "asyncio sets TCP_NODELAY on such sockets only"
