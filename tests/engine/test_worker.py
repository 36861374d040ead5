"""The worker as a real process behind a real pipe."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from mezzotint.engine import Engine, Request, compiling, worker
from mezzotint.engine.worker import MAX_BACKLOG, Outbox
from mezzotint.messages import (
    EXIT_PERMANENT,
    MEASURING,
    AdapterAdded,
    AdapterFailed,
    AddAdapter,
    Busy,
    Cancel,
    Cancelled,
    Done,
    Failed,
    Generate,
    LoadFailed,
    Loading,
    LoadModel,
    Measured,
    Message,
    Ping,
    Pong,
    PrefetchAdapter,
    Preview,
    Progress,
    Ready,
    RemoveAdapter,
    Shutdown,
    Stats,
    decode,
    encode,
)
from mezzotint.spec import AdapterSpec, EngineSettings, ImageSpec
from tests.engine import adapter_files, tiny
from tests.engine.adapter_files import uses

DEADLINE_S = 120.0
M = TypeVar("M", bound=Message)


class Process:
    """One worker, started by fork: what it imports is here already."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._run, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.seen: list[Message] = []

    def _run(self, connection: Connection) -> None:
        self.pipe.close()  # or the child would keep its own pipe open
        worker.run(connection)

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.pipe.send_bytes(encode(message))

    def wait_for(self, kind: type[M], job_id: str | None = None) -> M:
        """The next message of this kind, of this job if one is named."""
        deadline = time.monotonic() + DEADLINE_S
        while self.pipe.poll(max(0.0, deadline - time.monotonic())):
            message = decode(self.pipe.recv_bytes())
            self.seen.append(message)
            if isinstance(message, kind) and job_id in (None, getattr(message, "job_id", None)):
                return message
        raise AssertionError(f"no {kind.__name__} came")

    def exit_status(self) -> int | None:
        self.process.join(DEADLINE_S)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join(DEADLINE_S)
        self.pipe.close()


SETTINGS = EngineSettings(
    dtype="fp32", device="cpu", num_threads=1, performance="reference", width=32, height=32
)


def load_model(folder: Path | str, rows: int | None = 2) -> LoadModel:
    return LoadModel("tiny", str(folder), SETTINGS, rows)


def generate(job_id: str, num_previews: int = 0, **fields: object) -> Generate:
    arguments: dict[str, object] = {"prompt": "a red fox", "num_inference_steps": 3, "seed": 1, **fields}
    return Generate(job_id, ImageSpec(**arguments), num_previews)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("flux", tmp_path_factory.mktemp("model"))


@pytest.fixture
def process() -> Iterator[Process]:
    started = Process()
    yield started
    started.kill()


@pytest.fixture(scope="module")
def serving(folder: Path) -> Iterator[Process]:
    """One worker for all tests that leave it serving."""
    started = Process()
    started.send(load_model(folder))
    started.wait_for(Ready)
    yield started
    started.kill()


@pytest.fixture
def shared(serving: Process) -> Process:
    serving.seen.clear()
    return serving


@pytest.fixture
def ready(process: Process, folder: Path) -> Process:
    process.send(load_model(folder))
    process.wait_for(Ready)
    process.seen.clear()
    return process


def test_a_model_loads_and_says_what_it_is(process: Process, folder: Path) -> None:
    process.send(load_model(folder, rows=None))
    info = process.wait_for(Ready).info
    assert [message.stage for message in process.seen if isinstance(message, Loading)][-1] == MEASURING
    assert (info.pipeline_class, info.model_class) == ("FluxPipeline", "FluxTransformer2DModel")
    assert (info.dtype, info.device, info.num_threads, info.batching) == ("fp32", "cpu", 1, "exact")
    assert (info.width, info.height, info.size_multiple) == (32, 32, 8)
    assert info.mergeable
    assert info.rows >= 1
    assert info.calibration[0]["rows"] == 1
    assert info.step_s > 0
    process.send(Shutdown())
    assert process.exit_status() == 0


def test_a_request_gives_the_bytes_of_the_library(shared: Process, folder: Path) -> None:
    shared.send(generate("a", num_previews=1), generate("b", seed=2))
    payloads = {job_id: shared.wait_for(Done, job_id).payload for job_id in ("a", "b")}
    assert [
        message.step for message in shared.seen if isinstance(message, Progress) and message.job_id == "a"
    ] == [0, 1, 2, 3]
    assert sum(isinstance(message, Preview) for message in shared.seen) == 1

    engine = Engine.load(folder, SETTINGS, rows=2)
    results = engine.generate(
        [Request(prompt="a red fox", num_inference_steps=3, seed=seed) for seed in (1, 2)]
    )
    engine.close()
    for payload, result in zip(payloads.values(), results, strict=True):
        assert result.image is not None
        assert np.array_equal(np.frombuffer(payload, np.uint8).reshape(32, 32, 3), result.image)


