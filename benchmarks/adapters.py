"""What adapters cost: throughput with 64 of them against none, adding one, switching between them.

    python -m benchmarks.adapters [--model SOURCE] [--dtype bf16] [--threads N] [--rounds N]

One engine in this process, as a worker has it. The same 64 requests run without adapters, all with one
adapter, and each with one of 64 drawn at random, in turns; ratios are of processor time within a round, so
that a busy machine does not decide. Adapters are random matrices of rank 16 on attention and feed-forward.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.serving import SIZE, report
from mezzotint.engine import AdapterUse, Engine, EngineSettings, Request

NUM_ADAPTERS = 64
NUM_REQUESTS = 64
RANK = 16
TARGETS = re.compile(r"attn\.(to_|add_)|ff(_context)?\.net\.|proj_mlp$|single.*proj_out$")
PROMPTS = ("a red apple", "a happy cat", "a rocket", "a snail", "a pizza")


def write_adapters(model: torch.nn.Module, folder: Path) -> list[Path]:
    """NUM_ADAPTERS random adapters as files."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and TARGETS.search(name)
    }
    files = []
    for number in range(NUM_ADAPTERS):
        state = {}
        for name, layer in layers.items():
            state[f"transformer.{name}.lora_A.weight"] = (
                torch.randn(RANK, layer.in_features).bfloat16() * 0.02
            )
            state[f"transformer.{name}.lora_B.weight"] = (
                torch.randn(layer.out_features, RANK).bfloat16() * 0.02
            )
        files.append(folder / f"{number}.safetensors")
        save_file(state, files[-1])
    return files


def requests(routes: Sequence[str | None]) -> list[Request]:
    """The load, each request with its route."""
    return [
        Request(
            prompt=PROMPTS[index % len(PROMPTS)],
            num_inference_steps=(4, 8, 8, 20)[index % 4],
            guidance_scale=3.5,
            seed=index,
            width=SIZE,
            height=SIZE,
            adapters=(AdapterUse(route),) if route else (),
        )
        for index, route in enumerate(routes)
    ]


def cpu_seconds(engine: Engine, load: list[Request]) -> float:
    start = time.process_time()
    for result in engine.generate(load):
        assert result.error is None, result.error
    return time.process_time() - start


def add_times(engine: Engine, files: list[Path]) -> tuple[float, float]:
    """Median milliseconds of adding an adapter, and of reading its file alone."""
    reads, adds = [], []
    for number, file in enumerate(files):
        start = time.process_time()
        file.read_bytes()
        reads.append(time.process_time() - start)
        start = time.process_time()
        engine.enable_adapters().add(str(number), file)
        adds.append(time.process_time() - start)
    return statistics.median(adds) * 1e3, statistics.median(reads) * 1e3


def load_times(engine: Engine) -> float:
    """Median milliseconds of making a cold adapter resident; all are afterwards if the budget allows."""
    times = []
    for number in range(NUM_ADAPTERS):
        lease = engine.enable_adapters().acquire(str(number))
        assert lease is not None
        times.append(lease.load_s)
        lease.release()
    return statistics.median(times) * 1e3


def measure(engine: Engine, folder: Path, rounds: int) -> dict[str, Any]:
    model = getattr(engine.pipe, engine.profile.denoiser_name)
    add_ms, read_ms = add_times(engine, write_adapters(model, folder))
    cold_ms = load_times(engine)
    chance = random.Random(0)
    times: dict[str, list[float]] = {"none": [], "one": [], "64": []}
    for _ in range(rounds + 1):
        drawn = [str(chance.randrange(NUM_ADAPTERS)) for _ in range(NUM_REQUESTS)]
        times["none"].append(cpu_seconds(engine, requests([None] * NUM_REQUESTS)))
        times["one"].append(cpu_seconds(engine, requests(["0"] * NUM_REQUESTS)))
        times["64"].append(cpu_seconds(engine, requests(drawn)))
    for seconds in times.values():
        del seconds[0]  # the warm-up
    stats = engine.enable_adapters().stats()
    return {
        "rows": engine.runner.num_rows,
        "none_s": statistics.median(times["none"]),
        "throughput_with_64": _ratio(times["none"], times["64"]),
        "throughput_with_one": _ratio(times["none"], times["one"]),
        "switching (64 over one)": _ratio(times["one"], times["64"]),
        "add_ms": add_ms,
        "read_ms": read_ms,
        "cold_load_ms": cold_ms,
        "resident_bytes": stats.num_bytes,
        "loads": stats.loads,
        "hits": stats.hits,
        "evictions": stats.evictions,
    }


def _ratio(base: Sequence[float], other: Sequence[float]) -> float:
    """The median of base over other within each round: throughput of `other` relative to `base`."""
    return statistics.median(one / two for one, two in zip(base, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    torch.manual_seed(0)
    engine = Engine.load(a.model, EngineSettings(dtype=a.dtype, num_threads=a.threads))
    with tempfile.TemporaryDirectory() as folder:
        facts = measure(engine, Path(folder), a.rounds)
    rows = [
        (name, f"{value:.3f}" if isinstance(value, float) else str(value)) for name, value in facts.items()
    ]
    report("adapters", rows, facts)
    engine.close()


if __name__ == "__main__":
    main()
