"""A worker without torch: speaks messages.py and paints a deterministic picture from seed and prompt.

Server tests and examples run it in place of the engine's worker. What it does is written in the model source:

    fake                              ready at once, a step takes a millisecond
    fake:step_s=0.05,size=32          slower steps, smaller pictures
    fake:pictures=0                   makes pictures from words only (2: works from up to two pictures)
    fake:load_s=0.5                   takes that long to load
    fake:load_until=/tmp/flag         loads until that file is there
    fake:node=10.0.0.7                says that it runs on that machine
    fake:channels=4,layers=3          pictures with alpha, three for each job
    fake:fail_load=permanent          LoadFailed, exit EXIT_PERMANENT (`temporary`: LoadFailed, exit status 1)
    fake:die_at_start=1               exits before Ready, as a crash would
    fake:hang_at_start=1              never becomes ready
    fake:once=/tmp/flag,...           the three faults above happen only while that file is missing, once

Prompts that hold one of these words make a fault: `!die@K` kills the process at step K, `!die-once@K:FILE`
does so only while FILE is missing, `!hang@K` stops answering for good, `!slow@K` makes step K last two
seconds and says meanwhile that it is busy, `!stuck@K` says that it has been busy for a day, `!wait@K:FILE`
keeps that one job at step K, and the worker answering, until FILE is there, `!fail@K` fails that one job,
`!oom` fails it for memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from mezzotint.messages import (
    EXIT_PERMANENT,
    LOADING,
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
    Message,
    ModelInfo,
    Ping,
    Placed,
    Pong,
    Preview,
    Progress,
    Ready,
    RemoveAdapter,
    Shutdown,
    Stats,
    decode,
    encode,
)
from mezzotint.spec import AdapterSpec, ImageSpec

DEFAULTS = {
    "step_s": "0.001",
    "size": "16",
    "pictures": "2",
    "load_s": "0",
    "load_until": "",
    "node": "",
    "channels": "3",
    "layers": "1",
    "fail_load": "",
    "die_at_start": "",
    "hang_at_start": "",
    "once": "",
}
SLOW_STEP_S = 2.0
EXAMPLES = ("an owl on a yellow background", "a red apple on a teal background", "a rocket")
"""What it says that it draws well."""
_FAULT = re.compile(
    r"!(?P<kind>die-once|die|hang|slow|stuck|wait|fail|oom)(?:@(?P<step>\d+))?(?::(?P<file>\S+))?"
)


@dataclass(slots=True)
class FakeJob:
    request: Generate
    width: int
    height: int
    checksum: str = ""
    """Of the adapter's weights as they were when the job came."""
    step: int = 0
    started: float = field(default_factory=time.monotonic)
    prepared: float = 0.0
    """When its first step began, as `started` on the monotonic clock."""


def run(connection: Connection) -> None:
    """The worker process: one LoadModel, then jobs until Shutdown or until the server is gone."""
    try:
        load = decode(connection.recv_bytes())
        assert isinstance(load, LoadModel)
        options = parse_source(load.source)
        connection.send_bytes(encode(Loading(LOADING, 0.0)))
        if options["node"]:
            connection.send_bytes(encode(Placed(options["node"])))
        _start_faults(connection, options)
        began = time.monotonic()
        time.sleep(float(options["load_s"]))
        while options["load_until"] and not Path(options["load_until"]).exists():
            time.sleep(0.02)
        size = int(options["size"])
        info = model_info(load, size, float(options["step_s"]), int(options["pictures"]))
        connection.send_bytes(encode(Ready(info, time.monotonic() - began)))
        _Worker(connection, size, float(options["step_s"]), options).loop()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def parse_source(source: str) -> dict[str, str]:
    """The options in a source such as `fake:step_s=0.05,size=32`; ValueError for an unknown one."""
    options = dict(DEFAULTS)
    _, _, text = source.partition(":")
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in options:
            raise ValueError(f"fake worker: unknown option {name!r}; known are {', '.join(DEFAULTS)}")
        options[name] = value
    return options


def model_info(load: LoadModel, size: int, step_s: float, max_pictures: int = 2) -> ModelInfo:
    rows = load.rows or (4 if load.settings.batching == "exact" else 1)
    return ModelInfo(
        pipeline_class="FakePipeline",
        model_class="FakeModel",
        dtype="fp32",
        device="cpu",
        num_threads=1,
        batching=load.settings.batching,
        performance=load.settings.performance,
        form=load.form or (f"compiled-{os.getpid()}" if load.settings.performance == "max" else "auto"),
        rows=rows,
        mergeable=True,
        width=size,
        height=size,
        size_multiple=8,
        default_steps=8,
        default_guidance=4.0,
        guidance_effective=True,
        supports_negative_prompt=True,
        max_prompt_tokens=64,
        num_parameters=1,
        max_pictures=max_pictures,
        masks=max_pictures > 0,
        strength=max_pictures > 0,
        calibration=[{"rows": 1, "forward_s": step_s, "rows_per_s": 1 / step_s if step_s else 0.0}],
        step_s=step_s,
        about="Coloured noise, the same for the same request.",
        license="Apache-2.0",
        examples=list(EXAMPLES),
    )


def paint(spec: ImageSpec, width: int, height: int, checksum: str = "", channels: int = 3) -> bytes:
    """The picture of a request: uint8, the same bytes for the same fields, in whatever company it ran.

    `checksum` is that of the adapter's weights, if the request uses an adapter.
    """
    fields = (
        spec.prompt,
        spec.seed,
        spec.num_inference_steps,
        spec.guidance_scale,
        spec.negative_prompt,
        spec.adapters,
        *filter(None, (checksum, *(picture.digest for picture in spec.pictures))),
        *(() if spec.strength is None else (spec.strength,)),
    )
    return hashlib.shake_256(repr(fields).encode()).digest(width * height * channels)


