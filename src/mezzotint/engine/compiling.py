"""Builds the compiled form of an endpoint's denoiser, and decides whether it is used: a program of its own.

It runs at the lowest priority beside a worker that serves meanwhile, or for `mezzotint endpoints warm`.
One build at a time runs on a machine. What it finds is kept (models/forms.py) and used from the next start of
the endpoint on, for kernels differ in last bits. Its input is the LoadModel of the worker; it ends early when
its input ends.

The compiled form is used where it is within TOLERANCE of the denoiser as it is in plain diffusers, keeps the
promise of `exact`, and is faster: by the median of interleaved rounds, in most of them.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import logging
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.engine.calibration import Stopwatch
from mezzotint.engine.engine import Engine
from mezzotint.engine.models import forms, host
from mezzotint.engine.models.loading import TOLERANCE
from mezzotint.engine.steps.batching import Call, Part, merge
from mezzotint.engine.steps.exactness import ROW_COUNTS, exact_row_counts
from mezzotint.engine.steps.rules import tap_all
from mezzotint.engine.steps.runner import is_out_of_memory
from mezzotint.engine.trial import first_call, trial_request
from mezzotint.errors import MezzotintError
from mezzotint.messages import LoadModel, decode, encode

MIN_GAIN = 1.03
"""How many times as fast a compiled form must be; less is not worth other last bits."""
MAX_LOSS = 0.97
"""In `exact`, where all row counts change together: what the slowest of them may come to."""
MIN_WINS = 0.75
"""The share of rounds in which it must be faster."""
ROUNDS, MIN_ROUNDS, MAX_S = 21, 5, 60.0
"""Of measuring one row count: how often, and when slow models are measured less often."""
COPIES = 6
"""Copies of the denoiser that a build may take for a moment."""
OFF_BY = 1e-4
"""Largest difference from plain diffusers in one forward in fp32, root mean square over root mean square."""
TIMES_OFF = 2.0
"""In bf16 and fp16: how many times as far from the forward in fp32 as plain diffusers is."""
OPTIONS = {"freezing": True, "emulate_precision_casts": True, "compile_threads": 1}
"""Of Inductor: weights are constants, which oneDNN packs and fuses kernels around; values are rounded where
plain diffusers rounds them; one thread compiles."""
NICENESS = 19
BESIDE = "--beside-a-worker"
"""The argument of a build that must not take time from anyone."""
PROGRAM = (sys.executable, "-m", "mezzotint.engine.compiling", BESIDE)

Say = Callable[[str], None]
_log = logging.getLogger(__name__)


class NotCompiled(Exception):
    """Why this model, in this form, is not compiled, in words that complete `as loaded: `."""


@dataclass(frozen=True, slots=True)
class Case:
    """The denoiser's arguments with one number of rows, as its forwards have them."""

    rows: int
    arguments: Mapping[str, Any]


