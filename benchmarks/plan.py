"""How far is `mezzotint plan` from a real run? The same requests at the same moments, one worker.

    python -m benchmarks.plan [--seconds 120] [--loads 0.4,0.6,0.8] [--rounds 3] [--model SOURCE]

It puts each load on a server with `mezzotint bench`. Then `mezzotint plan` predicts that run from the lone
times that bench measured just before it. Run it on a quiet machine: a program beside the server slows the run
and is not in the prediction. Exit status 1 where the median error of p50 or of p95 is over 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.serving import mezzotint_server, report

MAX_ERROR = 0.15
FIGURES = ("p50", "p95", "mean")
JUDGED = ("p50", "p95")
MIX = ("--steps", "4:60,28:30,50:10", "--n", "1:3,2:1,4:1")
DONE, NOT_MET = 0, 1


def command(*arguments: str) -> dict[str, Any]:
    """What a command of Mezzotint prints as JSON."""
    program = [sys.executable, "-m", "mezzotint", *arguments, "--json"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    if done.returncode not in (DONE, NOT_MET) or not done.stdout:
        sys.exit(f"mezzotint {arguments[0]} ended with status {done.returncode}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="of each run")
    parser.add_argument("--loads", default="0.4,0.6,0.8", help="lone seconds of requests a second")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each load, each with another seed")
    parser.add_argument("--model", default="emoji")
    asked = parser.parse_args()
    rows: list[tuple[str, str]] = []
    errors: dict[str, list[float]] = {name: [] for name in FIGURES}
    with mezzotint_server(asked.model) as running, tempfile.TemporaryDirectory() as folder:
        for seed in range(asked.rounds):
            for load in asked.loads.split(","):
                real, planned = _both(running.url, Path(folder) / "bench", float(load), seed, asked.seconds)
                for name in FIGURES:
                    error = planned[name] / real[name] - 1
                    errors[name].append(error)
                    text = f"{real[name]:.3f} s measured, {planned[name]:.3f} s planned, {error:+.0%}"
                    rows.append((f"load {load}, seed {seed}, {name}", text))
    found = {name: statistics.median(abs(each) for each in values) for name, values in errors.items()}
    rows += [(f"median error of {name}", f"{error:.1%}") for name, error in found.items()]
    report("plan", rows, {"median_error": found, "errors": errors, "cores": os.cpu_count()})
    return int(any(found[name] > MAX_ERROR for name in JUDGED))


def _both(url: str, out: Path, load: float, seed: int, seconds: float) -> tuple[Any, Any]:
    """The latencies of a real run, and those that were planned for it."""
    same = (*MIX, "--seed", str(seed), "--seconds", str(seconds))
    real = command("bench", "--url", url, "--load", str(load), "--out", str(out), *same)
    rate = str(real["asked"]["rate"])
    planned = command("plan", "--times", f"{out}.json", "--rate", rate, "--workers", "1", *same)
    return real["latency_s"], planned["tried"][0]["latency_s"]


if __name__ == "__main__":
    sys.exit(main())
