"""Handles, streams and many requests; the real server with fake workers; the package."""

from __future__ import annotations

import base64
import itertools
import subprocess
import sys
from pathlib import Path

import httpx2
import numpy as np
import pytest

import mezzotint
from mezzotint import MISSING, errors
from mezzotint.client import Completed, Generation, Preview, Progress, exchange
from mezzotint.images import Parameters, read_parameters
from mezzotint.spec import ImageSpec
from tests.client.faces import Connect, Talks
from tests.client.scripted import CAT, Reply, Script, answer, error, item, sse

# ---------------------------------------------------------------- submitting and events


ACCEPTED = Reply(202, {"id": "req_1", "status": "queued"})
PROGRESS = ("progress", {"id": "req_1", "status": "running", "step": 3, "num_steps": 8, "seconds_left": 0.5})
DONE = ("done", answer())


def test_a_submitted_request_is_followed(connect: Connect, script: Script) -> None:
    preview = ("preview", {"index": 0, "step": 3, "b64_json": item()["b64_json"]})
    script.answers(ACCEPTED, sse(PROGRESS, preview, ("news", {}), DONE))
    handle = connect(script.url).submit(**CAT, previews=2)
    first, second, last = handle.events()
    assert first == Progress("running", None, 3, 8, 0.5)
    assert isinstance(second, Preview)
    assert (second.index, second.step, second.image.size) == (0, 3, (8, 4))
    assert isinstance(last, Completed)
    assert last.result.seed == 5
    assert handle.result() is last.result
    assert handle.status().status == "done"
    assert handle.cancel().status == "done"
    assert [(seen.method, seen.path) for seen in script.seen] == [
        ("POST", "/dedicated/v1/images/generations"),
        ("GET", "/dedicated/v1/requests/req_1/events"),
    ]
    assert script.seen[0].headers["prefer"] == "respond-async, previews=2"


def test_status_and_cancel_ask_the_server(connect: Connect, script: Script) -> None:
    script.answers(
        ACCEPTED, {"id": "req_1", "status": "queued", "position": 3}, {"id": "req_1", "status": "cancelled"}
    )
    handle = connect(script.url, api_key="secret").submit(**CAT)
    state = handle.status()
    assert (state.status, state.position, state.step) == ("queued", 3, MISSING)
    assert handle.cancel().status == "cancelled"
    asked = [(seen.method, seen.path, seen.headers["authorization"]) for seen in script.seen[1:]]
    path = "/dedicated/v1/requests/req_1"
    assert asked == [("GET", path, "Bearer secret"), ("DELETE", path, "Bearer secret")]


def test_a_server_that_answers_at_once_is_fine(connect: Connect, script: Script) -> None:
    script.answers(answer())
    images = connect(script.url)
    handle = images.submit(**CAT)
    assert handle.result().seed == 5
    assert handle.status().status == "done"
    assert [type(event) for event in images.stream(**CAT)] == [Completed]


def test_lost_events_are_taken_up_again(connect: Connect, script: Script) -> None:
    script.answers(ACCEPTED, sse(PROGRESS, cut=True), sse(PROGRESS), sse(DONE))
    assert connect(script.url).submit(**CAT).result().seed == 5
    assert len(script.seen) == 4


def test_a_result_is_asked_for_once(connect: Connect, script: Script) -> None:
    script.answers(ACCEPTED, sse(PROGRESS, DONE))
    handle = connect(script.url).submit(**CAT)
    assert handle.result() is handle.result()
    assert len(script.seen) == 2


def test_a_large_picture_fits_into_the_last_event(connect: Connect, script: Script) -> None:
    pixels = bytes(2048 * 2048 * 3)
    large = item("raw", b64_json=base64.b64encode(pixels).decode(), width=2048, height=2048)
    script.answers(ACCEPTED, sse(("done", answer(large))))
    assert connect(script.url).submit(**CAT).result().image.size == (2048, 2048)


def test_events_that_stay_lost_are_given_up(connect: Connect, script: Script) -> None:
    script.answers(ACCEPTED, sse())
    with pytest.raises(errors.ConnectionFailedError, match="closed the events"):
        connect(script.url, max_retries=2).submit(**CAT).result()
    assert len(script.seen) == 4


def test_events_of_a_forgotten_request_are_told(connect: Connect, script: Script) -> None:
    script.answers(ACCEPTED, error(404, "request_not_found"))
    with pytest.raises(errors.NotFoundError):
        connect(script.url).submit(**CAT).result()
    assert len(script.seen) == 2


