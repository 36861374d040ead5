"""Every benchmark starts and reads its arguments; those that need no model run for a moment."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import benchmarks

SHARED = {"__init__", "clients", "serving"}
PROGRAMS = sorted(
    file.stem for file in Path(benchmarks.__file__).parent.glob("*.py") if file.stem not in SHARED
)
PAINTED = ["--model", "fake:step_s=0.002,size=128"]


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    monkeypatch.setattr(sys, "argv", [f"benchmarks.{name}", *arguments])
    status: int | None = importlib.import_module(f"benchmarks.{name}").main()
    return status


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_tells_its_arguments(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(name, ["--help"], monkeypatch)
    assert ended.value.code == 0
    assert f"benchmarks.{name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("identical", PAINTED),
        ("first_answer", PAINTED),
        ("fuzz", ["--examples", "50"]),
        ("fairness", [*PAINTED, "--queued", "40"]),
        ("plan", [*PAINTED, "--seconds", "1", "--loads", "0.5", "--rounds", "1"]),
        ("soak", ["--model", "fake:step_s=0.001,size=128", "--seconds", "4", "--clients", "4"]),
    ],
)
def test_a_benchmark_runs_on_workers_that_paint(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(name, arguments, monkeypatch)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["benchmark"] == name
    if name not in ("fairness", "plan"):  # which judge by time, and so not beside other tests
        assert status == 0, facts
