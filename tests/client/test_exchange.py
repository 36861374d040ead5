"""What is sent, what comes back, errors and retries."""

from __future__ import annotations

import asyncio
import socket
from email.utils import formatdate

import httpx2
import numpy as np
import pytest

import mezzotint
from mezzotint import MISSING, errors
from mezzotint.client import AsyncClient, Client, Generation, exchange
from mezzotint.images import encode
from tests.client.faces import Connect
from tests.client.scripted import CAT, PIXELS, Reply, Script, answer, error, item

# ---------------------------------------------------------------- what is sent


def test_only_what_was_set_is_sent(connect: Connect, script: Script) -> None:
    script.answers(answer())
    images = connect(script.url)
    images.generate(**CAT)
    images.generate(**CAT, seed=None, guidance_scale=7, n=MISSING, response_format="png")
    assert [seen.json for seen in script.seen] == [
        CAT,
        CAT | {"seed": None, "guidance_scale": 7.0, "response_format": "png"},
    ]
    assert {(seen.method, seen.path) for seen in script.seen} == {
        ("POST", "/dedicated/v1/images/generations")
    }
    assert script.seen[0].headers["content-type"] == "application/json"
    assert script.seen[0].headers["user-agent"] == f"mezzotint/{mezzotint.__version__}"


def test_the_key_is_sent_when_there_is_one(connect: Connect, script: Script) -> None:
    script.answers(answer())
    connect(script.url, api_key="secret\n").generate(**CAT)
    connect(script.url).generate(**CAT)
    assert [seen.headers.get("authorization") for seen in script.seen] == ["Bearer secret", None]


