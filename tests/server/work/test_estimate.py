"""When a request is let in: without clock, endpoint or event loop."""

from __future__ import annotations

import pytest

from mezzotint.errors import DeadlineError, MezzotintError, QueueFullError, UnavailableError
from mezzotint.server.work.estimate import Estimate


def refusal(
    *works_s: float,
    speed: float = 1.0,
    start_s: float = 0.0,
    wait_s: float = 0.0,
    timeout_s: float = 100.0,
    max_queue_s: float = 60.0,
) -> MezzotintError | None:
    estimate = Estimate.of(works_s or (1.0,), speed, start_s=start_s, wait_s=max(wait_s, start_s))
    return estimate.refusal("one", timeout_s=timeout_s, max_queue_s=max_queue_s)


def test_what_is_done_in_time_is_let_in() -> None:
    assert refusal() is None
    assert refusal(10.0, wait_s=49.0) is None
    assert refusal(90.0, start_s=9.0) is None, "alone, a request may use its whole time"


def test_an_endpoint_that_starts_after_the_deadline_says_when_it_is_ready() -> None:
    refused = refusal(start_s=101.0)
    assert isinstance(refused, UnavailableError)
    assert refused.retry_after == 101.0


def test_work_that_takes_longer_than_the_deadline_is_refused_even_on_an_idle_endpoint() -> None:
    for refused in (refusal(101.0), refusal(50.0, start_s=51.0), refusal(60.0, 60.0)):
        assert isinstance(refused, DeadlineError)
    assert refusal(60.0, 60.0, speed=2.0) is None, "two at once, each as slow as alone"
    assert isinstance(refusal(101.0, speed=8.0), DeadlineError), "no image is done sooner than alone"


@pytest.mark.parametrize(
    ("wait_s", "retry_after"),
    [(59.0, None), (70.0, 11.0), (59.5, 1.0)],
)
def test_a_queue_beyond_its_bound_says_when_there_is_room(wait_s: float, retry_after: float | None) -> None:
    refused = refusal(1.0, wait_s=wait_s)
    assert (refused and refused.retry_after) == retry_after
    assert refused is None or isinstance(refused, QueueFullError)


def test_behind_others_a_request_needs_a_margin_before_its_deadline() -> None:
    assert refusal(10.0, wait_s=70.0, max_queue_s=1000.0) is None
    refused = refusal(10.0, wait_s=75.0, max_queue_s=1000.0)
    assert isinstance(refused, QueueFullError), "85 s are over 100 / 1.2"


def test_the_start_of_an_endpoint_does_not_count_as_queue() -> None:
    assert refusal(1.0, start_s=90.0, timeout_s=200.0, max_queue_s=10.0) is None
    assert refusal(1.0, start_s=90.0, wait_s=95.0, timeout_s=200.0, max_queue_s=10.0) is None
    assert refusal(1.0, start_s=90.0, wait_s=110.0, timeout_s=200.0, max_queue_s=10.0) is not None
