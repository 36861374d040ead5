"""Whatever is sent: no 5xx, no hang, one of the documented answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mezzotint.schemas import KNOWN_FIELDS
from tests.attacks import attack
from tests.server.hosting import GENERATE, Host, endpoint, hosting, settings_for

EXAMPLES = 300
MANY = 10_000
_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
_likely: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["one", "one:a", "two", ":", "one:", "ONE", "one ", "a" * 65]),
    "num_inference_steps": st.integers(-1, 52),
    "prompt": st.text(max_size=40) | st.sampled_from(["", " ", "\0", "x" * 10_001, "\ud800"]),
    "guidance_scale": st.floats() | st.none(),
    "response_format": st.sampled_from(["url", "png", "jpg", "jpeg", "raw", "gif", None]),
    "seed": st.integers(-1, 2**64) | st.none(),
    "n": st.integers(0, 9),
    "width": st.sampled_from([16, 8, 24, 20, 16384, 0]),
    "height": st.sampled_from([16, 8, 24, 20, 16384, 0]),
    "negative_prompt": st.text(max_size=20) | st.none(),
    "control_images": st.none() | _anything,
}
_valid = {"model": "one", "num_inference_steps": 1, "prompt": "x", "response_format": "png"}


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Mostly a valid body with some fields exchanged; sometimes any JSON, sometimes any bytes."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=60))
    if kind == 1:
        return json.dumps(draw(_anything)).encode()
    names = draw(st.lists(st.sampled_from([*KNOWN_FIELDS, "extra"]), max_size=4, unique=True))
    values: dict[str, Any] = dict(_valid)
    for name in names:
        values[name] = draw(_likely.get(name, _anything) if draw(st.booleans()) else _anything)
    for name in draw(st.lists(st.sampled_from(list(_valid)), max_size=1)):
        del values[name]
    return json.dumps(values).encode()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("server")
    with hosting(settings_for(folder, endpoint("fake:step_s=0"), log_level="error")) as running:
        yield running


def check(host: Host, body: bytes) -> httpx2.Response:
    answer = host.client.post(GENERATE, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 404, 422), (body, answer.text)
    values = answer.json()
    if answer.status_code == 200:
        assert all(("url" in item) != ("b64_json" in item) for item in values["data"])
    else:
        assert values["detail"] == values["error"]["message"]
        assert values["error"]["code"] != "internal_error"
        assert len(answer.content) < 2500, "an error does not echo what it was sent at length"
    return answer


@attack("Any JSON and any bytes as a body", outcome="200, 404 or 422")
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies())
def test_no_body_breaks_the_server(host: Host, body: bytes) -> None:
    check(host, body)


def test_the_bodies_reach_both_outcomes(host: Host) -> None:
    assert check(host, json.dumps(_valid).encode()).status_code == 200
    assert check(host, b"{}").status_code == 422


@pytest.mark.slow
@settings(max_examples=MANY, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=bodies())
def test_ten_thousand_bodies_leave_nothing_behind(host: Host, body: bytes) -> None:
    check(host, body)
    assert host.endpoint().dispatcher.idle
    assert len(host.service.admission.tickets.by_id) <= MANY + EXAMPLES + 10