def test_key_and_address_come_from_the_environment(
    connect: Connect, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.answers(answer())
    monkeypatch.setenv("MEZZOTINT_BASE_URL", script.url + "/")
    monkeypatch.setenv("MEZZOTINT_API_KEY", "from-outside")
    connect().generate(**CAT)
    assert script.seen[0].headers["authorization"] == "Bearer from-outside"


def test_ones_own_headers_go_along_but_not_to_a_pictures_url(connect: Connect, script: Script) -> None:
    link = {"seed": 5, "response_format": "url", "url": "/files/a.png"}
    script.answers(answer(link), Reply(body=b"file"))
    images = connect(script.url, headers={"X-Friendli-Team": "ours"})
    images.fetch(images.generate(**CAT).data[0])
    assert [seen.headers.get("x-friendli-team") for seen in script.seen] == ["ours", None]


def test_a_bad_field_is_told_before_anything_is_sent(connect: Connect, script: Script) -> None:
    images = connect(script.url)
    for call in (images.generate, images.submit, lambda **fields: next(images.stream(**fields))):
        with pytest.raises(errors.InvalidRequestError) as caught:
            call(**CAT | {"num_inference_steps": 99})
        assert caught.value.code == "out_of_range"
        assert caught.value.message == "num_inference_steps must be between 1 and 50 (got 99)"
    assert script.seen == []


@pytest.mark.parametrize("options", [{"base_url": "localhost:8000"}, {"api_key": "clé"}, {"api_key": "a\nb"}])
def test_an_impossible_address_or_key_is_refused_at_once(connect: Connect, options: dict[str, str]) -> None:
    with pytest.raises(errors.ConfigError):
        connect(**options)


# ---------------------------------------------------------------- what comes back


def test_the_answer_is_typed(connect: Connect, script: Script) -> None:
    timings = {"queue_ms": 1.0, "generate_ms": 2.0, "encode_ms": 3.0}
    usage = {"images": 1, "steps": 8}
    reply = answer(item(timings=timings), usage=usage, warnings=["cut"])
    script.answers(Reply(body=reply, headers={"x-request-id": "req_7"}))
    result = connect(script.url).generate(**CAT)
    assert (result.seed, result.id, result.created, result.request_id) == (5, "req_1", 1, "req_7")
    assert result.warnings == ["cut"]
    assert result.usage is not None
    assert result.usage.model_dump() == usage
    assert result.timings is not None
    assert result.timings.model_dump() == timings
    assert len(result.data) == 1
    assert repr(result.data[0]) == "<GeneratedImage png, seed 5, 8x4>"


@pytest.mark.parametrize("form", ["png", "jpeg", "jpg", "raw"])
def test_every_form_decodes_to_the_picture(connect: Connect, script: Script, form: str) -> None:
    script.answers(answer(item(form)))
    image = connect(script.url).generate(**CAT).image
    assert image.size == (8, 4)
    assert np.abs(np.asarray(image).astype(int) - PIXELS).max() <= (40 if form.startswith("j") else 0)


def test_answers_without_our_additions_are_read(connect: Connect, script: Script) -> None:
    bare = {"seed": 5, "response_format": "jpeg", "b64_json": item("jpeg")["b64_json"], "url": None}
    script.answers({"data": [bare]})
    result = connect(script.url).generate(**CAT)
    assert result.image.size == (8, 4)
    assert (result.id, result.created, result.usage, result.timings, result.url) == (None,) * 5


def test_a_picture_behind_a_url_is_fetched_without_the_key(connect: Connect, script: Script) -> None:
    data = encode("png", PIXELS, 8, 4)
    link = {"seed": 5, "response_format": "url", "url": f"{script.url}/files/a.png?signature=x"}
    script.answers(answer(link), Reply(body=data))
    images = connect(script.url, api_key="secret")
    picture = images.generate(**CAT).data[0]
    assert images.fetch(picture) == data
    assert images.fetch(picture) == picture.data == data
    assert np.array_equal(np.asarray(picture.image), PIXELS)
    fetched = script.seen[1:]
    assert [(seen.method, seen.path) for seen in fetched] == [("GET", "/files/a.png")]
    assert "authorization" not in fetched[0].headers


def test_the_blocking_client_fetches_when_the_picture_is_looked_at(script: Script) -> None:
    link = {"seed": 5, "response_format": "url", "url": "/files/a.png"}
    script.answers(answer(link), Reply(body=encode("png", PIXELS, 8, 4)))
    with Client(base_url=script.url) as client:
        result = client.images.generate(**CAT)
        assert len(script.seen) == 1
        assert result.image.size == (8, 4)
    assert len(script.seen) == 2


def test_a_picture_left_behind_a_url_by_a_closed_client_is_told(script: Script) -> None:
    script.answers(answer({"seed": 5, "response_format": "url", "url": "/files/a.png"}))
    with Client(base_url=script.url) as client:
        result = client.images.generate(**CAT)
    with pytest.raises(errors.MezzotintError, match="client is closed"):
        _ = result.image


def test_the_async_client_says_how_to_fetch(script: Script) -> None:
    script.answers(answer({"seed": 5, "response_format": "url", "url": "/files/a.png"}))

    async def run() -> Generation:
        async with AsyncClient(base_url=script.url) as client:
            return await client.images.generate(**CAT)

    with pytest.raises(errors.MezzotintError, match=r"await client\.images\.fetch\(picture\)"):
        _ = asyncio.run(run()).image


def test_an_expired_url_is_told(connect: Connect, script: Script) -> None:
    script.answers(
        answer({"seed": 5, "response_format": "url", "url": "/files/a.png"}), error(410, "url_expired")
    )
    images = connect(script.url)
    picture = images.generate(**CAT).data[0]
    with pytest.raises(errors.GoneError):
        images.fetch(picture)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body="<html>hello</html>"),
        Reply(body={}),
        Reply(body={"data": []}),
        Reply(body={"data": [{"seed": 5, "response_format": "png"}]}),
        Reply(body=answer(item(url="http://x"))),
        Reply(body=answer(item(b64_json="%%%"))),
        Reply(body=answer(item(b64_json="aGVsbG8="))),
        Reply(body=answer(item("raw", width=100))),
        Reply(body=answer(item("raw", width=None))),
    ],
)
def test_an_answer_that_breaks_the_contract_is_told(connect: Connect, script: Script, reply: Reply) -> None:
    script.answers(reply)
    with pytest.raises(errors.InternalError) as caught:
        _ = connect(script.url).generate(**CAT).image
    assert caught.value.code == "invalid_answer"
    assert len(script.seen) == 1


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("reply", "cls"),
    [
        (error(401, "invalid_api_key"), errors.AuthenticationError),
        (error(403, "forbidden_endpoint"), errors.PermissionDeniedError),
        (error(404, "adapter_not_found"), errors.NotFoundError),
        (error(413, "body_too_large"), errors.BodyTooLargeError),
        (error(422, "unknown_field"), errors.InvalidRequestError),
        (error(429, "queue_full"), errors.QueueFullError),
        (error(429, "quota_exceeded"), errors.RateLimitError),
        (error(500, "internal_error"), errors.InternalError),
        (error(500, "out_of_memory"), errors.GenerationError),
        (error(503, "endpoint_failed"), errors.UnavailableError),
        (error(504, "deadline_exceeded"), errors.DeadlineError),
        (error(507, "storage_full"), errors.StorageFullError),
    ],
)
def test_errors_come_by_class(
    connect: Connect, script: Script, reply: Reply, cls: type[errors.MezzotintError]
) -> None:
    reply.headers["retry-after"] = "7"
    script.answers(reply)
    with pytest.raises(cls) as caught:
        connect(script.url, max_retries=0).generate(**CAT)
    assert type(caught.value) is cls
    assert isinstance(reply.body, dict)
    told = (caught.value.code, caught.value.param, caught.value.request_id, caught.value.retry_after)
    assert told == (reply.body["error"]["code"], "model", "req_9", 7.0)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(404, {"detail": "no such thing"}), "no such thing"),
        (Reply(404, {"error": "no such thing"}), "no such thing"),
        (Reply(404, {"message": "no such thing"}), "no such thing"),
        (Reply(404, {"error": {"message": None}, "detail": "no such thing"}), "no such thing"),
        (Reply(404, {"detail": [{"loc": ["body"]}]}), 'HTTP 404: {"detail": [{"loc": ["body"]}]}'),
        (Reply(404, "<html>"), "HTTP 404: <html>"),
        (Reply(404, "[]"), "HTTP 404: []"),
        (Reply(404, b"\xff\xfe"), "HTTP 404: \ufffd\ufffd"),
        (Reply(404), "HTTP 404: no message"),
    ],
)
def test_foreign_error_bodies_are_understood(
    connect: Connect, script: Script, reply: Reply, message: str
) -> None:
    reply.headers["x-request-id"] = "abc"
    script.answers(reply)
    with pytest.raises(errors.NotFoundError) as caught:
        connect(script.url).generate(**CAT)
    assert caught.value.message == message
    assert (caught.value.code, caught.value.request_id) == ("not_found", "abc")


