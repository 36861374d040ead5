"""What `exact` keeps on a processor of another kind, for test_processors.py.

    python -m tests.engine.processors

oneDNN takes the kernels of an older processor where the environment says so before torch is imported.
"""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import torch

from benchmarks import families
from mezzotint.engine import Engine, EngineSettings, Request
from mezzotint.server.work.adapters import built_in_adapters
from mezzotint.spec import AdapterUse

ROUTES = ("", "flat", "mono", "noto")
PROMPTS = ("a red apple", "a cat", "a rocket on a teal background", "an owl")
ROWS = 8
FAMILIES = ("kolors", "stable-diffusion-xl", "flux", "z-image")


def requests(number: int) -> list[Request]:
    """Requests of all adapters and of none, mixed."""
    chance = random.Random(4)
    return [
        Request(
            prompt=chance.choice(PROMPTS),
            num_inference_steps=chance.randint(1, 3),
            guidance_scale=chance.choice((1.0, 2.5, 4.0, 8.0)),
            seed=chance.randrange(2**32),
            width=128,
            height=128,
            adapters=(AdapterUse(route),) if route else (),
        )
        for route in (ROUTES[index % len(ROUTES)] for index in range(number))
    ]


def differing(number: int) -> list[int]:
    """Which of the requests to the built-in model have other bytes among others than alone, in bf16."""
    engine = Engine.load("emoji", EngineSettings(dtype="bf16", device="cpu", num_threads=1), rows=ROWS)
    bank = engine.enable_adapters()
    for each in built_in_adapters("emoji"):
        bank.add(each.route, each.source)
    wanted = requests(number)
    alone = [engine.generate([request])[0] for request in wanted]
    before = engine.runner.num_forwards
    together = engine.generate(wanted)
    merged = engine.runner.num_forwards - before < sum(each.num_inference_steps for each in wanted) / 2
    assert merged, "otherwise this would show nothing"
    for result in (*alone, *together):
        if result.error is not None:
            raise result.error
    pairs = zip(alone, together, strict=True)
    return [
        at
        for at, (one, other) in enumerate(pairs)
        if one.image is None or other.image is None or not np.array_equal(one.image, other.image)
    ]


def main() -> None:
    torch.set_num_threads(1)
    rows = [families.measure(name, "bf16", num_requests=3) for name in FAMILIES]
    wrong = [row.pipeline for row in rows if not (row.exact and row.merges)]
    sys.stdout.write(json.dumps({"differing": differing(48), "wrong": wrong}) + "\n")


if __name__ == "__main__":
    main()
