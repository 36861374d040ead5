"""What a fixed load makes the engine do, counted: test_counts.py compares it with counts.json.

    python -m tests.engine.counts        writes counts.json anew, to accept what it counts now

Nothing here depends on the processor or on time: row counts that a processor may allow in `exact` are taken
to be R alone, all pictures have one size, and no job waits long enough to be overdue.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mezzotint
from mezzotint.engine import Engine, Request
from mezzotint.engine.steps import runner
from mezzotint.engine.steps.exactness import Merging
from mezzotint.messages import Done
from tests.engine import tiny

TABLE = Path(__file__).with_name("counts.json")
LIVE_JOBS = (1, 16, 64)
ROWS = 4
STEPS = (2, 3, 5)
PROMPTS = ("a red fox", "two boats at dawn", "an old map", "one chair", "a house")
COPIES = ("cpu", "numpy", "tolist")
"""Methods of a tensor that wait for its device, beside those that read one number from it."""
_OWN = str(Path(mezzotint.__file__).parent)
_INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>")
"""Calls up to Python 3.11 alone."""

Counts = dict[str, float]


def count(num_jobs: int) -> Counts:
    """What `num_jobs` jobs that arrive together make an engine do, from their arrival to their pictures."""
    pipe = tiny.build("flux")
    found: Counter[str] = Counter()
    for name, attribute, what in (
        ("text_encoder", "forward", "text_forwards"),
        ("text_encoder_2", "forward", "text_forwards"),
        ("vae", "decode", "decodes"),
    ):
        module = getattr(pipe, name)
        setattr(module, attribute, _counting(getattr(module, attribute), found, what))
    with patch.object(runner, "exact_merging", lambda call, rows, adapted: Merging((rows,))):
        engine = Engine(pipe, rows=ROWS, max_rows=ROWS, max_jobs=num_jobs, max_wait_s=1e9)
        try:
            _draw(engine, [_request(number) for number in range(ROWS)])  # finds the Rules
            found.clear()
            before = _forwards(engine)
            requests = [_request(number, "again") for number in range(num_jobs)]
            with _calls(found):
                _draw(engine, requests)
            made = [now - then for now, then in zip(_forwards(engine), before, strict=True)]
            texts, decodes = found["text_forwards"], found["decodes"]
            with _synchronisations(found):
                _draw(engine, [_request(number, "once more") for number in range(num_jobs)])
        finally:
            engine.close()
    job_steps = sum(request.num_inference_steps for request in requests)
    return {
        "forwards": made[0],
        "rows": made[1],
        "padded_rows": made[2],
        "text_forwards": texts,
        "decodes": decodes,
        "synchronisations": found["synchronisations"],
        "python_calls_per_job_and_step": round(found["calls"] / job_steps, 1),
    }


def _request(number: int, word: str = "") -> Request:
    call = tiny.call("flux")
    del call["width"], call["height"]
    return Request(
        prompt=f"{PROMPTS[number % len(PROMPTS)]} {word}",
        num_inference_steps=STEPS[number % len(STEPS)],
        seed=number,
        width=32,
        height=32,
        extra=call,
    )


def _draw(engine: Engine, requests: list[Request]) -> None:
    for number, request in enumerate(requests):
        engine.submit(request, str(number))
    done = 0
    while engine.has_work:
        done += sum(isinstance(event, Done) for event in engine.step())
    assert done == len(requests)


def _forwards(engine: Engine) -> tuple[int, int, int]:
    made = engine.runner
    return made.num_forwards, made.num_real_rows, made.num_padded_rows


def _counting(method: Callable[..., Any], found: Counter[str], what: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def counting(*args: Any, **kwargs: Any) -> Any:
        found[what] += 1
        return method(*args, **kwargs)

    return counting


@contextmanager
def _calls(found: Counter[str]) -> Iterator[None]:
    """Counts the calls of our own functions."""

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_OWN) and code.co_name not in _INLINED:
            found["calls"] += 1

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


class _NumbersRead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts every number that leaves a tensor: item, bool, float and int of it."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._found["synchronisations"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _synchronisations(found: Counter[str]) -> Iterator[None]:
    """Counts what would wait for a device if there were one."""
    with _NumbersRead(found):
        usual = {name: getattr(torch.Tensor, name) for name in COPIES}
        for name, method in usual.items():
            setattr(torch.Tensor, name, _counting(method, found, "synchronisations"))
        try:
            yield
        finally:
            for name, method in usual.items():
                setattr(torch.Tensor, name, method)


def main() -> None:
    torch.set_num_threads(1)
    table = {str(num_jobs): count(num_jobs) for num_jobs in LIVE_JOBS}
    TABLE.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
