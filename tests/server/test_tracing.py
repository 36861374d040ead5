"""One trace per request, as a real collector gets it from a real server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mezzotint.errors import ConfigError
from mezzotint.server import tracing
from tests.server.collector import Collector, Span, children, collecting
from tests.server.hosting import GENERATE, Host, endpoint, hosting, settings_for

TRACE = "0af7651916cd43dd8448eb211c80319c"
SENDER = "b7ad6b7169203331"
SENT = {"traceparent": f"00-{TRACE}-{SENDER}-01"}
HTTP = f"POST {GENERATE}"


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans are sent soon, and nothing but the test switches them on."""
    for name in (*tracing.ENDPOINTS, *tracing.PROTOCOLS, "OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as running:
        yield running


@pytest.fixture
def traced(tmp_path: Path, collector: Collector) -> Iterator[Host]:
    slow = endpoint("fake:step_s=0.005")
    with hosting(settings_for(tmp_path, slow, otlp_endpoint=collector.url)) as host:
        yield host


def named(spans: list[Span], name: str) -> list[Span]:
    return [each for each in spans if each.name == name]


def finished(name: str, num: int = 1) -> Any:
    return lambda spans: len(named(spans, name)) >= num


def test_a_request_is_one_trace_from_its_sender_to_its_stored_picture(
    traced: Host, collector: Collector
) -> None:
    answer = traced.post("a secret prompt", headers=SENT, response_format="url", n=2)
    assert answer.status_code == 200, answer.text
    spans = collector.until(lambda spans: finished(HTTP)(spans) and finished("request")(spans))
    assert {each.trace for each in spans} == {TRACE}
    (http,), (request,) = named(spans, HTTP), named(spans, "request")
    assert http.parent == SENDER
    assert request.parent == http.id
    parts = children(spans, request)
    assert sorted(each.name for each in parts) == ["encode", "generate", "generate", "queue", "queue"]
    assert parts[-1].name == "encode"
    assert [each.name for each in children(spans, parts[-1])] == ["store", "store"]
    for generate in named(parts, "generate"):
        phases = children(spans, generate)
        assert [each.name for each in phases] == ["text encoding", "steps", "decode"]
        ends = [each.end for each in phases]
        assert [each.start for each in phases[1:]] == ends[:-1], "each phase begins where the last one ends"
        assert generate.start <= phases[0].start
        assert ends[-1] <= generate.end
        assert phases[1].end - phases[1].start >= 4 * 5_000_000, "four steps of 5 ms"
    assert request.attributes["mezzotint.request_id"] == answer.json()["id"]
    assert request.attributes["mezzotint.endpoint"] == "one"
    assert request.attributes["mezzotint.status"] == "done"
    assert request.resource["service.name"] == "mezzotint"
    assert not any(each.failed for each in spans)
    assert b"secret" not in collector.raw
    assert traced.client.headers["authorization"].removeprefix("Bearer ").encode() not in collector.raw


def test_the_retry_after_a_workers_death_is_in_the_same_trace(
    traced: Host, collector: Collector, tmp_path: Path
) -> None:
    assert traced.picture(f"a cat !die-once@2:{tmp_path / 'died'}", headers=SENT)
    spans = collector.until(finished("request"))
    (request,) = named(spans, "request")
    parts = children(spans, request)
    assert [each.name for each in parts] == ["queue", "generate", "queue", "generate", "encode"]
    first, second = named(parts, "generate")
    assert (first.failed, second.failed, request.failed) == (True, False, False)
    assert first.attributes["mezzotint.steps_done"] == 1
    assert [each.attributes["mezzotint.attempt"] for each in (first, second)] == [1, 2]
    assert first.attributes["mezzotint.worker_pid"] != second.attributes["mezzotint.worker_pid"]
    assert {each.trace for each in spans} == {TRACE}


def test_a_request_that_nobody_waits_for_ends_its_span_when_it_ends(
    traced: Host, collector: Collector
) -> None:
    request_id = traced.submit("a cat !hang@2", headers=SENT)
    (http,) = named(collector.until(finished(HTTP)), HTTP)
    assert not named(collector.spans, "request")
    traced.wait_until(request_id, "running")
    assert traced.client.delete(f"/dedicated/v1/requests/{request_id}").status_code == 200
    spans = collector.until(finished("request"))
    (request,), (generate,) = named(spans, "request"), named(spans, "generate")
    assert (request.parent, generate.parent) == (http.id, request.id)
    assert request.end > http.end
    assert (request.attributes["mezzotint.status"], request.failed) == ("cancelled", True)
    assert generate.attributes["error.type"] == request.attributes["error.type"] == "request_cancelled"
    assert not children(spans, generate), "a worker that was interrupted reports no phases"


def test_a_request_that_joins_another_is_linked_to_it(traced: Host, collector: Collector) -> None:
    headers = {"idempotency-key": "same"}
    first = traced.post(headers=headers | SENT).json()["id"]
    assert traced.post(headers=headers).json()["id"] == first
    spans = collector.until(finished(HTTP, 2))
    (request,) = named(spans, "request")
    (second,) = (each for each in named(spans, HTTP) if each.trace != TRACE)
    assert second.links == [request.id]
    assert second.attributes["mezzotint.joined"] == first


def test_only_requests_for_pictures_are_traced_and_only_sampled_ones(
    traced: Host, collector: Collector
) -> None:
    assert traced.client.get("/v1/models").status_code == 200
    assert traced.picture(headers={"traceparent": f"00-{TRACE}-{SENDER}-00"}), "its sender does not want one"
    refused = traced.post(headers=SENT, num_inference_steps=0)
    assert refused.status_code == 422
    spans = collector.until(finished(HTTP))
    assert [(each.name, each.parent) for each in spans] == [(HTTP, SENDER)], "no span of what was not let in"
    assert spans[0].attributes["http.response.status_code"] == 422


def calls_of_tracing(host: Host) -> int:
    """How many of its functions the event loop of a server calls for one request."""
    calls = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename == tracing.__file__

    host.call(sys.setprofile, count)
    try:
        assert host.picture()
    finally:
        host.call(sys.setprofile, None)
    return calls


def test_without_tracing_nothing_of_it_is_called(tmp_path: Path, traced: Host) -> None:
    assert calls_of_tracing(traced) > 5, "the count sees the calls of a server that traces"
    with hosting(settings_for(tmp_path / "off")) as host:
        assert host.service.tracing is None
        assert calls_of_tracing(host) == 0


def test_a_collector_that_is_away_holds_up_neither_requests_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "FLUSH_S", 0.1)
    with hosting(settings_for(tmp_path, otlp_endpoint="http://127.0.0.1:9")) as host:
        assert host.picture()


@pytest.mark.parametrize(
    ("variables", "on"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}, False),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, False),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4317"}, False),
    ],
)
def test_opentelemetrys_own_variables_switch_it_on_and_off(
    variables: dict[str, str], on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = tracing.open_tracing(None)
    assert (found is not None) == on
    if found is not None:
        found.provider.shutdown()


def test_the_variables_name_the_service(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "pictures")
    found = tracing.open_tracing(None)
    assert found is not None
    request = found.begin("req_1", "one", 1)
    assert request is not None
    request.end("done", None)
    found.provider.shutdown()
    (span,) = collector.spans
    assert span.resource["service.name"] == "pictures"


def test_without_the_extra_the_setting_stops_the_start_and_a_variable_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"otlp_endpoint: .*mezzotint\[server,otel\]"):
        tracing.open_tracing("http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert tracing.open_tracing(None) is None
