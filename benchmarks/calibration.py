"""What other programs on the machine do to a first start: R, step seconds, the time to calibrate, estimates.

    python -m benchmarks.calibration [--model SOURCE] [--threads N] [--loops N] [--starts N] [--requests N]

Loads the model a few times on the machine as it is, then as often beside busy loops. The figures of the two
should agree; where they do not, the calibration should say that it is uncertain. Then a server starts for
the first time beside the loops and gets requests, one after the other: how long each would take by the
server's first word on it, against how long it took.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.serving import mezzotint_server, report
from mezzotint.client import Client, Progress
from mezzotint.engine import Engine, EngineSettings
from mezzotint.messages import MEASURING


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """`count` processes that compute all the time."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def first_start(model: str, threads: int) -> dict[str, float]:
    """What a first start measures: R, the seconds of a step, how uncertain they are, and how long it took."""
    start = time.perf_counter()
    began: list[float] = []
    engine = Engine.load(
        model,
        EngineSettings(num_threads=threads),
        progress=lambda stage, _: began.append(time.perf_counter()) if stage == MEASURING else None,
    )
    end = time.perf_counter()
    info = engine.info()
    engine.close()
    return {
        "rows": info.rows,
        "step_ms": info.step_s * 1e3,
        "uncertainty": max(each["uncertainty"] for each in info.calibration),
        "calibrate_s": end - began[0],
        "load_s": began[0] - start,
    }


def estimates(model: str, threads: int, requests: int) -> list[float]:
    """Of each request to a server that has never started before: seconds said, over seconds taken."""
    ratios = []
    with (
        mezzotint_server(model, num_threads=threads) as running,
        Client(base_url=running.url, timeout=600) as client,
    ):
        for seed in range(requests):
            said = None
            for event in client.images.stream(
                model="emoji", prompt="a red apple", num_inference_steps=20, seed=seed
            ):
                if isinstance(event, Progress) and said is None and event.seconds_left is not None:
                    said, began = event.seconds_left, time.perf_counter()
            assert said is not None
            ratios.append(said / (time.perf_counter() - began))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--loops", type=int, default=4)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--requests", type=int, default=10)
    a = parser.parse_args()
    facts: dict[str, Any] = {}
    for name, loops in (("quiet", 0), ("busy", a.loops)):
        with busy_loops(loops):
            facts[name] = [first_start(a.model, a.threads) for _ in range(a.starts)]
    rows = [
        (f"{name} {figure}", ", ".join(f"{start[figure]:.3g}" for start in starts))
        for name, starts in facts.items()
        for figure in starts[0]
    ]
    medians = [statistics.median(start["step_ms"] for start in facts[name]) for name in ("busy", "quiet")]
    rows.append(("step busy / quiet", f"{medians[0] / medians[1]:.2f}"))
    with busy_loops(a.loops):
        facts["estimated / taken"] = estimates(a.model, a.threads, a.requests)
    rows.append(("estimated / taken", ", ".join(f"{ratio:.2f}" for ratio in facts["estimated / taken"])))
    report("calibration", rows, facts)


if __name__ == "__main__":
    main()
