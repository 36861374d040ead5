"""Every verdict of the restart policy, without a process and without a clock."""

from __future__ import annotations

import pytest

from mezzotint.messages import EXIT_PERMANENT
from mezzotint.server.workers.policy import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    STEADY_S,
    Exit,
    GiveUp,
    Restart,
    RestartPolicy,
)

KILLED = -9
USELESS = Exit(KILLED, ready_s=0.1, asked=True)
USEFUL = Exit(KILLED, ready_s=60, asked=True, delivered=True)
IDLE = Exit(KILLED, ready_s=STEADY_S)
AT_START = Exit(KILLED)
NOT_STARTED = Exit(started=False, failure="the process could not be started: too many open files")


def pauses(policy: RestartPolicy, *exits: Exit) -> list[float]:
    verdicts = [policy.on_exit(exit) for exit in exits]
    assert all(isinstance(verdict, Restart) for verdict in verdicts)
    return [verdict.pause_s for verdict in verdicts if isinstance(verdict, Restart)]


def test_the_first_restart_is_at_once_and_each_further_pause_is_twice_as_long() -> None:
    found = pauses(RestartPolicy(20), *[AT_START] * 12)
    assert found[:4] == [0.0, FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert found[-1] == LONGEST_PAUSE_S


@pytest.mark.parametrize(
    "exit", [AT_START, USELESS, Exit(1, failure="out of memory"), Exit(KILLED, ready_s=1)]
)
def test_a_crash_loop_is_given_up_after_max_restarts_and_says_why(exit: Exit) -> None:
    policy = RestartPolicy(2)
    assert pauses(policy, exit, exit) == [0.0, FIRST_PAUSE_S]
    verdict = policy.on_exit(exit)
    assert isinstance(verdict, GiveUp)
    assert verdict.reason.startswith("3 workers in a row died before they had made a picture")
    assert verdict.reason.endswith(exit.failure or "the worker process ended (signal SIGKILL)")


def test_without_restarts_allowed_the_first_useless_exit_is_the_last() -> None:
    assert isinstance(RestartPolicy(0).on_exit(USELESS), GiveUp)


@pytest.mark.parametrize("exit", [USEFUL, IDLE], ids=["made a picture", "stood ready unasked"])
def test_kills_from_outside_of_a_worker_that_was_of_use_never_fail_an_endpoint(exit: Exit) -> None:
    assert pauses(RestartPolicy(0), *[exit] * 100) == [0.0] * 100


def test_a_worker_that_was_of_use_ends_the_count() -> None:
    policy = RestartPolicy(1)
    assert pauses(policy, USELESS, USEFUL, USELESS, IDLE, USELESS) == [0.0] * 5
    assert isinstance(policy.on_exit(USELESS), GiveUp)


def test_a_worker_that_was_asked_and_made_nothing_was_of_no_use_however_long_it_stood() -> None:
    assert isinstance(RestartPolicy(0).on_exit(Exit(KILLED, ready_s=1e6, asked=True)), GiveUp)


@pytest.mark.parametrize(
    ("exit", "reason"),
    [
        (Exit(EXIT_PERMANENT, failure="no such model", permanent=True), "no such model"),
        (Exit(1, failure="no such model", permanent=True), "no such model"),
        (Exit(EXIT_PERMANENT), "the worker said that another start would fail again"),
    ],
)
def test_a_permanent_failure_is_given_up_at_once(exit: Exit, reason: str) -> None:
    assert RestartPolicy(100).on_exit(exit) == GiveUp(reason)


def test_the_permanent_exit_status_of_a_worker_that_was_ready_is_a_death_like_any_other() -> None:
    assert isinstance(RestartPolicy(1).on_exit(Exit(EXIT_PERMANENT, ready_s=1.0)), Restart)


def test_deaths_that_a_job_is_to_blame_for_are_not_counted() -> None:
    policy = RestartPolicy(1)
    assert isinstance(policy.on_exit(USELESS), Restart)
    assert isinstance(policy.on_exit(USELESS, forgiven=2), Restart), "this one and the one before it"
    assert policy.num_useless == 0


def test_more_forgiven_than_counted_earns_no_credit() -> None:
    policy = RestartPolicy(0)
    assert isinstance(policy.on_exit(USELESS, forgiven=5), Restart)
    assert isinstance(policy.on_exit(USELESS), GiveUp)


def test_a_process_that_cannot_be_started_is_tried_for_ever_and_counts_as_no_death() -> None:
    policy = RestartPolicy(0)
    found = pauses(policy, *[NOT_STARTED] * 100)
    assert found[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert found[-1] == LONGEST_PAUSE_S
    assert policy.on_exit(NOT_STARTED) == Restart(LONGEST_PAUSE_S, NOT_STARTED.failure)
    assert pauses(policy, USEFUL, NOT_STARTED) == [0.0, FIRST_PAUSE_S], (
        "a process that started ends that count"
    )


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exit status 0"),
        (3, "exit status 3"),
        (-11, "signal SIGSEGV"),
        (-250, "signal 250"),
        (None, "unknown"),
    ],
)
def test_a_reason_names_the_status_or_the_signal(code: int | None, text: str) -> None:
    assert text in Exit(code).reason