def main() -> int:
    """Builds for the LoadModel on standard input, and tells of its progress on standard output.

    Exit status 0: there is a record now. 1: there is none, and another try may succeed.
    """
    length = int.from_bytes(sys.stdin.buffer.read(8), "big")
    message = decode(sys.stdin.buffer.read(length))
    assert isinstance(message, LoadModel), "a worker's first message"
    threading.Thread(target=_end_with_input, daemon=True).start()
    if BESIDE in sys.argv:
        os.nice(NICENESS)
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    warnings.simplefilter("ignore")  # the compiler has many of its own

    def say(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    try:
        with _alone():
            record = build(message, say)
    except MezzotintError as error:
        say(error.message)
        return 1
    say(record.text)
    return 0


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):  # not `sys.stdin`, whose lock would be held at the end
        pass
    os._exit(1)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Waits until no other build runs for this user."""
    folder = forms.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(message: LoadModel, say: Say) -> forms.Record:
    """The record for the endpoint of this message; made now unless there is one."""
    settings = message.settings
    engine = Engine.load(
        message.source, settings, rows=message.rows, proof=message.proof, form=forms.AS_LOADED
    )
    assert engine.loaded is not None, "it has just been loaded"
    folder = engine.loaded.forms.folder
    if folder is None:
        return forms.Record(engine.loaded.forms.text)
    record = forms.read(folder)
    if record is None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch
            try:
                record = Builder(engine, folder, say).record()
            except NotCompiled as error:
                record = forms.Record(f"as loaded: {error}")
        _tidy(folder, record)
        forms.write(folder, record)
    engine.close()
    return record


def _tidy(folder: Path, record: forms.Record) -> None:
    """Removes the packages that are not used."""
    kept = {package.file for package in record.packages}
    for path in folder.iterdir():
        if path.name not in kept and path.name != forms.RECORD:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Builder:
    """Compiles the denoiser of an engine for its endpoint's own request, and compares."""

    def __init__(self, engine: Engine, folder: Path, say: Say) -> None:
        self._engine = engine
        self._folder = folder
        self._say = say
        self.denoiser: torch.nn.Module = engine.profile.denoiser
        self._dtype = next(self.denoiser.parameters()).dtype
        self.loaded: Callable[..., Any] = self._untapped()
        """The denoiser's forward as loaded."""
        self.graphs: dict[Any, forms.Graph] = {}
        """The compiled forwards in place; filled by `compiled`."""
        forms.install(self.denoiser, self.graphs)
        engine.taps[:] = tap_all(engine.pipe, engine.editing.controlnets)
        engine.take_findings(engine.findings)

    def _untapped(self) -> Callable[..., Any]:
        for tap in reversed(self._engine.taps):
            tap.close()
        forward: Callable[..., Any] = self.denoiser.forward
        return forward

    def record(self) -> forms.Record:
        """What is decided; NotCompiled where nothing can be used."""
        runner, call = self._engine.runner, self.call()
        measured = [self.compiled(case) for case in self._cases(call)]
        with torch.inference_mode():
            self._check_picture()
            if runner.mode == "exact" and runner.num_rows > 1 and call.key is not None:
                measured = self._of_exact_counts(call, measured)
        packages = [each.package for each in measured]
        if runner.mode != "exact":
            packages = [each for each in packages if each.gain >= MIN_GAIN]
        elif not _wins([each.gain for each in packages]):
            packages = []
        if not packages:
            tried = forms.packages_words([each.package for each in measured])
            raise NotCompiled(f"compiled was no faster ({tried})")
        return forms.Record(f"compiled for {forms.packages_words(packages)}", tuple(packages))

    def call(self) -> Call:
        """The denoiser's first forward for the endpoint's own request."""
        profile = self._engine.profile
        with torch.inference_mode():
            call = first_call(profile, self._engine.attention, trial_request(profile)).call
        if call is None:
            raise NotCompiled("its pipeline does not reach the denoiser")
        return call

    def _cases(self, call: Call) -> list[Case]:
        """The denoiser's forwards for the endpoint's own request, by ascending rows."""
        runner = self._engine.runner
        own = Case(call.rows, dict(zip(call.parameters, call.args, strict=False)) | call.kwargs)
        if call.key is None or runner.num_rows == 1:
            return [own]
        most = runner.num_rows
        if runner.mode == "exact":  # every forward is merged, the smallest ones too
            counts = [*(count for count in ROW_COUNTS if call.rows <= count < most), most]
            return [self.merged(call, count) for count in counts]
        return [own, *(self.merged(call, count) for count in ROW_COUNTS if call.rows < count <= most)]

    def merged(self, call: Call, rows: int) -> Case:
        """Such a forward with so many rows."""
        return Case(rows, merge([Part(call, 0, min(call.rows, rows))], rows))

    def compiled(self, case: Case) -> Measured:
        """Compiles one case, checks what it computes, puts it in place and measures it."""
        rows = f"{case.rows} row{'s' if case.rows > 1 else ''}"
        self._say(f"compiling for {rows}")
        file = self._folder / f"{case.rows}.pt2"
        copies = [each.clone() for each in forms.tensors(case.arguments)]
        arguments = forms.filled(case.arguments, iter(copies))
        try:
            self._compile(arguments, file)
            graph = forms.load(file)
            with torch.inference_mode():
                self._check(graph, arguments)
                loaded_s, compiled_s, gain = self._measured(graph, arguments)
        except (NotCompiled, OSError):
            raise
        except Exception as error:  # whatever torch makes of a model that it cannot compile
            if is_out_of_memory(error):
                raise
            _log.info("compiling failed", exc_info=error)
            reason = " ".join(str(error).split())[:300]
            raise NotCompiled(f"compiling for {rows} failed: {type(error).__name__}: {reason}") from error
        self._say(f"{rows}: {gain:.2f} times as fast as loaded")
        takes = forms.described(arguments)
        self.graphs[takes] = graph
        return Measured(forms.Package(case.rows, file.name, takes, round(gain, 3)), loaded_s, compiled_s)

    def _compile(self, arguments: Mapping[str, Any], file: Path) -> None:
        whole = Whole(self.denoiser, arguments)
        with torch.no_grad(), self.unpacked():
            program = torch.export.export(whole, tuple(forms.tensors(arguments)), strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(file), inductor_configs=dict(OPTIONS)
            )

    @contextlib.contextmanager
    def unpacked(self) -> Iterator[None]:
        """The denoiser's layers as they are in plain diffusers."""
        inner = [each for each in self.denoiser.modules() if each is not self.denoiser]
        taken = [(each, each.__dict__.pop("forward")) for each in inner if "forward" in each.__dict__]
        try:
            yield
        finally:
            for each, forward in taken:
                each.__dict__["forward"] = forward

    def _check(self, graph: forms.Graph, arguments: Mapping[str, Any]) -> None:
        """NotCompiled where a forward is further from plain diffusers than rounding explains.

        How far rounding leads depends on the model: in bf16 it is seen by its forward in fp32.
        """
        noise = torch.Generator("cpu").manual_seed(0)
        others = [
            torch.randn(each.shape, generator=noise).to(each) if each.is_floating_point() else each
            for each in forms.tensors(arguments)
        ]
        for given in (arguments, forms.filled(arguments, iter(others))):
            with self.unpacked():
                plain = self.loaded(**given)
                exact = self._in_fp32(given)
            for one, other, true in zip(graph(given), plain, exact, strict=True):
                off, allowed = _distance(one, true), OFF_BY + TIMES_OFF * _distance(other, true)
                if not off <= allowed:
                    raise NotCompiled(f"compiled is off by {off:.3%}, where rounding explains {allowed:.3%}")

    def _in_fp32(self, arguments: Mapping[str, Any]) -> Any:
        """What the denoiser as in plain diffusers gives in fp32; called with its layers unpacked."""
        exact = self.denoiser if self._dtype == torch.float32 else copy.deepcopy(self.denoiser).float()
        given = [each.float() if each.dtype == self._dtype else each for each in forms.tensors(arguments)]
        return type(exact).forward(exact, **forms.filled(arguments, iter(given)))

    def _measured(self, graph: forms.Graph, arguments: Mapping[str, Any]) -> tuple[float, float, float]:
        """Seconds as loaded, seconds compiled (medians), and how many times as fast."""
        stopwatch = Stopwatch(self._engine.device, self._engine.synchronize)
        forwards = (lambda: self.loaded(**arguments), lambda: graph(arguments))
        rounds: list[tuple[float, float]] = []
        spent_s = 0.0
        while len(rounds) < ROUNDS and (spent_s < MAX_S or len(rounds) < MIN_ROUNDS):
            order = (0, 1) if len(rounds) % 2 else (1, 0)
            timings = {index: stopwatch.time(forwards[index]) for index in order}
            spent_s += sum(each.wall_s for each in timings.values())
            loaded, compiled = (
                each.wall_s if each.cpu_s is None else each.cpu_s for each in (timings[0], timings[1])
            )
            rounds.append((loaded, compiled))
        return (*map(statistics.median, zip(*rounds, strict=True)), gain_of(rounds))

    def _check_picture(self) -> None:
        """NotCompiled where the endpoint's own picture is not within the stated tolerance of `reference`."""
        request = replace(trial_request(self._engine.profile), seed=0)
        compiled = self._engine.generate([request])[0]
        graphs = dict(self.graphs)
        self.graphs.clear()
        with self.unpacked():
            plain = self._engine.generate([request])[0]
        self.graphs.update(graphs)
        if compiled.image is None or plain.image is None:
            raise NotCompiled(f"a picture failed: {compiled.error or plain.error}")
        off = (torch.from_numpy(compiled.image).float() - torch.from_numpy(plain.image).float()).abs() / 255
        allowed = TOLERANCE[self._dtype]
        if off.max() > allowed or off.mean() > allowed / 10:
            raise NotCompiled(f"a compiled picture is off by {off.max():.3f}, {off.mean():.4f} on average")

    def _of_exact_counts(self, call: Call, measured: Sequence[Measured]) -> list[Measured]:
        """Those that `exact` would run, and their gains where it pads to others than before."""
        most = measured[-1].package.rows
        compiled = exact_row_counts(call, most)
        graphs = dict(self.graphs)
        self.graphs.clear()
        loaded = exact_row_counts(call, most) or (most,)
        self.graphs.update(graphs)
        if not compiled:
            raise NotCompiled("compiled rows depend on their neighbours")
        by_rows = {each.package.rows: each for each in measured}
        found = []
        for rows, each in by_rows.items():
            before = by_rows[next(count for count in loaded if count >= rows)]
            after = by_rows[next(count for count in compiled if count >= rows)]
            if after is not each or before is not each:
                gain = round(before.loaded_s / after.compiled_s, 3)
                each = replace(each, package=replace(each.package, gain=gain))
            found.append(each)
        if not _wins([each.package.gain for each in found]):
            return found
        return [each for each in found if each.package.rows in compiled]


