"""What does an edit cost: over HTTP, and in memory?

    python -m benchmarks.edits [--model SOURCE] [--threads N] [--dtype bf16|fp32] [--steps N] [--rounds N]

Edits over HTTP and plain calls of diffusers' image-to-image class in this process take turns, same threads
and dtype. The worker's memory is read after as many generations, before its first edit, and again at the end.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import statistics
import time
from typing import Any

import diffusers
import httpx2
import psutil
import torch
from PIL import Image

from benchmarks.baseline_server import load, text_length
from benchmarks.serving import BUILT_IN, SIZE, body, mezzotint_server, report

WARM_ROUNDS = 3
STRENGTH = 0.6
TIMEOUT_S = 120.0


def apple() -> Image.Image:
    """A red square on white."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    image.paste("red", (SIZE // 4, SIZE // 4, 3 * SIZE // 4, 3 * SIZE // 4))
    return image


def text_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def seconds_of(client: httpx2.Client, path: str, fields: dict[str, Any]) -> float:
    """How long one request takes."""
    began = time.perf_counter()
    answer = client.post(path, json=fields)
    seconds = time.perf_counter() - began
    if answer.status_code != 200:
        raise SystemExit(f"a request failed with status {answer.status_code}: {answer.text}")
    return seconds


def measure(
    client: httpx2.Client, worker: psutil.Process, pipe: Any, steps: int, rounds: int
) -> tuple[list[float], list[float], int, int]:
    """Seconds over HTTP and in process, and the worker's bytes before the first edit and at the end."""
    for seed in range(WARM_ROUNDS + rounds):
        seconds_of(client, "/dedicated/v1/images/generations", body("a green apple", steps, seed))
    before = int(worker.memory_full_info().uss)
    served, plain, image = [], [], apple()
    for seed in range(WARM_ROUNDS + rounds):
        fields = body("a green apple", steps, seed) | {"image": {"image": text_of(image)}}
        served.append(seconds_of(client, "/dedicated/v1/images/edits", fields | {"strength": STRENGTH}))
        began = time.perf_counter()
        pipe(
            prompt="a green apple",
            image=image,
            strength=STRENGTH,
            num_inference_steps=steps,
            width=SIZE,
            height=SIZE,
            **text_length(pipe),
            generator=torch.Generator().manual_seed(seed),
        )
        plain.append(time.perf_counter() - began)
    after = int(worker.memory_full_info().uss)
    return served[WARM_ROUNDS:], plain[WARM_ROUNDS:], before, after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BUILT_IN))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    base = load(arguments.model, arguments.dtype)
    cls = getattr(diffusers, type(base).__name__.replace("Pipeline", "Img2ImgPipeline"))
    pipe = cls.from_pipe(base, dtype=base.dtype)
    pipe.set_progress_bar_config(disable=True)
    with (
        mezzotint_server(
            arguments.model, num_threads=arguments.threads, endpoint={"dtype": arguments.dtype}
        ) as server,
        httpx2.Client(base_url=server.url, timeout=TIMEOUT_S) as client,
    ):
        (worker,) = server.workers()
        served, plain, before, after = measure(client, worker, pipe, arguments.steps, arguments.rounds)
    milliseconds = {
        f"{name}_{kind}_ms": round(of(seconds) * 1e3, 1)
        for name, seconds in (("http", served), ("plain", plain))
        for kind, of in (("least", min), ("median", statistics.median))
    }
    longer = {
        kind: round((milliseconds[f"http_{kind}_ms"] / milliseconds[f"plain_{kind}_ms"] - 1) * 100, 1)
        for kind in ("least", "median")
    }
    grown = round((after / before - 1) * 100, 2)
    rows = [
        (
            "over HTTP, ms: least, median",
            f"{milliseconds['http_least_ms']}, {milliseconds['http_median_ms']}",
        ),
        ("plain diffusers, ms", f"{milliseconds['plain_least_ms']}, {milliseconds['plain_median_ms']}"),
        ("longer by", f"{longer['least']} %, {longer['median']} %"),
        ("worker's memory before the first edit, MiB", f"{before / 2**20:.0f}"),
        ("grown by", f"{grown} %"),
    ]
    report("edits", rows, milliseconds | {"longer_percent": longer, "grown_percent": grown})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