def test_a_worker_after_a_crash_gives_the_same_bytes(ready: Process, folder: Path) -> None:
    ready.send(generate("a"))
    before = ready.wait_for(Done).payload
    assert ready.process.pid is not None
    os.kill(ready.process.pid, signal.SIGKILL)
    assert ready.exit_status() == -signal.SIGKILL

    again = Process()
    again.send(load_model(folder), generate("x", seed=9), generate("a"))
    after = again.wait_for(Done, "a").payload
    again.kill()
    assert after == before


@pytest.mark.parametrize("source", ["missing-folder/model", ""])
def test_a_model_that_can_never_load_ends_the_process_for_good(
    process: Process, tmp_path: Path, source: str
) -> None:
    process.send(load_model(tmp_path / source))
    failed = process.wait_for(LoadFailed)
    assert failed.permanent
    assert failed.message
    assert process.exit_status() == EXIT_PERMANENT


def test_a_worker_whose_server_is_gone_exits(ready: Process) -> None:
    ready.send(generate("a", num_inference_steps=50))
    ready.wait_for(Progress, "a")
    ready.pipe.close()
    assert ready.exit_status() == 0


def test_an_idle_worker_whose_server_is_gone_exits(ready: Process) -> None:
    ready.pipe.close()
    assert ready.exit_status() == 0


def test_cancel_ends_one_job_and_leaves_the_other(ready: Process) -> None:
    ready.send(generate("long", num_inference_steps=50), generate("other", seed=2))
    ready.send(Cancel("long"), Cancel("unknown"))
    ready.wait_for(Cancelled, "long")
    ready.wait_for(Done, "other")
    ready.send(Shutdown())
    assert ready.exit_status() == 0
    assert not any(isinstance(message, Done) and message.job_id == "long" for message in ready.seen)


def test_a_ping_is_answered_between_steps(shared: Process) -> None:
    shared.send(generate("a", num_inference_steps=50))
    shared.wait_for(Progress, "a")
    shared.send(Ping(7))
    assert shared.wait_for(Pong).number == 7
    assert not any(isinstance(message, Done) for message in shared.seen)
    shared.send(Cancel("a"))
    shared.wait_for(Cancelled, "a")


