"""Input pictures by URL: from a real local server, which tests let count as public."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mezzotint.errors import InvalidRequestError
from mezzotint.server.api.picture_urls import PictureFetcher, is_public
from tests.server.api.test_edits import BLUE, EDIT, RED, body, refused, text_of
from tests.server.hosting import Host, endpoint, hosting, settings_for

ALLOWED, INNER = "127.0.0.2", "127.0.0.3"
"""Two addresses of this machine: one that tests call public, and one that they do not."""
MAX_BYTES = 100_000


class Site(ThreadingHTTPServer):
    """Serves a picture, and keeps note of who asked for what."""

    def __init__(self, address: str) -> None:
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.release = threading.Event()
        super().__init__((address, 0), _Handler)

    @property
    def port(self) -> int:
        return int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["host"], self.headers["authorization"]))
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("location", "/red.png")
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            self.wfile.flush()
            self.server.release.wait(30)
        elif self.path == "/huge":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(bytes(MAX_BYTES // 10))
        elif self.path in ("/red.png", "/blue.png"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(RED if self.path == "/red.png" else BLUE)
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@contextlib.contextmanager
def site_at(address: str) -> Iterator[Site]:
    site = Site(address)
    thread = threading.Thread(target=site.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        site.release.set()
        site.shutdown()
        site.server_close()
        thread.join()


@pytest.fixture
def site() -> Iterator[Site]:
    with site_at(ALLOWED) as site:
        yield site


class Names:
    """A resolver that answers with one list of addresses after the other, the last one for ever."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.num_asked = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        self.num_asked += 1
        return self.answers[min(self.num_asked, len(self.answers)) - 1]


def fetcher(*answers: list[str], **options: Any) -> PictureFetcher:
    return PictureFetcher(
        MAX_BYTES,
        is_allowed=lambda address: address == ALLOWED,
        resolve=Names(*(answers or ([ALLOWED],))),
        **{"ports": None, "seconds": 20.0} | options,
    )


def fetch(by: PictureFetcher, *urls: str | bytes) -> list[str | bytes]:
    return asyncio.run(by.fetched(urls, "image"))


def refusal(by: PictureFetcher, *urls: str) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        fetch(by, *urls)
    return caught.value


def test_a_picture_comes_with_its_host_name_and_no_key(site: Site) -> None:
    url = f"http://pictures.example:{site.port}/red.png"
    assert fetch(fetcher(), url, b"file", "aGk=") == [RED, b"file", "aGk="]
    assert site.asked == [("/red.png", f"pictures.example:{site.port}", None)]


def test_a_name_that_resolves_to_something_else_a_moment_later_changes_nothing(site: Site) -> None:
    with site_at(INNER) as inner:
        names = Names([ALLOWED], [INNER])
        by = PictureFetcher(
            MAX_BYTES, is_allowed=lambda address: address == ALLOWED, resolve=names, ports=None
        )
        assert fetch(by, f"http://rebinding.example:{site.port}/red.png") == [RED]
        assert names.num_asked == 1
        error = refusal(by, f"http://rebinding.example:{inner.port}/red.png")
        assert (error.code, inner.asked) == ("image_url_refused", [])


def test_a_connection_to_another_address_than_the_one_checked_is_not_read(site: Site) -> None:
    checks = iter([True, False])
    by = PictureFetcher(
        MAX_BYTES, is_allowed=lambda address: next(checks), resolve=Names([ALLOWED]), ports=None
    )
    assert refusal(by, f"http://pictures.example:{site.port}/red.png").code == "image_url_refused"


@pytest.mark.parametrize("addresses", [[INNER], [ALLOWED, INNER], [INNER, ALLOWED], []])
def test_every_address_of_a_host_must_be_public(site: Site, addresses: list[str]) -> None:
    error = refusal(fetcher(addresses), f"http://pictures.example:{site.port}/red.png")
    assert (error.code, site.asked) == ("image_url_refused", [])
    assert INNER not in error.message


def test_no_proxy_is_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with site_at(INNER) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://{INNER}:{proxy.port}")
        assert fetch(fetcher(), f"http://pictures.example:{site.port}/red.png") == [RED]
        assert proxy.asked == []


def test_a_redirect_is_not_followed(site: Site) -> None:
    error = refusal(fetcher(), f"http://pictures.example:{site.port}/moved")
    assert (error.code, len(site.asked)) == ("image_url_refused", 1)
    assert "redirect" in error.message


def test_bytes_are_limited_over_all_pictures(site: Site) -> None:
    assert refusal(fetcher(), f"http://pictures.example:{site.port}/huge").code == "image_fetch_failed"
    small = PictureFetcher(len(RED) + 10, is_allowed=lambda _: True, resolve=Names([ALLOWED]), ports=None)
    url = f"http://pictures.example:{site.port}/red.png"
    assert fetch(small, url) == [RED]
    assert "too large" in refusal(small, url, url).message


def test_seconds_are_limited(site: Site) -> None:
    began = time.monotonic()
    error = refusal(fetcher(seconds=0.3), f"http://pictures.example:{site.port}/slow")
    assert error.code == "image_fetch_failed"
    assert "0.3 s" in error.message
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://pictures.example/nowhere.png", "image_url_refused"),
        ("http://a:b@pictures.example/red.png", "image_url_refused"),
        ("http:///red.png", "image_url_refused"),
        ("http://pictures.example:99999/red.png", "image_url_refused"),
        ("https://pictures.example:8443/red.png", "image_url_refused"),
        ("http://[::1", "image_url_refused"),
    ],
)
def test_what_is_no_ordinary_address_is_refused(url: str, code: str) -> None:
    by = PictureFetcher(MAX_BYTES, resolve=Names(["10.0.0.1"]))
    assert refusal(by, url).code == code


def test_a_missing_picture_and_a_closed_port_are_said(site: Site) -> None:
    assert "status 404" in refusal(fetcher(), f"http://pictures.example:{site.port}/none").message
    with socket.socket() as taken:
        taken.bind((ALLOWED, 0))
        url = f"http://pictures.example:{taken.getsockname()[1]}/red.png"
        assert refusal(fetcher(), url).code == "image_fetch_failed"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("ff02::1", False),
        ("nonsense", False),
    ],
)
def test_public_addresses_are_told_from_all_others(address: str, public: bool) -> None:
    assert is_public(address) is public


# ---------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    settings = settings_for(
        tmp_path_factory.mktemp("server"), endpoint("fake:step_s=0"), allow_image_urls=True
    )
    with hosting(settings) as running:
        yield running


def test_the_setting_lets_requests_name_urls(host: Host, site: Site) -> None:
    by_url = {"image": {"image": f"http://pictures.example:{site.port}/red.png"}}
    assert "not public" in refused(
        host.client.post(EDIT, json=body(image={"image": f"http://{ALLOWED}/red.png"})), "image_url_refused"
    )
    usual, host.service.fetcher = host.service.fetcher, fetcher()
    try:
        answer = host.client.post(EDIT, json=body(**by_url))
        openai = host.client.post(
            "/v1/images/edits",
            json={"prompt": "a cat", "seed": 7, "images": [{"image_url": by_url["image"]["image"]}]},
        )
    finally:
        host.service.fetcher = usual
    same = host.client.post(EDIT, json=body(image={"image": text_of(RED)}))
    assert answer.json()["data"][0]["b64_json"] == same.json()["data"][0]["b64_json"]
    assert openai.status_code == 200, openai.text
