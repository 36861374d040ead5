"""Which classes of diffusers, of those that draw from words and from pictures, load, are right, and merge?

    python -m benchmarks.families [CLASS ...] [--dtype bf16] [--json FILE]

Every class is built from small random components, saved as a folder and loaded as an endpoint's model is.
Four requests that differ in prompt and its length, steps, guidance and seed are then drawn by plain
diffusers, by the engine one at a time, and by the engine together. The classes that take a picture, a picture
and a mask, or a ControlNet's picture are those that the engine itself makes over the same components. A class
that fails is a row, not the end. FILE keeps the rows of earlier runs that are not measured again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
import transformers

from mezzotint.engine import Engine, EngineSettings, Request
from mezzotint.engine.models import checks, controlnets, loading
from mezzotint.engine.results import Image, pixels, repainted
from mezzotint.errors import ModelLoadError
from mezzotint.families import family
from mezzotint.spec import InputPicture
from tests.engine import tiny
from tests.engine.tiny.controls import CONTROLS, control

Kind = Literal["text", "picture", "mask", "control"]
KINDS: tuple[Kind, ...] = ("text", "picture", "mask", "control")
ROWS = 4
PROMPTS = ("a red fox", "two boats at dawn on a quiet river", "big ocean", "one chair")
SETTINGS = EngineSettings(dtype="fp32", device="cpu", num_threads=1, performance="reference")
LONG = ("hidream", "hunyuan-image", "kandinsky5", "prx", *tiny.VISION_EDITORS)
"""Classes whose smallest picture takes many seconds: two requests each, from words where that is possible."""


@dataclass(slots=True)
class Row:
    """What was found of one class."""

    pipeline: str
    kind: Kind = "text"
    dtype: str = "fp32"
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
    """Why it does not load, is not right, or does not merge, or what must be equal to merge."""
    default_steps: int | None = None
    default_guidance: float | None = None
    guided_by: str | None = None
    """The pipeline argument, or the component, that `guidance_scale` feeds; None: it has no effect."""
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
        if not family(name).edits_only:
            found.append(name)
    return found


def _mapped() -> set[str]:
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as mapping  # slow

    return {pipeline.__name__ for pipeline in mapping.values()}


def requests(name: str, kind: Kind = "text") -> list[Request]:
    """Four requests that differ in prompt, steps, guidance and seed, and in what they bring along."""
    call = tiny.call(name)
    width, height = call.pop("width"), call.pop("height")
    steps = call.pop("num_inference_steps", None)
    found = [
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
    if kind == "text":
        return found
    by_itself = kind == "picture" and "strength" not in _sister_call(name)
    size = (64, 64) if by_itself else (width, height)  # small ones are too small for its vision model
    stripes = [_stripes(size, index) for index in range(len(found))]
    if kind == "control":
        return [replace(each, control_images=(one,)) for each, one in zip(found, stripes, strict=True)]
    half = InputPicture(width, height, (bytes(width // 2) + b"\xff" * (width - width // 2)) * height, 1)
    mask = half if kind == "mask" else None
    return [replace(each, images=(one,), mask=mask) for each, one in zip(found, stripes, strict=True)]


def _sister_call(name: str) -> Mapping[str, Any]:
    """The parameters of the class that draws from a picture."""
    cls = getattr(diffusers, tiny.EVERY[name].pipeline)
    parameters = inspect.signature(cls.__call__).parameters
    return parameters if "image" in parameters else {"strength": None}


def _stripes(size: tuple[int, int], seed: int) -> InputPicture:
    width, height = size
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    noise[:, : width // 2] += np.array([180, 20, 60])
    return InputPicture(width, height, noise.astype(np.uint8).tobytes())


def kinds(name: str) -> Iterator[tuple[Kind, str]]:
    """What a small pipeline can draw from, each with the class of diffusers that does it."""
    own = tiny.EVERY[name].pipeline
    if not family(own).edits_only:
        yield "text", own
        if name in LONG:
            return
    pipe = tiny.build(name)
    editing = Engine(pipe, rows=1).editing
    for kind in ("picture", "mask"):
        (asked, *_) = requests(name, kind)
        if editing.max_pictures and (kind == "picture" or editing.masks):
            yield kind, type(editing.profile(asked).pipe).__name__
    if name in CONTROLS:
        yield "control", controlnets.pipeline_class(pipe).__name__


def measure(
    name: str, dtype: str, num_requests: int = len(PROMPTS), *, kind: Kind = "text", pipeline: str = ""
) -> Row:
    """The row of one small pipeline of tests/engine/tiny."""
    began = time.perf_counter()
    row = Row(pipeline or tiny.EVERY[name].pipeline, kind, dtype)
    try:
        _measure(name, requests(name, kind)[:num_requests], row)
    except Exception as error:
        row.reason = row.reason or " ".join(f"{type(error).__name__}: {error}".split())[:300]
    row.seconds = round(time.perf_counter() - began, 1)
    return row


def _measure(name: str, wanted: Sequence[Request], row: Row) -> None:
    pipe = _loaded(name, row)
    nets = {"stripes": control(name, pipe.dtype)} if row.kind == "control" else {}
    engine = Engine(pipe, rows=1, controlnets=nets)
    row.denoiser = type(engine.profile.denoiser).__name__
    row.default_steps = engine.profile.default_steps
    row.default_guidance = engine.profile.default_guidance
    row.guided_by = engine.profile.guided_by
    expected = [_plain(engine, request) for request in wanted]
    alone = _pictures(engine, wanted, together=False)
    engine.close()
    row.alone = _same(alone, expected)

    engine = Engine(pipe, rows=ROWS, max_wait_s=0, controlnets=nets)  # always late: they take turns
    single = _pictures(engine, wanted, together=False)
    row.reason = row.reason or "; ".join(
        f"{name}: {each.reason}" for name, each in engine.findings.items() if each.reason
    )
    before = engine.runner.num_forwards
    together = _pictures(engine, wanted, together=True)
    after = engine.runner.num_forwards - before
    engine.close()
    row.exact = _same(single, together)
    row.saved = round(1 - after / before, 2) if before else 0.0
    row.merges = row.saved > 0

    engine = Engine(pipe, batching="fast", max_rows=8, controlnets=nets)
    fast = _pictures(engine, wanted, together=True)
    engine.close()
    row.fast_levels = max(
        int(np.abs(one.astype(int) - other.astype(int)).max())
        for one, other in zip(fast, expected, strict=True)
    )


def _loaded(name: str, row: Row) -> Any:
    """The pipeline from its folder; where diffusers cannot load its own, as it was built."""
    chosen = torch.bfloat16 if row.dtype == "bf16" else torch.float32
    settings = SETTINGS.model_copy(update={"dtype": row.dtype})
    try:
        with tempfile.TemporaryDirectory() as folder:
            pipe = loading.load(tiny.save(name, Path(folder), chosen), settings).pipe
    except ModelLoadError as error:
        row.reason = error.message.replace(folder, "the folder")[:300]
        return loading.load(tiny.build(name, chosen), settings).pipe
    row.loads = True
    return pipe


def _plain(engine: Engine, request: Request) -> Image:
    """What diffusers itself makes of a request, with the arguments that the engine would hand over."""
    profile = engine.editing.profile(request)
    request, _ = engine.editing.filled(request)
    arguments, _ = profile.call_arguments(request)
    generator = torch.Generator().manual_seed(request.seed or 0)
    torch.manual_seed(request.seed or 0)
    made = profile.pipe_for(request)(generator=generator, **arguments)  # no job: a tap runs as always
    return _under_each_other([repainted(layer, request) for layer in pixels(made)])


def _pictures(engine: Engine, wanted: Sequence[Request], *, together: bool) -> list[Image]:
    groups = [list(wanted)] if together else [[request] for request in wanted]
    found = []
    for group in groups:
        for result in engine.generate(group):
            if result.error is not None:
                raise result.error
            assert result.image is not None, "a result without an error has a picture"
            found.append(_under_each_other(result.layers or [result.image]))
    return found


def _under_each_other(layers: Sequence[Image]) -> Image:
    """The layers of a picture as one; usually there is one."""
    together: Image = np.concatenate(layers)
    return together


def _same(some: Sequence[Image], others: Sequence[Image]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


def show(row: Row) -> str:
    """One line of the table."""
    marks = " ".join("yes" if each else " no" for each in (row.loads, row.alone, row.exact, row.merges))
    levels = "-" if row.fast_levels is None else row.fast_levels
    words = f"{row.pipeline:34s} {row.kind:7s} {marks} {levels!s:>4s} {row.saved:5.0%} {row.seconds:5.1f} s"
    return f"{words}  {row.reason}"


def rows(dtype: str, wanted: Sequence[str]) -> Iterator[Row]:
    """A row for each class, or for those in `wanted`; the quick ones first."""
    by_class = {each.pipeline: name for name, each in reversed(tiny.EVERY.items())}
    for pipeline in classes():
        if pipeline not in by_class and (not wanted or pipeline in wanted):
            yield Row(pipeline, dtype=dtype, reason="no small components are made for it")
    for name in sorted(by_class.values(), key=lambda each: each in LONG):
        for kind, pipeline in kinds(name):
            if not wanted or pipeline in wanted:
                num = 2 if name in LONG else len(PROMPTS)
                yield measure(name, dtype, num, kind=kind, pipeline=pipeline)


def keep(file: Path, row: Row) -> None:
    """Puts a row into the file, in place of an earlier one of its class."""
    known = json.loads(file.read_text()) if file.exists() else []
    place = (row.kind, row.pipeline, row.dtype)
    known = [each for each in known if (each["kind"], each["pipeline"], each["dtype"]) != place]
    known.append(asdict(row))
    known.sort(key=lambda each: (KINDS.index(each["kind"]), each["pipeline"], each["dtype"] != "fp32"))
    file.write_text(json.dumps(known, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", metavar="CLASS")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
    found = []
    print(f"{'class':34s} kind    loads alone exact merges, levels in fast, forwards saved")
    for row in rows(options.dtype, options.classes):
        found.append(row)
        print(show(row), flush=True)
        if options.json:
            keep(options.json, row)
    for kind in KINDS:
        of_kind = [row for row in found if row.kind == kind]
        marks = ("loads", "alone", "exact", "merges")
        totals = ", ".join(f"{sum(getattr(row, mark) for row in of_kind)} {mark}" for mark in marks)
        print(f"{kind}: {len(of_kind)} classes: {totals}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