def test_a_redirect_is_not_followed_with_the_key(connect: Connect, script: Script) -> None:
    script.answers(Reply(302, headers={"location": "http://127.0.0.1:9/"}))
    with pytest.raises(errors.MezzotintError, match="HTTP 302"):
        connect(script.url, api_key="secret").generate(**CAT)
    assert len(script.seen) == 1


# ---------------------------------------------------------------- retries


@pytest.mark.parametrize(
    "fault",
    [
        error(503, "endpoint_starting"),
        error(429, "queue_full", retry_after="0"),
        Reply(503, "busy"),
        Reply(body="{", cut=True),
    ],
)
def test_what_passes_is_tried_again_with_one_idempotency_key(
    connect: Connect, script: Script, fault: Reply
) -> None:
    script.answers(fault, fault, answer())
    images = connect(script.url)
    assert images.generate(**CAT).seed == 5
    assert [seen.json for seen in script.seen] == [CAT] * 3
    assert len({seen.headers["idempotency-key"] for seen in script.seen}) == 1
    images.generate(**CAT)
    assert len({seen.headers["idempotency-key"] for seen in script.seen}) == 2


def test_ones_own_idempotency_key_is_sent(connect: Connect, script: Script) -> None:
    script.answers(answer())
    connect(script.url).generate(**CAT, idempotency_key="mine")
    assert script.seen[0].headers["idempotency-key"] == "mine"


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 500, 504])
def test_what_does_not_pass_is_not_tried_again(connect: Connect, script: Script, status: int) -> None:
    script.answers(Reply(status, "no"))
    with pytest.raises(errors.MezzotintError):
        connect(script.url).generate(**CAT)
    assert len(script.seen) == 1