def _start_faults(connection: Connection, options: dict[str, str]) -> None:
    flag = options["once"]
    if flag:
        if Path(flag).exists():
            return
        Path(flag).touch()
    if options["hang_at_start"]:
        signal.pause()
    if options["die_at_start"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if options["fail_load"]:
        permanent = options["fail_load"] == "permanent"
        connection.send_bytes(
            encode(LoadFailed("model_load_failed", "the fake model cannot be loaded", permanent))
        )
        os._exit(EXIT_PERMANENT if permanent else 1)


class _Worker:
    """The loop: read what has arrived, run one step of every job, report."""

    def __init__(self, connection: Connection, size: int, step_s: float, options: dict[str, str]) -> None:
        self.connection = connection
        self.size = size
        self.step_s = step_s
        self.channels, self.layers = int(options["channels"]), int(options["layers"])
        self.jobs: dict[str, FakeJob] = {}
        self.adapters: dict[str, AdapterSpec] = {}
        self.open = True

    def loop(self) -> None:
        while self.open:
            if self.connection.poll(0 if self.jobs else None):
                self._receive(decode(self.connection.recv_bytes()))
            elif self.jobs:
                self._step()

    def _send(self, message: Message) -> None:
        self.connection.send_bytes(encode(message))

    def _receive(self, message: Message) -> None:
        match message:
            case Generate():
                self._admit(message)
            case Cancel(job_id):
                if self.jobs.pop(job_id, None):
                    self._send(Cancelled(job_id))
            case Ping(number):
                self._send(Pong(number))
            case AddAdapter(adapter):
                route, path = adapter.route, Path(adapter.path)
                if path.exists():
                    self.adapters[route] = adapter
                    self._send(AdapterAdded(route, adapter.path, 4, path.stat().st_size, ["to_q"]))
                else:
                    text = f"adapter {route!r}: no such file"
                    self._send(AdapterFailed(route, adapter.path, "adapter_load_failed", text))
            case RemoveAdapter(route):
                self.adapters.pop(route, None)
            case Shutdown():
                self.open = False
            case _:
                pass

    def _admit(self, request: Generate) -> None:
        spec = request.spec
        missing = next((route for route in spec.routes if route not in self.adapters), None)
        if missing is not None:
            text = f"there is no adapter {missing!r} here"
            self._send(Failed(request.job_id, "adapter_not_found", text, "model"))
            return
        checksum = "".join(self.adapters[route].checksum for route in spec.routes)
        job = FakeJob(request, spec.width or self.size, spec.height or self.size, checksum)
        self.jobs[request.job_id] = job
        self._send(Progress(request.job_id, 0, spec.num_inference_steps))

    def _step(self) -> None:
        began = time.monotonic()
        time.sleep(self.step_s)
        rows = len(self.jobs)
        for job_id, job in list(self.jobs.items()):
            job.prepared = job.prepared or began
            job.step += 1
            if self._fault(job):
                continue
            self._send(Progress(job_id, job.step, job.request.spec.num_steps))
            self._preview(job)
            if job.step >= job.request.spec.num_steps:
                del self.jobs[job_id]
                values, denoised = self.channels * self.layers, time.monotonic()
                pictures = paint(job.request.spec, job.width, job.height, job.checksum, values)
                self._send(
                    Done(
                        job_id,
                        job.width,
                        job.height,
                        time.monotonic() - job.started,
                        pictures,
                        prepare_s=job.prepared - job.started,
                        steps_s=denoised - job.prepared,
                        num_pictures=self.layers,
                    )
                )
        if not self.jobs:
            key = f"{self.size}x{self.size}"
            self._send(
                Stats(0, 1, rows, 0, self.step_s, {key: self.step_s}, resident_routes=list(self.adapters))
            )

    def _preview(self, job: FakeJob) -> None:
        wanted, steps = job.request.num_previews, job.request.spec.num_steps
        before, now = (job.step - 1) * (wanted + 1) // steps, job.step * (wanted + 1) // steps
        if wanted and before < now <= wanted:
            picture = paint(job.request.spec, job.width, job.height, job.checksum)
            self._send(Preview(job.request.job_id, now - 1, job.step, job.width, job.height, picture))

    def _fault(self, job: FakeJob) -> bool:
        """Makes the faults that the prompt asks for; True when the job is over or has to wait."""
        faults = _FAULT.finditer(job.request.spec.prompt)
        return any(self._make(job, found) for found in faults if job.step >= int(found["step"] or 1))

    def _make(self, job: FakeJob, found: re.Match[str]) -> bool:
        kind, flag = found["kind"], found["file"]
        if kind == "die-once" and not Path(flag).exists():
            Path(flag).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "wait" and not Path(flag).exists():
            job.step -= 1
            return True
        if kind == "slow" and job.step == int(found["step"] or 1):
            began = time.monotonic()
            while (seconds := time.monotonic() - began) < SLOW_STEP_S:
                time.sleep(SLOW_STEP_S / 40)
                self._send(Busy(seconds))
        if kind == "stuck":
            self._send(Busy(86_400))
        if kind in ("hang", "stuck"):
            while True:
                signal.pause()
        if kind in ("fail", "oom"):
            code = "generation_failed" if kind == "fail" else "out_of_memory"
            del self.jobs[job.request.job_id]
            self._send(
                Failed(
                    job.request.job_id, code, f"the fake job failed at step {job.step}, as its prompt asked"
                )
            )
            return True
        return False
