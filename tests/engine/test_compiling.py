"""Compiled forms: what is compiled, when it is used, and that no byte and no first picture pays for it."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from mezzotint.engine import Engine, Request, compiling
from mezzotint.engine.models import forms
from mezzotint.engine.results import Image
from mezzotint.messages import LoadModel, encode
from mezzotint.spec import AdapterUse, EngineSettings
from tests.engine import tiny
from tests.engine.adapter_files import pairs, peft, write
from tests.engine.conftest import same_alone_and_together

SETTINGS = EngineSettings(
    dtype="bf16", device="cpu", num_threads=1, performance="max", width=32, height=32, max_rows=4
)

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler has many of its own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("flux", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mezzotint" / "compiled"


def asked(folder: Path, **settings: Any) -> LoadModel:
    return LoadModel("painter", str(folder), SETTINGS.model_copy(update=settings), rows=2)


def load(folder: Path, form: str | None = None) -> Engine:
    return Engine.load(folder, SETTINGS, rows=2, form=form)


def requests(num: int) -> list[Request]:
    return [Request(prompt=f"picture {seed}", num_inference_steps=2, seed=seed) for seed in range(num)]


def painted(engine: Engine, wanted: list[Request]) -> list[Image]:
    found = [result.image for result in engine.generate(wanted)]
    assert all(image is not None for image in found)
    return [image for image in found if image is not None]


def with_adapters(engine: Engine, at: Path) -> None:
    bank = engine.enable_adapters()
    for number in range(3):
        rank = 4 + 16 * number
        state = peft("transformer.", pairs(engine.profile.denoiser, rank=rank, seed=number))
        bank.add(f"a{number}", write(state, at / f"{number}.safetensors"))


def mixed(num: int) -> list[Request]:
    """Every second one has one of three adapters."""
    return [
        dataclasses.replace(each, adapters=(AdapterUse(f"a{index % 3}"),)) if index % 2 else each
        for index, each in enumerate(requests(num))
    ]


def loaded_forms(engine: Engine) -> forms.Forms:
    assert engine.loaded is not None
    return engine.loaded.forms


class FakeCompiler:
    """Stands in for torch's: what it compiles is the denoiser itself, changed as `change` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *gains: float) -> None:
        """`gains` are what will be measured, by ascending rows; the last one goes on."""
        self.change: Callable[[torch.Tensor], torch.Tensor] = torch.clone
        self.error: Exception | None = None
        self.num_compiled = self.num_run = 0
        self.denoiser: Any = None
        self._gains = list(gains)
        monkeypatch.setattr(compiling.Builder, "_compile", self._compile)
        monkeypatch.setattr(compiling.Builder, "_measured", self._measured)
        monkeypatch.setattr(forms, "load", self.load)

    def _compile(self, arguments: Mapping[str, Any], file: Path) -> None:
        self.num_compiled += 1
        if self.error is not None:
            raise self.error
        file.write_bytes(b"code")

    def _measured(self, *_: object) -> tuple[float, float, float]:
        gain = self._gains.pop(0) if len(self._gains) > 1 else self._gains[0]
        return 1.0, 1.0 / gain, gain

    def load(self, file: Path) -> forms.Graph:
        file.read_bytes()

        def graph(arguments: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
            self.num_run += 1
            result = type(self.denoiser).forward(self.denoiser, **arguments)
            return tuple(map(self.change, result))

        return graph


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    fake = FakeCompiler(monkeypatch, 1.25)
    init = forms.install

    def install(denoiser: Any, graphs: Any) -> None:
        fake.denoiser = denoiser
        init(denoiser, graphs)

    monkeypatch.setattr(forms, "install", install)
    return fake


def silent(text: str) -> None:
    """Takes no note of progress."""


# ---------------------------------------------------------------- the whole, with torch's compiler


@pytest.mark.slow
def test_a_compiled_model_is_exact_beside_adapters_and_a_restart_compiles_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "ROW_COUNTS", ())  # one number of rows is enough here, and half the time
    monkeypatch.setattr(compiling, "_wins", lambda gains: True)  # whatever the machine is doing meanwhile
    record = compiling.build(asked(folder), silent)
    assert [each.rows for each in record.packages] == [2], record.text

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a restart compiles nothing")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    counters.clear()
    engine = load(folder)
    assert loaded_forms(engine).name == record.form
    with_adapters(engine, tmp_path)
    compiled = same_alone_and_together(engine, mixed(48))
    engine.close()
    assert not any(counters.values())

    engine = load(folder, form=forms.AS_LOADED)
    with_adapters(engine, tmp_path)
    as_loaded = painted(engine, mixed(48))
    engine.close()
    differ = [not np.array_equal(*pair) for pair in zip(compiled, as_loaded, strict=True)]
    assert not any(differ[1::2]), "rows with an adapter run as loaded"
    assert any(differ[::2]), "and those without one do not"

    again = load(folder)
    assert all(map(np.array_equal, painted(again, requests(48)[::2]), compiled[::2]))
    again.close()


