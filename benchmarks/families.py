"""Which text-to-image classes of diffusers load, are right, and merge?

    python -m benchmarks.families [CLASS ...] [--dtype bf16] [--json FILE]

Every class is built from small random components, saved as a folder and loaded as an endpoint's model is.
Four requests that differ in prompt, steps, guidance and seed are then drawn by plain diffusers, by the
engine one at a time, and by the engine together. A class that fails is a row, not the end.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from mezzotint.engine import Engine, EngineSettings, Request
from mezzotint.engine.models import checks, loading
from mezzotint.engine.results import Image, pixels
from mezzotint.errors import ModelLoadError
from tests.engine import tiny

ROWS = 4
PROMPTS = ("a red fox", "two boats at dawn on a quiet river", "big ocean", "one chair")
SETTINGS = EngineSettings(dtype="fp32", device="cpu", num_threads=1, performance="reference")


@dataclass(slots=True)
class Row:
    """What was found of one class."""

    pipeline: str
    denoiser: str = ""
    loads: bool = False
    alone: bool = False
    """Whether a job alone has the bytes of plain diffusers."""
    exact: bool = False
    """Whether a job among others has the bytes that it has alone, in `exact` with four rows."""
    fast_levels: int | None = None
    """Largest difference of a merged picture in `fast` to plain diffusers, of 255."""
    saved: float = 0.0
    """Share of the denoiser's forwards that four jobs together save against four alone."""
    merges: bool = False
    reason: str = ""
    """Why it does not load, is not right, or does not merge."""
    seconds: float = 0.0


def classes() -> list[str]:
    """The classes of diffusers that make a picture from text, those that it calls deprecated aside."""
    known = _mapped()
    found = []
    for name in sorted(dir(diffusers)):
        pipeline = getattr(diffusers, name, None)
        if not inspect.isclass(pipeline) or not issubclass(pipeline, diffusers.DiffusionPipeline):
            continue
        if ".deprecated." in pipeline.__module__ and name not in known:
            continue
        try:
            checks.check_text_to_image(pipeline)
        except ModelLoadError:
            continue
        found.append(name)
    return found


def _mapped() -> set[str]:
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as mapping  # slow

    return {pipeline.__name__ for pipeline in mapping.values()}


def requests(name: str) -> list[Request]:
    """Four requests that differ in prompt, steps, guidance and seed."""
    call = tiny.call(name)
    width, height = call.pop("width"), call.pop("height")
    steps = call.pop("num_inference_steps", None)
    return [
        Request(
            prompt=prompt,
            num_inference_steps=steps or 2 + index % 3,
            guidance_scale=None if "guidance_scale" in call else 3.0 + index,
            seed=index,
            width=width,
            height=height,
            extra=call,
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def measure(name: str, dtype: str, num_requests: int = len(PROMPTS)) -> Row:
    """The row of one small pipeline of tests/engine/tiny."""
    began = time.perf_counter()
    row = Row(tiny.EVERY[name].pipeline)
    try:
        _measure(name, dtype, requests(name)[:num_requests], row)
    except Exception as error:
        row.reason = row.reason or " ".join(f"{type(error).__name__}: {error}".split())[:300]
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def _measure(name: str, dtype: str, wanted: Sequence[Request], row: Row) -> None:
    pipe = _loaded(name, dtype, row)
    engine = Engine(pipe, rows=1)
    row.denoiser = type(engine.profile.denoiser).__name__
    expected = [_plain(engine, request) for request in wanted]
    alone = _pictures(engine, wanted, together=False)
    engine.close()
    row.alone = _same(alone, expected)

    engine = Engine(pipe, rows=ROWS, max_wait_s=0)  # jobs that are always late take turns at every step
    engine.find_rules(wanted[0])
    row.reason = row.reason or "; ".join(
        f"{name}: {each.reason}" for name, each in engine.findings.items() if each.reason
    )
    single = _pictures(engine, wanted, together=False)
    before = engine.runner.num_forwards
    together = _pictures(engine, wanted, together=True)
    after = engine.runner.num_forwards - before
    engine.close()
    row.exact = _same(single, together)
    row.saved = round(1 - after / before, 2) if before else 0.0
    row.merges = row.saved > 0

    engine = Engine(pipe, batching="fast", max_rows=8)
    engine.find_rules(wanted[0])
    fast = _pictures(engine, wanted, together=True)
    engine.close()
    row.fast_levels = max(
        int(np.abs(one.astype(int) - other.astype(int)).max())
        for one, other in zip(fast, expected, strict=True)
    )


def _loaded(name: str, dtype: str, row: Row) -> Any:
    """The pipeline from its folder; where diffusers cannot load its own, as it was built."""
    chosen = torch.bfloat16 if dtype == "bf16" else torch.float32
    settings = SETTINGS.model_copy(update={"dtype": dtype})
    try:
        with tempfile.TemporaryDirectory() as folder:
            pipe = loading.load(tiny.save(name, Path(folder), chosen), settings).pipe
    except ModelLoadError as error:
        row.reason = error.message[:300]
        return loading.load(tiny.build(name, chosen), settings).pipe
    row.loads = True
    return pipe


def _plain(engine: Engine, request: Request) -> Image:
    """What diffusers itself makes of a request, with the arguments that the engine would hand over."""
    arguments, _ = engine.profile.call_arguments(request)
    generator = torch.Generator().manual_seed(request.seed or 0)
    torch.manual_seed(request.seed or 0)
    tap_free = engine.pipe  # outside a job a tap runs the module as always
    return pixels(tap_free(generator=generator, **arguments))[0]


def _pictures(engine: Engine, wanted: Sequence[Request], *, together: bool) -> list[Image]:
    groups = [list(wanted)] if together else [[request] for request in wanted]
    found = []
    for group in groups:
        for result in engine.generate(group):
            if result.error is not None:
                raise result.error
            assert result.image is not None, "a result without an error has a picture"
            found.append(result.image)
    return found


def _same(some: Sequence[Image], others: Sequence[Image]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


def show(row: Row) -> str:
    """One line of the table."""
    marks = " ".join("yes" if each else " no" for each in (row.loads, row.alone, row.exact, row.merges))
    levels = "-" if row.fast_levels is None else row.fast_levels
    return f"{row.pipeline:32s} {marks} {levels!s:>4s} {row.saved:5.0%} {row.seconds:5.1f} s  {row.reason}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", metavar="CLASS")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
    by_class = {each.pipeline: name for name, each in reversed(tiny.EVERY.items())}
    rows = []
    print(f"{'class':32s} loads alone exact merges, levels in fast, forwards saved")
    for pipeline in options.classes or classes():
        if pipeline in by_class:
            row = measure(by_class[pipeline], options.dtype)
        else:
            row = Row(pipeline, reason="no small components are made for it")
        rows.append(row)
        print(show(row), flush=True)
    totals = {mark: sum(getattr(row, mark) for row in rows) for mark in ("loads", "alone", "exact", "merges")}
    print(f"{len(rows)} classes: " + ", ".join(f"{count} {mark}" for mark, count in totals.items()))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