@dataclass(frozen=True, slots=True)
class Measured:
    """A compiled case beside the same as loaded."""

    package: forms.Package
    loaded_s: float
    compiled_s: float


class Whole(torch.nn.Module):
    """A denoiser as a function of its tensors, in the order of `forms.tensors`."""

    def __init__(self, denoiser: torch.nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._arguments = arguments

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        arguments = forms.filled(self._arguments, iter(given))
        result = type(self.denoiser).forward(self.denoiser, **arguments)
        if not isinstance(result, tuple) or not all(isinstance(each, Tensor) for each in result):
            raise NotCompiled("its denoiser does not return tensors")
        return result


def _distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference, over that of `other`."""
    return float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-12))


def gain_of(rounds: Sequence[tuple[float, float]]) -> float:
    """How many times as fast the second of each pair is: the median, at most 1 unless most pairs say so."""
    ratios = [before / after for before, after in rounds]
    gain = statistics.median(ratios)
    return gain if sum(ratio > 1 for ratio in ratios) >= MIN_WINS * len(ratios) else min(gain, 1.0)


def _wins(gains: Sequence[float]) -> bool:
    """Whether row counts that change together are faster: on the whole, and none of them much slower."""
    return statistics.geometric_mean(gains) >= MIN_GAIN and min(gains) >= MAX_LOSS


# ---------------------------------------------------------------- beside a worker


class Build:
    """A build that runs in the background of a worker; `close` ends it."""

    def __init__(self, engine: Engine, message: LoadModel, on_end: Callable[[], None]) -> None:
        """`on_end` is called in a thread of its own when the build has ended."""
        self._engine = engine
        rows = engine.runner.num_rows if engine.runner.mode == "exact" else None
        settings = message.settings.model_copy(update={"controlnets": ()})
        self._process = subprocess.Popen(
            PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # so that the compilers end with it
        )
        asked = encode(replace(message, settings=settings, rows=rows, proof=engine.info().proof))
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already
            self._process.stdin.write(len(asked).to_bytes(8, "big") + asked)
            self._process.stdin.flush()
        self.ended = False
        """Set by the waiting thread."""
        self._on_end = on_end
        threading.Thread(target=self._wait, name="build", daemon=True).start()

    def _wait(self) -> None:
        self._process.wait()
        self.ended = True
        self._on_end()

    def close(self) -> None:
        """Ends it, and the compilers that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def begin(engine: Engine, message: LoadModel, on_end: Callable[[], None]) -> Build | None:
    """Starts a build for this worker's model; None where there is nothing to build, or no room for it."""
    loaded = engine.loaded
    if loaded is None or loaded.forms.folder is None or forms.read(loaded.forms.folder) is not None:
        return None
    free, _ = host.memory()
    if COPIES * sum(each.nbytes for each in engine.profile.denoiser.parameters()) > free:
        return None
    loaded.forms.text = "as loaded, while it is being compiled in the background for the next start"
    return Build(engine, message, on_end)


def end(engine: Engine, build: Build) -> None:
    """Notes what a build that has ended has found."""
    build.close()
    loaded = engine.loaded
    assert loaded is not None, "only a loaded engine has a build"
    assert loaded.forms.folder is not None, "only what has a folder is built"
    record = forms.read(loaded.forms.folder)
    loaded.forms.text = (
        forms.next_start(record)
        if record
        else "as loaded: compiling did not end well; the next start tries again"
    )


if __name__ == "__main__":
    sys.exit(main())