@pytest.mark.parametrize(
    ("code", "kind", "cls"),
    [
        ("out_of_memory", "server_error", errors.GenerationError),
        ("deadline_exceeded", "server_error", errors.DeadlineError),
        ("endpoint_failed", "server_error", errors.UnavailableError),
        ("server_stopping", "server_error", errors.UnavailableError),
        ("not_supported", "invalid_request_error", errors.InvalidRequestError),
        ("adapter_load_failed", "server_error", errors.InternalError),
    ],
)
def test_a_failed_request_raises_its_error(
    connect: Connect, script: Script, code: str, kind: str, cls: type[errors.MezzotintError]
) -> None:
    body = {"error": {"message": "sorry", "type": kind, "param": None, "code": code}, "detail": "sorry"}
    script.answers(ACCEPTED, sse(PROGRESS, ("failed", body | {"request_id": None})))
    with pytest.raises(cls) as caught:
        list(connect(script.url).stream(**CAT))
    assert type(caught.value) is cls
    assert (caught.value.code, caught.value.message, caught.value.request_id) == (code, "sorry", "req_1")
    assert len(script.seen) == 2


def test_a_cancelled_request_raises(connect: Connect, script: Script) -> None:
    script.answers(ACCEPTED, sse(("cancelled", {"id": "req_1", "status": "cancelled"})))
    with pytest.raises(errors.RequestCancelledError):
        connect(script.url).submit(**CAT).result()


def test_leaving_a_stream_early_cancels_the_request(connect: Connect, script: Script) -> None:
    script.answers(ACCEPTED, sse(PROGRESS, PROGRESS, DONE), {"id": "req_1", "status": "cancelled"})
    events = connect(script.url).stream(**CAT)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert [seen.method for seen in script.seen] == ["POST", "GET", "DELETE"]


# ---------------------------------------------------------------- many


def test_many_come_back_in_order(connect: Connect, script: Script) -> None:
    script.answers(*(answer(item(seed=seed)) for seed in range(9)), answer())
    results = connect(script.url).generate_many([CAT | {"seed": seed} for seed in range(9)], concurrency=1)
    assert [result.seed for result in results] == list(range(9))
    assert [seen.json["seed"] for seen in script.seen] == list(range(9))


def test_many_run_at_most_as_many_at_a_time_as_asked(connect: Connect, script: Script) -> None:
    script.answers(answer())
    script.hold_until_running = 3
    results = connect(script.url).generate_many([CAT] * 10, concurrency=3)
    assert len(results) == 10
    assert script.most_running == 3
    assert len({seen.headers["idempotency-key"] for seen in script.seen}) == 10


def test_many_are_checked_before_the_first_is_sent(connect: Connect, script: Script) -> None:
    with pytest.raises(errors.InvalidRequestError):
        connect(script.url).generate_many([CAT, CAT | {"prompt": ""}])
    assert script.seen == []


def test_the_first_error_ends_many(connect: Connect, script: Script) -> None:
    script.answers(answer(), error(500, "out_of_memory"))
    with pytest.raises(errors.GenerationError):
        connect(script.url).generate_many([CAT] * 50, concurrency=1)
    assert len(script.seen) < 10


def test_errors_of_many_can_stand_in_their_places(connect: Connect, script: Script) -> None:
    script.answers(answer(), error(500, "out_of_memory"), answer())
    requests = [CAT, CAT, CAT | {"prompt": ""}, CAT]
    results = connect(script.url).generate_many(requests, concurrency=1, return_errors=True)
    assert [type(result) for result in results] == [
        Generation,
        errors.GenerationError,
        errors.InvalidRequestError,
        Generation,
    ]


def test_many_of_none_are_none(connect: Connect) -> None:
    assert connect().generate_many([]) == []


