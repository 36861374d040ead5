"""One forward of the denoiser in every form, side by side: plain diffusers, `auto`, `max`, and OpenVINO.

    python -m benchmarks.forms [--model SOURCE] [--dtype bf16] [--threads N] [--rows 1 4 8 16] [--rounds N]

For each number of rows the forms run in turn, and medians and minima are told. `max` is compiled here, for
minutes, whether or not it wins. OpenVINO takes part where the package `openvino` is installed: the same
denoiser with static shapes, computing in the dtype of the others. With one thread on the CPU the thread's own
seconds count, so that a busy machine decides less.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.serving import report
from mezzotint.engine import Engine, EngineSettings
from mezzotint.engine.calibration import Stopwatch
from mezzotint.engine.compiling import Builder, Case, Whole
from mezzotint.engine.models import forms

Forward = Callable[[], Any]
HINTS = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
"""How OpenVINO names a dtype."""


def openvino_forward(builder: Builder, case: Case, dtype: str) -> Forward:
    """The denoiser compiled by OpenVINO from its weights in fp32, for the shapes of `case`."""
    import openvino  # an option: only who has it compares with it

    exact = copy.deepcopy(builder.denoiser).float()
    exact.__dict__.pop("forward", None)
    given = [each.clone().float() for each in forms.tensors(case.arguments)]
    whole = Whole(exact, forms.filled(case.arguments, iter(given)))
    with torch.no_grad():
        program = torch.export.export(whole, tuple(given), strict=False)
    hints = {"INFERENCE_PRECISION_HINT": HINTS[dtype], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(openvino.convert_model(program), "CPU", hints)
    request, values = compiled.create_infer_request(), [each.numpy() for each in given]
    return lambda: request.infer(values, share_inputs=True, share_outputs=True)


def forwards_of(builder: Builder, case: Case, dtype: str) -> dict[str, Forward]:
    """By form, the same forward."""
    found: dict[str, Forward] = {
        "diffusers": lambda: builder.loaded(**case.arguments),
        "auto": lambda: builder.loaded(**case.arguments),
    }
    takes = builder.compiled(case).package.takes
    found["max"] = lambda: builder.graphs[takes](case.arguments)
    if importlib.util.find_spec("openvino"):
        with builder.unpacked():
            found["openvino"] = openvino_forward(builder, case, dtype)
    return found


def seconds(
    builder: Builder, forwards: Mapping[str, Forward], stopwatch: Stopwatch, rounds: int
) -> dict[str, list[float]]:
    """By form, the seconds of every round but the first."""
    taken: dict[str, list[float]] = {name: [] for name in forwards}
    with torch.inference_mode():
        for index in range(rounds + 1):
            for name, forward in forwards.items():
                if name == "diffusers":
                    with builder.unpacked():
                        timing = stopwatch.time(forward)
                else:
                    timing = stopwatch.time(forward)
                if index:
                    taken[name].append(timing.wall_s if timing.cpu_s is None else timing.cpu_s)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--dtype", default="bf16", choices=HINTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    settings = EngineSettings(dtype=options.dtype, num_threads=options.threads, performance="auto")
    engine = Engine.load(options.model, settings, rows=max(options.rows))
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(engine, Path(folder), lambda text: None)
        call, stopwatch = builder.call(), Stopwatch(engine.device, engine.synchronize)
        for rows in options.rows:
            case = builder.merged(call, rows)
            taken = seconds(builder, forwards_of(builder, case, options.dtype), stopwatch, options.rounds)
            for name, values in taken.items():
                facts[f"{rows} rows, {name}: ms, median"] = 1e3 * statistics.median(values)
                facts[f"{rows} rows, {name}: ms, least"] = 1e3 * min(values)
    engine.close()
    report("forms", [(name, f"{value:.2f}") for name, value in facts.items()], facts)


if __name__ == "__main__":
    main()