# ---------------------------------------------------------------- what is decided


def test_what_is_faster_and_right_is_used_from_the_next_start_on(
    folder: Path, compiler: FakeCompiler
) -> None:
    first = load(folder)
    assert (first.info().form, compiler.num_compiled) == ("auto", 0)
    first.close()
    record = compiling.build(asked(folder), silent)
    assert [each.rows for each in record.packages] == [1, 2]
    assert record.text == "compiled for 1 and 2 rows, 1.25 and 1.25 times as fast as loaded"

    second = load(folder)
    before = compiler.num_run
    assert (second.info().form, second.info().form_text) == (record.form, record.text)
    painted(second, requests(2))
    second.close()
    assert compiler.num_run > before
    assert compiling.build(asked(folder), silent) == record
    assert compiler.num_compiled == 2, "what is there is not compiled again"


def test_a_worker_keeps_the_form_of_the_others(folder: Path, compiler: FakeCompiler) -> None:
    record = compiling.build(asked(folder), silent)
    engine = load(folder, form="auto")
    info = engine.info()
    engine.close()
    assert info.form == "auto"
    assert info.form_text == f"as loaded; the next start of the endpoint uses what is ready: {record.text}"


def test_r_is_measured_again_for_another_form_and_among_what_is_compiled(
    folder: Path, compiler: FakeCompiler
) -> None:
    record = compiling.build(asked(folder), silent)
    kept = Engine.load(folder, SETTINGS, rows=2, rows_form=record.form)
    kept.close()
    measured = Engine.load(folder, SETTINGS, rows=3, rows_form="auto")
    measured.close()
    assert (kept.runner.num_rows, kept.best_rows) == (2, None)
    assert measured.best_rows is not None
    assert {each.rows for each in measured.measured} <= {1, 2}


REFUSED: dict[str, tuple[Callable[[FakeCompiler], object], str]] = {
    "slower": (lambda fake: fake._gains.__setitem__(slice(None), [0.9]), "compiled was no faster"),
    "slower for one": (lambda fake: fake._gains.__setitem__(slice(None), [1.5, 0.9]), "was no faster"),
    "wrong": (lambda fake: setattr(fake, "change", lambda x: 2 * x), "where rounding explains"),
    "no number": (lambda fake: setattr(fake, "change", lambda x: x * torch.nan), "compiled is off by nan"),
    "not compiled": (lambda fake: setattr(fake, "error", ValueError("no such op")), "ValueError: no such op"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_slower_or_wrong_or_fails_is_never_used_and_says_why(
    case: str, folder: Path, cache: Path, compiler: FakeCompiler
) -> None:
    spoil, words = REFUSED[case]
    spoil(compiler)
    record = compiling.build(asked(folder), silent)
    assert record.packages == ()
    assert record.text.startswith("as loaded: ")
    assert words in record.text
    engine = load(folder)
    assert (engine.info().form, engine.info().form_text) == ("auto", record.text)
    engine.close()
    assert [path.name for path in cache.glob("*/*")] == [forms.RECORD]


def test_rows_that_depend_on_their_neighbours_are_not_compiled(folder: Path, compiler: FakeCompiler) -> None:
    compiler.change = lambda x: x + 1e-2 * x.float().mean().to(x.dtype)
    record = compiling.build(asked(folder), silent)
    assert record.packages == ()


def test_only_those_row_counts_are_kept_that_exact_runs(
    folder: Path, compiler: FakeCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "exact_row_counts", lambda call, rows: (2,))
    record = compiling.build(asked(folder), silent)
    assert [each.rows for each in record.packages] == [2]


@pytest.mark.parametrize(("batching", "rows"), [("off", [1]), ("fast", [1, 2, 4])])
def test_without_a_promise_each_row_count_is_judged_by_itself(
    batching: str, rows: list[int], folder: Path, compiler: FakeCompiler
) -> None:
    record = compiling.build(asked(folder, batching=batching), silent)
    assert [each.rows for each in record.packages] == rows


def test_the_median_of_interleaved_rounds_decides_and_most_of_them_must_agree() -> None:
    assert compiling.gain_of([(1.2, 1.0)] * 20 + [(1.0, 50.0)]) == pytest.approx(1.2)
    assert compiling.gain_of([(1.2, 1.0)] * 12 + [(1.0, 1.1)] * 9) == 1.0
    assert compiling.gain_of([(1.0, 2.0)] * 21) == 0.5


def test_a_model_without_a_compiler_runs_as_loaded_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    engine = load(folder)
    info = engine.info()
    assert (info.performance, info.form) == ("max", "auto")
    assert "needs a C++ compiler" in info.form_text
    assert "forward" in vars(engine.profile.denoiser.proj_out), "its linear layers are packed"
    assert compiling.begin(engine, asked(folder), silent_end) is None
    assert compiling.build(asked(folder), silent).text == info.form_text
    engine.close()


def framed(message: LoadModel) -> bytes:
    frame = encode(message)
    return len(frame).to_bytes(8, "big") + frame


def test_beside_a_worker_the_program_has_the_lowest_priority_and_it_tells_what_came_of_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    priorities: list[int] = []
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    monkeypatch.setattr(sys, "argv", list(compiling.PROGRAM[2:]))
    monkeypatch.setattr(compiling, "_end_with_input", silent_end)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(framed(asked(folder)))))
    monkeypatch.setattr(os, "nice", priorities.append)
    assert compiling.main() == 0
    assert priorities == [19]
    assert "needs a C++ compiler" in capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(framed(asked(folder / "nowhere")))))
    assert compiling.main() == 1


