from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.conftest import Fake

SHORT = ("--step-s", "0.1", "--picture-s", "0", "--steps", "10", "--n", "1", "--seconds", "60")


def test_the_fewest_workers_are_printed_with_what_they_cost(run: Run) -> None:
    done = run("plan", *SHORT, "--rate", "1.5", "--p95", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    last = found["tried"][-1]
    assert last["met"]
    assert last["latency_s"]["p95"] <= 3
    assert last["worker_hours"] == pytest.approx(last["mean_workers"] * last["seconds"] / 3600)
    assert found["lone_s"] == pytest.approx(1.0)
    table = run("plan", *SHORT, "--rate", "1.5", "--p95", "3")
    assert table.returncode == 0, table.stderr
    assert table.stdout.splitlines()[len(found["tried"])].split()[0] == str(last["max_workers"])
    assert "p95 within 3 s" in table.stdout


def test_an_objective_that_is_not_met_is_exit_status_1(run: Run) -> None:
    done = run("plan", *SHORT, "--rate", "3", "--workers", "1")
    assert done.returncode == 1
    assert done.stdout.splitlines()[1].endswith("no")
    done = run("plan", *SHORT, "--rate", "3", "--p95", "0.5", "--max-workers", "3")
    assert (done.returncode, "3 workers do not meet the objective" in done.stderr) == (2, True)


def test_a_scaling_policy_is_tried_as_it_would_run(run: Run) -> None:
    policy = ("--min-replicas", "1", "--max-replicas", "3", "--load-s", "2", "--scale-up-delay", "2")
    done = run("plan", *SHORT, "--rate", "1.5", *policy, "--done", "1", "--json")
    assert done.returncode == 0, done.stderr
    (tried,) = json.loads(done.stdout)["tried"]
    assert (tried["min_workers"], tried["max_workers"]) == (1, 3)
    assert tried["starts"] >= 1
    assert 1 < tried["mean_workers"] < 3


def test_without_times_those_of_the_running_endpoint_count(run: Run, fake: Fake) -> None:
    folder = ("--data-dir", str(fake.settings.data_dir))
    done = run("plan", "--rate", "1", "--seconds", "20", "--steps", "4", *folder, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    calibrated = found["speed"]["step_s"]["1"]
    assert 0 < calibrated < 1
    assert found["speed"]["picture_s"] == calibrated


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "say what arrives: one of --rate, --load and --trace"),
        (("--rate", "1", "--load", "1"), "say what arrives"),
        (("--rate", "1", "--step-s", "4:0.1"), "--step-s must be seconds above 0"),
        (("--rate", "1", "--step-s", "x"), "--step-s must be seconds above 0"),
        (("--rate", "1", "--step-s", "1", "--times", "a.json"), "give one"),
        (("--rate", "1", "--times", "none.json"), "--times none.json: cannot be read"),
        (("--rate", "1", "--step-s", "1", "--max-replicas", "2"), "give --load-s S"),
        (("--rate", "1", "--step-s", "1", "--min-replicas", "3", "--load-s", "1"), "raise max_replicas"),
        (("--rate", "1", "--step-s", "1", "--min-replicas", "1", "--workers", "2"), "--workers is fixed"),
        (("--rate", "0.001", "--step-s", "1", "--seconds", "1"), "no request arrives"),
    ],
)
def test_wrong_usage_is_a_sentence(run: Run, flags: tuple[str, ...], said: str) -> None:
    done = run("plan", *flags)
    assert done.returncode == 2
    assert said in done.stderr
    assert not Path("mezzotint-data").exists()