@pytest.mark.parametrize(("progress", "shown"), [(True, True), (False, False), (None, False)])
def test_the_progress_bar_can_be_switched_off(
    connect: Connect,
    script: Script,
    capsys: pytest.CaptureFixture[str],
    progress: bool | None,
    shown: bool,
) -> None:
    script.answers(answer())
    connect(script.url).generate_many([CAT] * 2, progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("2/2" in err) == shown


# ---------------------------------------------------------------- against the real server


@pytest.fixture
def images(connect: Connect, server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Talks:
    monkeypatch.setattr(exchange, "BACKOFF_S", 0.1)
    return connect(server[0], api_key=server[1])


def test_the_real_server_answers_every_form_with_the_same_picture(images: Talks) -> None:
    pictures = {}
    for form in ("url", "png", "jpeg", "jpg", "raw", None, MISSING):
        picture = images.generate(**CAT, seed=3, response_format=form).data[0]
        images.fetch(picture)
        pictures[form] = np.asarray(picture.image)
        assert picture.response_format == (form if isinstance(form, str) else "url")
        assert picture.seed == 3
        assert picture.timings is not None
    for form, pixels in pictures.items():
        if form not in ("jpeg", "jpg"):
            assert np.array_equal(pixels, pictures["raw"])


def test_a_file_from_the_real_server_tells_what_made_it(images: Talks, tmp_path: Path) -> None:
    (path,) = images.generate(**CAT, seed=3, guidance_scale=2.5, response_format="png").save(tmp_path / "cat")
    assert read_parameters(path.read_bytes()) == Parameters(
        "emoji",
        ImageSpec(prompt="a cat", num_inference_steps=8, seed=3, guidance_scale=2.5, width=16, height=16),
        {"dtype": "fp32"},
    )


def test_several_pictures_count_up_from_the_seed(images: Talks) -> None:
    result = images.generate(**CAT, seed=3, n=3, response_format="png")
    assert [picture.seed for picture in result.data] == [3, 4, 5]
    assert result.usage is not None
    assert result.usage.model_dump() == {"images": 3, "steps": 24}


def test_progress_and_previews_come_from_the_real_server(images: Talks) -> None:
    events = list(images.stream(**CAT | {"model": "slow", "num_inference_steps": 6}, previews=2, seed=1))
    *earlier, last = events
    assert isinstance(last, Completed)
    steps = [event.step for event in earlier if isinstance(event, Progress) and event.step is not None]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 3
    previews = [event for event in earlier if isinstance(event, Preview)]
    assert [preview.image.size for preview in previews] == [(16, 16)] * 2


def test_a_request_at_the_real_server_can_be_submitted_and_cancelled(images: Talks) -> None:
    handle = images.submit(**CAT | {"model": "slow", "num_inference_steps": 50})
    assert handle.status().status in ("queued", "running")
    handle.cancel()
    with pytest.raises(errors.RequestCancelledError):
        handle.result()
    assert handle.status().status == "cancelled"


def test_a_submitted_result_is_the_one_that_waiting_gives(images: Talks) -> None:
    waited = images.generate(**CAT, seed=9, response_format="png")
    handle = images.submit(**CAT, seed=9, response_format="png")
    assert handle.result().b64_json == waited.b64_json


def test_a_finished_request_is_found_again_by_its_id(images: Talks) -> None:
    made = images.submit(**CAT, seed=9, response_format="png").result()
    assert made.id is not None
    handle = images.handle(made.id)
    state = handle.status()
    assert state.status == "done"
    assert state.result is not MISSING
    assert state.result.data[0].b64_json == made.b64_json
    (only,) = handle.events()
    assert isinstance(only, Completed)
    assert only.result.b64_json == made.b64_json
    with pytest.raises(errors.NotFoundError) as caught:
        images.handle("req_gone").status()
    assert caught.value.code == "request_not_found"
    with pytest.raises(errors.NotFoundError):
        images.handle("../../../healthz").status()


def test_an_unknown_endpoint_and_a_wrong_key_are_told(
    images: Talks, connect: Connect, server: tuple[str, str]
) -> None:
    with pytest.raises(errors.NotFoundError) as missing:
        images.generate(**CAT | {"model": "emojy"})
    assert missing.value.code == "endpoint_not_found"
    assert missing.value.request_id is not None
    with pytest.raises(errors.AuthenticationError) as refused:
        connect(server[0], api_key="wrong").generate(**CAT)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(errors.AuthenticationError) as nobody:
        connect(server[0]).generate(**CAT)
    assert nobody.value.code == "missing_api_key"


def test_a_job_that_fails_at_the_real_server_raises_either_way(images: Talks) -> None:
    broken = CAT | {"prompt": "!oom"}
    with pytest.raises(errors.GenerationError) as waited:
        images.generate(**broken)
    with pytest.raises(errors.GenerationError) as followed:
        images.submit(**broken).result()
    assert waited.value.code == followed.value.code == "out_of_memory"


def test_many_at_the_real_server_give_each_its_own(images: Talks) -> None:
    requests = [CAT | {"seed": seed, "response_format": "png"} for seed in range(20)]
    results = images.generate_many(requests)
    assert [result.seed for result in results] == list(range(20))
    assert len({result.b64_json for result in results}) == 20


# ---------------------------------------------------------------- the package


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import sys, mezzotint; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "fastapi", "pydantic", "numpy", "httpx2"} & set(loaded.stdout.split())


def test_the_sdk_needs_neither_torch_nor_a_web_framework() -> None:
    script = "import sys; from mezzotint import *; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "fastapi", "starlette", "diffusers"} & set(loaded.stdout.split())


def test_every_exported_name_is_there() -> None:
    for name in mezzotint.__all__:
        assert hasattr(mezzotint, name)
    with pytest.raises(AttributeError, match="no attribute 'Klient'"):
        _ = mezzotint.Klient
    assert list(itertools.islice(mezzotint.DedicatedImageGenerationBody.model_fields, 6))[-1] == "seed"
    assert issubclass(httpx2.SSEError, httpx2.TransportError)  # the event loops rely on it
