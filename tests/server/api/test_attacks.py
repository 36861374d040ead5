"""Requests made to break something: each is answered in good order, and other requests go on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image, PngImagePlugin

from mezzotint import images
from mezzotint.server.api import a1111, dedicated
from mezzotint.server.store import database
from mezzotint.server.store.keys import Limits
from mezzotint.server.work.queueing import JobQueue, _Line
from tests.attacks import attack
from tests.server.hosting import GENERATE, PATIENCE_S, Host, client, endpoint, hosting, settings_for

BASE = "/dedicated/beta/endpoint"
ADAPTERS = f"{BASE}/one/adapters"
MAX_ERROR_BYTES = 8192


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosting(settings_for(tmp_path_factory.mktemp("server"), endpoint("fake:step_s=0.002"))) as running:
        yield running


# ------------------------------------------------------------ png-info


def png_with(path: Path, text: str, name: str = "parameters") -> str:
    """Base64 of a small PNG with a text."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(name, text, zip=True)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return base64.b64encode(path.read_bytes()).decode()


PAIRS: dict[str, Callable[[int], str]] = {
    "words": lambda size: "a " * (size // 2),
    "open quotes": lambda size: 'a: "\\",' * (size // 7),
    "colons": lambda size: "a: " * (size // 3),
}


@attack("png-info of a picture whose parameters are megabytes of traps", outcome="they are not read")
@pytest.mark.parametrize("trap", PAIRS)
def test_long_parameters_of_a_picture_are_not_read(host: Host, tmp_path: Path, trap: str) -> None:
    text = png_with(tmp_path / "picture.png", PAIRS[trap](900_000))
    answer = host.client.post("/sdapi/v1/png-info", json={"image": text})
    assert answer.json() == {"info": "", "items": {}, "parameters": {}}


@pytest.mark.parametrize("trap", PAIRS)
def test_the_longest_parameters_that_are_read_take_no_time(trap: str) -> None:
    text = "prompt\nSteps: 1, Seed: 1, " + PAIRS[trap](images.MAX_TEXT - 100)
    assert images.parse_infotext(text) is not None, "and the test does not hang"


@attack("png-info of a PNG with 200,000 chunks", outcome="only the first MiB is looked at")
def test_a_picture_of_many_chunks_is_not_read_to_its_end(host: Host, tmp_path: Path) -> None:
    png_with(tmp_path / "picture.png", "words")
    data = (tmp_path / "picture.png").read_bytes()
    many = data[:33] + images._chunk(b"tEXt", b"a\0b") * 200_000 + data[33:]
    body = {"image": base64.b64encode(many).decode()}
    answer = host.client.post("/sdapi/v1/png-info", json=body)
    assert answer.status_code in (200, 422)
    assert answer.json().get("info", "") == ""


@attack("Pictures that take long to read, on png-info", outcome="other requests go on; 503 after a deadline")
def test_the_reading_of_pictures_has_threads_and_a_deadline(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(a1111, "PNG_INFO_S", 0.1)
    monkeypatch.setattr(images, "read_infotext", lambda data: gate.wait(PATIENCE_S))
    try:
        answers = [
            host.pool.submit(host.client.post, "/sdapi/v1/png-info", json={"image": ""}) for _ in range(4)
        ]
        assert host.post().status_code == 200
        for each in answers:
            assert each.result(PATIENCE_S).json()["error"]["code"] == "server_busy"
    finally:
        gate.set()


# ------------------------------------------------------------ bodies of admins


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


ZEROS = "0" * 5000
NASTY: dict[str, tuple[str, str, str]] = {
    "NUL in a comment": ("PUT", f"{BASE}/one", '{"newVersionComment": "a\\u0000b"}'),
    "half a surrogate pair": ("PUT", f"{BASE}/one", '{"newVersionComment": "\\ud800"}'),
    "NUL in a setting": ("POST", BASE, '{"name": "x", "settings": {"model": "a\\u0000b"}}'),
    "half a pair as a name": ("POST", BASE, '{"name": "x", "settings": {"\\ud800": 1}}'),
    "a huge number": (
        "POST",
        BASE,
        f'{{"name": "x", "autoscalingPolicy": {{"cooldownPeriod": 1{ZEROS[:400]}}}}}',
    ),
    "more digits than Python reads": (
        "POST",
        BASE,
        f'{{"name": "x", "simplescale": {{"replicas": 1{ZEROS}}}}}',
    ),
    "NUL in a source": ("POST", ADAPTERS, '{"route": "r", "source": "a\\u0000.safetensors"}'),
    "half a pair in a source": ("POST", ADAPTERS, '{"route": "r", "source": "\\ud800.safetensors"}'),
    "a source of nobody's home": ("POST", ADAPTERS, '{"route": "r", "source": "~nobody-here/x.safetensors"}'),
    "a source that is a device": ("POST", ADAPTERS, '{"route": "r", "source": "/dev"}'),
    "a source with a long name": ("POST", ADAPTERS, f'{{"route": "r", "source": "/{ZEROS}.safetensors"}}'),
    "a key that stands twice": ("PUT", f"{BASE}/one", '{"settings": {"max_rows": 3, "max_rows": 4}}'),
    "a key of an adapter twice": ("POST", ADAPTERS, '{"route": "r", "route": "s", "source": "x"}'),
    "deep nesting": ("PUT", f"{BASE}/one", json.dumps({"settings": {"model": nested(200)}})),
    "deeper nesting": ("PUT", f"{BASE}/one", "[" * 200_000),
    "no object": ("PUT", f"{BASE}/one", "[1]"),
    "NaN": ("PUT", f"{BASE}/one", '{"settings": {"deadline_s": NaN}}'),
}  # fmt: skip


@attack("An admin's body with NUL, half a surrogate pair, or absurd numbers", outcome="422 with a sentence")
@attack("An admin's JSON in which a key stands twice", outcome="422 duplicate_key; neither value counts")
@attack("An admin's JSON that is nested 200,000 deep", outcome="422 invalid_json")
@pytest.mark.parametrize("name", NASTY)
def test_a_nasty_body_of_an_admin_is_refused_with_a_sentence(host: Host, name: str) -> None:
    method, path, text = NASTY[name]
    headers = {"content-type": "application/json"}
    answer = host.client.request(method, path, content=text.encode(), headers=headers)
    assert answer.status_code == 422, answer.text
    assert len(answer.content) < MAX_ERROR_BYTES
    if "twice" in name:
        assert answer.json()["error"]["code"] == "duplicate_key"
    assert set(host.client.get(BASE).json()["data"]) == {"one"}


LONG = "z" * 900_000


@attack("A request made to be repeated in its error", outcome="the error answer stays below 8 KiB")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATE, {LONG: 1}),
        (GENERATE, {"model": LONG, "prompt": "a", "num_inference_steps": 1}),
        (GENERATE, {"model": "one", "prompt": "a", "num_inference_steps": 1, "response_format": LONG}),
        ("/v1/images/generations", {"prompt": "a", "size": LONG}),
        ("/v1/images/generations", {"prompt": "a", LONG: 1}),
        ("/sdapi/v1/txt2img", {"prompt": f"<lora:{LONG}:1>"}),
        ("/sdapi/v1/txt2img", {"prompt": "a", "override_settings": {"sd_model_checkpoint": LONG}}),
        (BASE, {"name": LONG}),
        (BASE, {LONG: 1}),
        (BASE, {"name": "x", "settings": {LONG: 1}}),
        (BASE, {"name": "x", "settings": {"dtype": LONG}}),
        (ADAPTERS, {"route": LONG, "source": "x"}),
        (ADAPTERS, {"route": "r", "source": LONG}),
        (ADAPTERS, {LONG: 1}),
    ],
)
def test_an_error_answer_is_short(host: Host, path: str, body: dict[str, Any]) -> None:
    answer = host.client.post(path, json=body)
    assert answer.is_client_error
    assert len(answer.content) < MAX_ERROR_BYTES
    assert sum(len(name) + len(value) for name, value in answer.headers.items()) < MAX_ERROR_BYTES


@attack("NUL in a query or path, with Postgres", outcome="404 or 422, not a complaint of the database")
def test_nul_never_reaches_postgres(tmp_path: Path, new_postgres: Callable[[], str]) -> None:
    with hosting(settings_for(tmp_path, database_url=new_postgres())) as host:
        assert host.client.get("/dedicated/v1/images?before=a%00b").status_code == 404
        assert host.client.delete("/dedicated/v1/images/a%00b").status_code == 404
        body = '{"name": "x", "initialVersionComment": "a\\u0000b"}'
        headers = {"content-type": "application/json"}
        assert host.client.post(BASE, content=body, headers=headers).status_code == 422


@attack("A width of thirty digits, on routes that bend sizes", outcome="the nearest size, at once")
@pytest.mark.parametrize("size", [{"width": 10**30}, {"width": 10**18, "height": 1}, {"height": 10**300}])
@pytest.mark.parametrize("path", ["/v1/images/generations", "/sdapi/v1/txt2img"])
def test_an_absurd_size_takes_no_time(host: Host, path: str, size: dict[str, int]) -> None:
    answer = host.client.post(path, json={"prompt": "a", "steps": 1} | size)
    assert answer.status_code in (200, 400, 422)
    assert host.post().status_code == 200


# ------------------------------------------------------------ whose endpoint, whose request


@attack("Guessing the names of endpoints outside a key's scope", outcome="the same answer for all of them")
def test_a_scoped_key_learns_no_names(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, endpoint(id="mine"), endpoint(id="secret", aliases=("hidden",)))
    with hosting(settings) as host, host.new_client(endpoints=["mine"]) as scoped:
        for path in ("/v1/images/generations", "/sdapi/v1/txt2img", GENERATE):
            told = set()
            for name in ("secret", "hidden", "nothing"):
                body = {"prompt": "a", "model": name, "override_settings": {"sd_model_checkpoint": name}}
                if path == GENERATE:
                    body = host.body(model=name)
                elif path.startswith("/v1"):
                    del body["override_settings"]
                answer = scoped.post(path, json=body)
                told.add((answer.status_code, answer.json()["detail"].replace(repr(name), "NAME")))
            assert len(told) == 1, told


@attack("Asking for the state of a streamed request", outcome="valid JSON, without the stream's events in it")
def test_the_state_of_a_streamed_request_is_json(host: Host) -> None:
    body = {"model": "one", "prompt": "a cat", "stream": True, "num_inference_steps": 2}
    headers = {"idempotency-key": "streamed"}
    with host.client.stream("POST", "/v1/images/generations", json=body, headers=headers) as answer:
        events = answer.read()
    assert b"image_generation.completed" in events
    ticket = next(
        each for each in host.service.admission.tickets.by_id.values() if each.idempotency_key == "streamed"
    )
    assert ticket.answer is not None
    assert host.state(ticket.id)["status"] == "done"
    with host.client.stream("GET", f"/dedicated/v1/requests/{ticket.id}/events") as answer:
        last = answer.read().decode().strip().rpartition("\n\n")[2].splitlines()
    assert last[0] == "event: done"
    assert json.loads(last[1].removeprefix("data: "))["status"] == "done"


# ------------------------------------------------------------ limits


@attack("Refused requests meant to use up a key's rate", outcome="a refusal costs no token")
def test_a_refused_request_costs_no_rate_token(tmp_path: Path) -> None:
    slow = endpoint("fake:step_s=0.1", width=16, height=16)
    limits = Limits(requests_per_minute=1)
    with hosting(settings_for(tmp_path, slow)) as host, host.new_client(limits=limits) as limited:
        body = host.body(num_inference_steps=50)
        for _ in range(3):
            late = limited.post(GENERATE, json=body, headers={"x-request-timeout-s": "0.5"})
            assert late.status_code == 504, late.text
        assert limited.post(GENERATE, json=host.body(num_inference_steps=1)).status_code == 200
        assert limited.post(GENERATE, json=host.body(num_inference_steps=1)).status_code == 429


@attack("Many requests at once to overshoot a daily quota", outcome="work is reserved; the quota holds")
def test_a_daily_quota_cannot_be_overshot(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.05"))) as host:
        work_s = 11 * 0.05  # ten steps, and one for the rest
        with host.new_client(limits=Limits(step_seconds_per_day=3.5 * work_s)) as limited:
            body = host.body(num_inference_steps=10)
            headers = {"prefer": "respond-async"}

            def send(_: int) -> httpx2.Response:
                return limited.post(GENERATE, json=body, headers=headers)

            answers = list(host.pool.map(send, range(40)))
            taken = [answer.json()["id"] for answer in answers if answer.status_code == 202]
            codes = {a.json()["error"]["code"] for a in answers if a.status_code != 202}
            assert (len(taken), codes) == (3, {"quota_exceeded"})
            assert limited.delete(f"/dedicated/v1/requests/{taken[-1]}").status_code == 200
            again = limited.post(GENERATE, json=host.body(num_inference_steps=1), headers=headers)
            assert again.status_code == 202, "what a cancelled request had reserved is free again"


@attack("Thousands of watchers of waiting requests", outcome="the queue is counted once for all of them")
def test_the_queue_is_counted_once_for_all_watchers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    of = _Line.of

    def counting(jobs: Any) -> _Line:
        nonlocal counted
        counted += 1
        return of(jobs)

    async def look(queue: JobQueue) -> tuple[int, list[int]]:
        nonlocal counted
        counted = 0
        places = [queue.ahead(job).num for job in queue.waiting() for _ in range(10)]
        return counted, places

    monkeypatch.setattr(_Line, "of", staticmethod(counting))
    with hosting(settings_for(tmp_path, endpoint("fake:step_s=0.1"))) as host:  # so that they wait
        waiting = [host.submit(num_inference_steps=50) for _ in range(30)]
        times, places = host.run(look(host.endpoint().dispatcher.queue))
        assert len(places) > 100
        assert times <= 1
        for each in waiting:
            host.client.delete(f"/dedicated/v1/requests/{each}")


@attack("Readers of events without end", outcome="429 beyond max_watchers, for this key alone")
@attack(
    "Clients without end under one Idempotency-Key", outcome="429 beyond max_watchers, for this key alone"
)
def test_the_watchers_of_a_key_are_limited(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, endpoint("fake:step_s=0.1"), max_watchers=2)
    with hosting(settings) as host, host.new_client() as other, contextlib.ExitStack() as readers:
        running = host.submit(num_inference_steps=50)
        events = f"/dedicated/v1/requests/{running}/events"
        lines: list[Iterator[str]] = []
        for _ in range(2):
            reader = readers.enter_context(host.client.stream("GET", events))
            lines.append(reader.iter_lines())  # kept, for an iterator that is dropped closes its connection
            assert next(lines[-1]) == "event: progress"
        refused = host.client.get(events)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (429, "too_many_watchers")
        assert int(refused.headers["retry-after"]) >= 1
        assert "2 connections of this key" in error["message"]
        assert "max_watchers" in error["message"]
        assert host.state(running)["status"] == "running", "asking is not following"

        its_own = other.post(GENERATE, json=host.body(), headers={"prefer": "respond-async"}).json()["id"]
        with other.stream("GET", f"/dedicated/v1/requests/{its_own}/events") as answer:
            assert answer.status_code == 200
            assert b"event: done" in answer.read()

        body, again = host.body(num_inference_steps=50, seed=2), {"idempotency-key": "again"}
        first = host.pool.submit(host.client.post, GENERATE, json=body, headers=again)
        host.until(lambda: _clients_of(host, "again") == 1)
        refused = host.client.post(GENERATE, json=body, headers=again)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_watchers")
        readers.close()
        host.until(lambda: not host.service.admission.tickets.by_id[running].watchers)
        twin = host.pool.submit(host.client.post, GENERATE, json=body, headers=again)
        host.until(lambda: _clients_of(host, "again") == 2)
        for ticket in host.service.admission.tickets.living():
            host.call(host.service.admission.cancel, ticket)
        assert [each.result(PATIENCE_S).status_code for each in (first, twin)] == [499, 499]
        host.until(lambda: not host.service.admission._joining._watchers)


def _clients_of(host: Host, idempotency_key: str) -> int:
    tickets = host.service.admission.tickets.by_id.values()
    return sum(ticket.clients for ticket in tickets if ticket.idempotency_key == idempotency_key)


@attack("A request that is held up before admission", outcome="its deadline counts from its arrival")
def test_a_deadline_counts_from_arrival(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    find = host.service._find_key

    def held_up(secret: str) -> Any:
        threading.Event().wait(0.3)
        return find(secret)

    monkeypatch.setattr(type(host.service), "_find_key", lambda self, secret: held_up(secret))
    answer = host.post(headers={"x-request-timeout-s": "0.2"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


@attack("A worker that dies after it has sent previews", outcome="no preview comes twice")
def test_no_preview_comes_twice(host: Host, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    prompt = f"a !wait@1:{gate} !die-once@9:{tmp_path / 'flag'}"
    headers = {"prefer": "respond-async, previews=3"}
    request_id = host.submit(prompt, headers=headers, num_inference_steps=12)
    with host.client.stream("GET", f"/dedicated/v1/requests/{request_id}/events") as answer:
        gate.touch()
        events = answer.read().decode().split("\n\n")
    previews = [
        json.loads(each.partition("data: ")[2]) for each in events if each.startswith("event: preview")
    ]
    assert (tmp_path / "flag").exists()
    assert sorted(each["step"] for each in previews) == sorted({each["step"] for each in previews})
    assert len(previews) == 3


def test_previews_that_come_while_one_is_drawn_are_sent_too(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, gate = dedicated._preview_json, tmp_path / "gate"

    def slow(*values: Any) -> str:
        host.until(lambda: not host.service.admission.tickets.living())
        return draw(*values)

    monkeypatch.setattr(dedicated, "_preview_json", slow)
    request_id = host.submit(f"a cat !wait@1:{gate}", headers={"prefer": "respond-async, previews=3"})
    with host.client.stream("GET", f"/dedicated/v1/requests/{request_id}/events") as answer:
        gate.touch()
        names = [line for line in answer.iter_lines() if line.startswith("event: ")]
    assert names[-1] == "event: done"
    assert names.count("event: preview") == 3


@attack("Prefer: respond-async just before SIGTERM", outcome="runs to its end within drain_s")
def test_a_request_without_a_connection_is_drained_too(tmp_path: Path) -> None:
    settings = settings_for(tmp_path, endpoint("fake:step_s=0.02"), drain_s=20)
    with hosting(settings) as host:
        request_id = host.submit(num_inference_steps=20, response_format="url")
        ticket = host.service.admission.tickets.by_id[request_id]
    assert ticket.status == "done"
    assert len(list((settings.data_dir / "images").iterdir())) == 1


@attack("More stored pictures than a key may have", outcome="507 for this key alone; deleting makes room")
def test_the_disk_is_limited_by_key(tmp_path: Path) -> None:
    with hosting(settings_for(tmp_path, endpoint("fake:size=32"), max_stored_bytes=9000)) as host:
        size = 0
        for number in range(100):
            answer = host.post(response_format="url", seed=number)
            if answer.status_code != 200:
                break
            size += len(host.client.get(answer.json()["data"][0]["url"]).content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "too_many_pictures")
        assert 0 < size <= 9000
        with host.new_client() as other:
            assert other.post(GENERATE, json=host.body(response_format="url")).status_code == 200
        host.service.pictures.clean()
        assert host.post(response_format="url").status_code == 507, "counting anew comes to the same"
        for picture in host.client.get("/dedicated/v1/images").json()["data"]:
            host.client.delete(f"/dedicated/v1/images/{picture['name']}")
        assert host.post(response_format="url").status_code == 200


@attack("A database that is locked by another process", outcome="503 within seconds, for all who need it")
def test_a_locked_database_holds_nobody_up_for_long(tmp_path: Path) -> None:
    engine = database.open_database(f"sqlite:///{tmp_path / 'x.db'}")
    assert engine.pool._timeout == database.BUSY_TIMEOUT_S  # type: ignore[attr-defined]
    engine.dispose()


def test_an_ended_request_keeps_no_pictures(host: Host, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    text = base64.b64encode((tmp_path / "in.png").read_bytes()).decode()
    body = host.body(image={"image": text}, strength=0.5)
    with client(host.url, host.first_key) as http:
        answer = http.post("/dedicated/v1/images/edits", json=body, headers={"prefer": "respond-async"})
    assert answer.status_code == 202, answer.text
    done = host.wait_until(answer.json()["id"], "done")
    ticket = host.service.admission.tickets.by_id[done["id"]]
    assert [job.spec.images for job in ticket.jobs] == [()]
    assert done["num_steps"] == 2


def test_nothing_here_waits_for_the_event_loop() -> None:
    """The default executor's threads are waited for at the end, whatever they hang at."""
    folder = Path(database.__file__).parents[1]
    using = [
        file.name
        for file in folder.rglob("*.py")
        if any(word in file.read_text() for word in ("to_thread(", "run_in_threadpool", "run_in_executor"))
    ]
    assert using == []
    assert asyncio.iscoroutinefunction(asyncio.to_thread)