def test_a_worker_in_a_long_forward_says_that_it_is_busy(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step holds one long native call; the worker is forked with this patch in it."""
    real = FluxTransformer2DModel.forward
    matrix = torch.rand(2048, 2048)

    def forward(*arguments: Any, **named: Any) -> Any:
        torch.mm(matrix, matrix)
        return real(*arguments, **named)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", forward)
    monkeypatch.setattr(worker, "BUSY_EVERY_S", 0.01)
    slow = Process()
    try:
        slow.send(load_model(folder), generate("a", num_inference_steps=1))
        slow.wait_for(Progress, "a")
        slow.seen.clear()
        slow.wait_for(Done, "a")
    finally:
        slow.kill()
    said = [message.seconds for message in slow.seen if isinstance(message, Busy)]
    longest = max(range(len(said)), key=said.__getitem__)
    assert len(said[:longest]) >= 3
    assert said[longest - 3 : longest + 1] == sorted(said[longest - 3 : longest + 1]), (
        "in one and the same turn"
    )


def test_a_bad_request_fails_alone(shared: Process) -> None:
    shared.send(generate("bad", width=33), generate("good"))
    failed = shared.wait_for(Failed)
    assert (failed.job_id, failed.code, failed.param) == ("bad", "out_of_range", "width")
    shared.wait_for(Done, "good")


def test_turning_idle_is_told_with_what_was_done(ready: Process) -> None:
    ready.send(generate("a"), generate("b", seed=2))
    stats = ready.wait_for(Stats)
    while stats.num_jobs:
        stats = ready.wait_for(Stats)
    total = [message for message in ready.seen if isinstance(message, Stats)]
    assert sum(message.rows for message in total) == 6
    assert sum(message.forwards for message in total) >= 3
    assert stats.step_s["32x32"] > 0


def test_a_request_may_name_an_adapter_right_after_it_was_added(shared: Process, tmp_path: Path) -> None:
    state = adapter_files.LAYOUTS["flux", "peft"](tiny.build("flux"), 1)
    path = adapter_files.write(state, tmp_path / "flat.safetensors")
    shared.send(
        AddAdapter(AdapterSpec("flat", str(path))), generate("flat", adapters=uses("flat")), generate("base")
    )
    shared.send(PrefetchAdapter("flat"))
    done: dict[str, bytes] = {}
    while len(done) < 2:
        message = shared.wait_for(Done)
        done[message.job_id] = message.payload
    added = next(message for message in shared.seen if isinstance(message, AdapterAdded))
    assert added.route == "flat"
    assert added.rank > 0
    assert done["flat"] != done["base"]

    shared.send(RemoveAdapter("flat"), generate("gone", adapters=uses("flat")))
    assert shared.wait_for(Failed).code == "adapter_not_found"


def test_a_broken_adapter_is_refused_and_so_are_its_requests(shared: Process, tmp_path: Path) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not safetensors")
    shared.send(
        AddAdapter(AdapterSpec("broken", str(path))), generate("a", adapters=uses("broken")), generate("b")
    )
    assert shared.wait_for(AdapterFailed).route == "broken"
    assert shared.wait_for(Failed).job_id == "a"
    shared.wait_for(Done, "b")


def test_a_request_that_waits_for_its_adapter_can_be_cancelled(ready: Process, tmp_path: Path) -> None:
    missing = AddAdapter(AdapterSpec("slow", str(tmp_path / "missing.safetensors")))
    ready.send(missing, generate("a", adapters=uses("slow")), Cancel("a"), Ping(1))
    ready.wait_for(Pong)
    ready.send(Shutdown())
    assert ready.exit_status() == 0
    while ready.pipe.poll():
        try:
            ready.seen.append(decode(ready.pipe.recv_bytes()))
        except EOFError:
            break
    ends = [message for message in ready.seen if isinstance(message, (Cancelled, Failed, Done))]
    assert [message.job_id for message in ends] == ["a"]
    assert not isinstance(ends[0], Done)


def test_a_request_whose_adapter_goes_while_it_waits_for_it_ends(ready: Process, tmp_path: Path) -> None:
    file = tmp_path / "slow.safetensors"
    os.mkfifo(file)  # its check waits for a writer, who never comes
    ready.send(
        AddAdapter(AdapterSpec("slow", str(file))),
        generate("a", adapters=uses("slow")),
        RemoveAdapter("slow"),
    )
    ready.send(generate("b"))
    ready.wait_for(Done, "b")
    failed = [message for message in ready.seen if isinstance(message, Failed)]
    assert [(message.job_id, message.code) for message in failed] == [("a", "adapter_not_found")]


def test_a_reader_that_sleeps_never_holds_up_the_sender() -> None:
    ours, theirs = Pipe()
    outbox = Outbox(theirs)
    picture = bytes(2_000_000)  # more than the kernel holds of it
    outbox.send(Done("first", 1, 1, 0.0, picture))
    for step in range(20 * MAX_BACKLOG):
        outbox.send(Progress("a", step, 50))
    outbox.send(Done("last", 1, 1, 0.0, picture))
    received: list[Message] = []
    while not received or getattr(received[-1], "job_id", "") != "last":
        assert ours.poll(DEADLINE_S)
        received.append(decode(ours.recv_bytes()))
    outbox.close()
    assert isinstance(received[0], Done)
    assert len(received) <= MAX_BACKLOG + 2


@pytest.mark.parametrize("program", ["import sys; sys.stdin.read()", ""])
def test_a_worker_paints_while_its_model_is_compiled_and_tells_how_that_ended(
    program: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "PROGRAM", (sys.executable, "-c", program))
    settings = SETTINGS.model_copy(update={"performance": "max"})
    process = Process()
    process.send(LoadModel("tiny", str(folder), settings, 2), generate("a"))
    assert process.wait_for(Ready).info.form == "auto"
    assert "in the background" in process.wait_for(Measured).info.form_text
    process.wait_for(Done, "a")
    if not program:
        measured = [each for each in process.seen if isinstance(each, Measured)]
        last = measured[-1] if len(measured) > 1 else process.wait_for(Measured)
        assert "the next start tries again" in last.info.form_text
    process.send(Shutdown())
    assert process.exit_status() == 0