@pytest.mark.parametrize("max_retries", [0, 1, 4])
def test_retries_end(connect: Connect, script: Script, max_retries: int) -> None:
    script.answers(error(503, "endpoint_starting"))
    with pytest.raises(errors.UnavailableError):
        connect(script.url, max_retries=max_retries).generate(**CAT)
    assert len(script.seen) == max_retries + 1


def test_a_wait_too_long_is_not_waited(connect: Connect, script: Script) -> None:
    script.answers(error(429, "queue_full", retry_after="9999"))
    with pytest.raises(errors.QueueFullError) as caught:
        connect(script.url).generate(**CAT)
    assert caught.value.retry_after == 9999
    assert len(script.seen) == 1


def test_no_server_at_the_address_is_told(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(errors.ConnectionFailedError, match=f"127.0.0.1:{port}.*is the server running"):
        connect(f"http://127.0.0.1:{port}", max_retries=1).generate(**CAT)


def test_neither_key_nor_signature_shows_in_messages_or_reprs() -> None:
    options = exchange.Options.given("http://127.0.0.1:9", "secret-key", 1.0, 0, None)
    call = exchange.build_request(options, CAT)  # type: ignore[arg-type]
    assert call.headers["Authorization"] == "Bearer secret-key"
    lost = exchange.connection_error(
        httpx2.ConnectError("refused"), exchange.Send("GET", "http://x/a.png?signature=abc")
    )
    assert lost.message == "GET http://x/a.png: refused; is the server running at this address?"
    assert "secret-key" not in repr(options) + repr(call)


def test_an_answer_that_takes_too_long_is_told_and_not_asked_for_again(
    connect: Connect, script: Script
) -> None:
    script.answers(Reply(hang=True))
    with pytest.raises(errors.DeadlineError, match="raise `timeout`"):
        connect(script.url).generate(**CAT, timeout=0.1)
    with pytest.raises(errors.DeadlineError):
        connect(script.url, timeout=0.1).generate(**CAT)
    assert len(script.seen) == 2


@pytest.mark.parametrize(
    ("problem", "attempt", "expected"),
    [
        (errors.UnavailableError("x"), 0, 0.375),
        (errors.UnavailableError("x"), 1, 0.75),
        (errors.UnavailableError("x"), 3, 3.0),
        (errors.UnavailableError("x", retry_after=3), 0, 3.25),
        (errors.UnavailableError("x", retry_after=120), 3, 120.25),
        (errors.UnavailableError("x", retry_after=121), 0, None),
        (errors.UnavailableError("x"), 4, None),
        (errors.QueueFullError("x"), 2, 1.5),
        (errors.RateLimitError("x"), 2, 1.5),
        (errors.ConnectionFailedError("x"), 0, 0.375),
        (errors.InvalidRequestError("x"), 0, None),
        (errors.GenerationError("x", retry_after=1), 0, None),
    ],
)
def test_the_wait_before_a_retry(
    problem: errors.MezzotintError, attempt: int, expected: float | None
) -> None:
    assert exchange.retry_delay(problem, attempt, 4, 0.5) == expected


def test_waits_do_not_grow_for_ever() -> None:
    assert exchange.retry_delay(errors.UnavailableError("x"), 50, 100, 0.999) == pytest.approx(8.0, rel=0.01)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("soon", None),
        ("", None),
        (formatdate(1060, usegmt=True), 60.0),
        (formatdate(900, usegmt=True), 0.0),
    ],
)
def test_retry_after_is_a_number_or_a_date(text: str | None, seconds: float | None) -> None:
    assert exchange.read_retry_after(text, 1000.0) == seconds