def test_the_program_ends_with_its_input(folder: Path) -> None:
    assert subprocess.run(compiling.PROGRAM, input=framed(asked(folder)), check=False).returncode == 1


def silent_end() -> None:
    """Nobody waits for it."""


def test_code_that_cannot_be_loaded_is_not_used(folder: Path, cache: Path, compiler: FakeCompiler) -> None:
    compiling.build(asked(folder), silent)
    next(cache.glob("*/2.pt2")).unlink()
    engine = load(folder)
    assert engine.info().form == "auto"
    assert "cannot be used" in engine.info().form_text
    engine.close()


def test_another_model_of_the_same_shapes_has_a_folder_of_its_own() -> None:
    places = set()
    pipe = tiny.build("flux")
    for _ in range(2):
        places.add(forms.place(pipe.transformer, SETTINGS, torch.device("cpu")))
        pipe.transformer.proj_out.weight.data[0, 0] += 1
    places.add(forms.place(pipe.transformer, SETTINGS.model_copy(update={"width": 64}), torch.device("cpu")))
    assert len(places) == 3


# ---------------------------------------------------------------- rows with adapters


def test_rows_with_adapters_run_as_loaded_and_share_no_forward_with_others(
    folder: Path, tmp_path: Path, compiler: FakeCompiler
) -> None:
    compiling.build(asked(folder), silent)
    compiler.change = lambda x: x * 1.25  # so that no compiled row is taken for another
    pictures = {}
    for form in (None, forms.AS_LOADED):
        engine = load(folder, form)
        with_adapters(engine, tmp_path)
        pictures[form] = same_alone_and_together(engine, mixed(12))
        engine.close()
    same = [np.array_equal(*pair) for pair in zip(*pictures.values(), strict=True)]
    assert same == [False, True] * 6


# ---------------------------------------------------------------- beside a worker


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the place of the build, which ends when it is told to, or with its input."""
    monkeypatch.setattr(compiling, "PROGRAM", (sys.executable, "-c", "import sys; sys.stdin.read()"))


@pytest.mark.usefixtures("stand_in")
def test_pictures_are_made_while_the_model_is_being_compiled(folder: Path, compiler: FakeCompiler) -> None:
    engine, ended = load(folder), threading.Event()
    build = compiling.begin(engine, asked(folder), ended.set)
    assert build is not None
    assert "being compiled in the background" in engine.info().form_text
    painted(engine, requests(1))
    assert not build.ended
    record = compiling.build(asked(folder), silent)
    build.close()
    assert ended.wait(30)
    compiling.end(engine, build)
    assert engine.info().form == "auto", "a form never changes under way"
    assert record.text in engine.info().form_text
    assert compiling.begin(engine, asked(folder), ended.set) is None
    engine.close()


@pytest.mark.usefixtures("stand_in")
def test_a_build_that_dies_is_made_again_by_the_next_start(folder: Path) -> None:
    engine, ended = load(folder), threading.Event()
    build = compiling.begin(engine, asked(folder), ended.set)
    assert build is not None
    build.close()
    assert ended.wait(30)
    compiling.end(engine, build)
    assert "the next start tries again" in engine.info().form_text
    engine.close()


def test_nothing_is_compiled_beside_a_worker_without_the_memory_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(folder)
    monkeypatch.setattr(compiling, "COPIES", 10**9)
    assert compiling.begin(engine, asked(folder), silent_end) is None
    assert "for want of memory" in engine.info().form_text
    engine.close()
