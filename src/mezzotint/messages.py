"""What server and worker say to each other: frozen dataclasses with an explicit encoding, never pickle.

A frame is `length of header (4 bytes, big endian) | header (JSON) | payload (raw bytes)`. The header is the
message's fields and its class name under "is". Pixels travel behind it as they are: a field called `payload`,
or in their order the pictures that a Generate brings along.
Frames are sent whole through `multiprocessing.Connection.send_bytes`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from mezzotint.spec import AdapterSpec, EngineSettings, ImageSpec, RayPlace, loading_text

DOWNLOADING, LOADING, MEASURING = "downloading the model", "loading the model", "measuring the model's speed"
"""The stages of a worker that is not ready, in the words that people read."""


@dataclass(frozen=True, slots=True)
class MergeFinding:
    """What was found of one module: how its arguments merge, or why its calls never do."""

    reason: str = ""
    arguments: Mapping[str, str] | None = None
    """By (dotted) name `row`, `scalar`, `shared` or `list`; None: calls never merge."""
    dimensions: Mapping[str, int] = field(default_factory=dict)
    multiples: Mapping[str, int] = field(default_factory=dict)
    text: Mapping[str, int] | None = None
    """By name, which dimension is padded so that texts of different length merge."""
    mask: str | None = None
    objects: Mapping[str, str] = field(default_factory=dict)
    """By name, what objects without tensors must hold."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The findings of a start, for later ones with the same versions."""

    made_with: str
    """The versions and classes for which it holds."""
    findings: Mapping[str, MergeFinding] = field(default_factory=dict)
    """By the module's name."""


# ---------------------------------------------------------------- server -> worker


@dataclass(frozen=True, slots=True)
class LoadModel:
    """The first message to a worker: what to host and how. Answered by Loading*, then Ready or LoadFailed."""

    endpoint_id: str
    source: str
    """Built-in name (`emoji`), a folder, a Hub repository id, or a single safetensors file."""
    settings: EngineSettings = field(default_factory=EngineSettings)
    rows: int | None = None
    """Rows of a merged forward in `exact` mode as calibrated earlier; None asks the worker to calibrate."""
    proof: Proof | None = None
    """What an earlier start found; the worker makes it again where it does not hold for its versions."""
    form: str | None = None
    """The form of the denoiser that the endpoint's other workers use; None: whichever is ready."""
    rows_form: str = ""
    """The form under which `rows` was calibrated; the worker calibrates again in another one."""
    place: RayPlace = field(default_factory=RayPlace)
    """Which node it runs on, where Ray runs it; the worker itself does not read it."""


@dataclass(frozen=True, slots=True)
class AddAdapter:
    """Makes an adapter known (nothing is put on the device); answered by AdapterAdded or AdapterFailed."""

    adapter: AdapterSpec


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    route: str


@dataclass(frozen=True, slots=True)
class PrefetchAdapter:
    """A request for this route is waiting: load it while others run."""

    route: str


@dataclass(frozen=True, slots=True)
class Generate:
    """One job: one image. Ends in exactly one of Done, Failed, Cancelled."""

    job_id: str
    spec: ImageSpec
    """With its seed, and with the endpoint's defaults filled in."""
    num_previews: int = 0
    """How many evenly spaced previews (estimates of the finished image) to send."""
    priority: int = 0
    owner: str = ""
    """Whose job it is; owners take turns in the worker's forwards."""


@dataclass(frozen=True, slots=True)
class Cancel:
    job_id: str


@dataclass(frozen=True, slots=True)
class Ping:
    number: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Finish nothing more, exit with status 0. (The server drains by waiting for jobs first.)"""


# ---------------------------------------------------------------- worker -> server


@dataclass(frozen=True, slots=True)
class Loading:
    stage: str
    """What people are told, such as DOWNLOADING."""
    fraction: float | None = None
    """How much of the stage is done, 0 to 1, if the worker knows."""

    @property
    def text(self) -> str:
        """For people: `loading the model (40 %)`."""
        return loading_text(self.stage, self.fraction)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is and can do; the server validates requests against it."""

    pipeline_class: str
    model_class: str
    """Class of the denoiser, e.g. FluxTransformer2DModel."""
    dtype: str
    device: str
    num_threads: int
    batching: str
    performance: str
    """As it was set."""
    rows: int
    """Most rows of a merged forward in `exact` mode, R (1: never merged)."""
    mergeable: bool
    """Whether a module has a proven Rule."""
    width: int
    height: int
    size_multiple: int
    default_steps: int
    default_guidance: float | None
    guidance_effective: bool
    supports_negative_prompt: bool
    max_prompt_tokens: int | None
    num_parameters: int
    max_pictures: int = 0
    """Most pictures that a request may bring along; 0: words only."""
    min_pictures: int = 0
    """1: it makes nothing from words only."""
    masks: bool = False
    """Whether it can repaint a part of a picture."""
    strength: bool = False
    """Whether a request with a picture has a strength."""
    takes_size: bool = True
    """Whether a request can set width and height; False: the model chooses them itself."""
    form: str = ""
    """What the denoiser runs as: `reference`, `auto`, or the name of a compiled form."""
    form_text: str = ""
    """Why, and what the next start will use; empty unless `performance` is `max`."""
    calibration: list[Mapping[str, float]] = field(default_factory=list)
    """One entry per row count tried: {"rows", "forward_s", "rows_per_s", "uncertainty"}.

    `uncertainty` is how far runs of that forward disagreed, relative to `forward_s`; 0.1 and less is sure."""
    best_rows: int | None = None
    """The R that the latest measurements of all row counts would give; None where only R was measured."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Every (width, height) that the model can draw; empty: any of its multiple."""
    step_s: float = 0.0
    """Measured seconds of one step of one lone job at the default size."""
    about: str = ""
    """What it draws, as its maker says."""
    license: str = ""
    """Of the weights, as its maker says."""
    examples: list[str] = field(default_factory=list)
    """Prompts that the model's maker recommends."""
    merging: Mapping[str, str] = field(default_factory=dict)
    """For each module that runs at every step, or for `all`, whether its calls merge and why not."""
    proof: Proof | None = None
    """The same for later starts; None where the trial failed."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Said for a worker that runs on another machine."""

    node: str
    """The address of that machine."""


@dataclass(frozen=True, slots=True)
class Ready:
    info: ModelInfo
    load_s: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What an idle worker has found by measuring again; `info.rows` is what it was."""

    info: ModelInfo


@dataclass(frozen=True, slots=True)
class LoadFailed:
    code: str
    message: str
    permanent: bool
    """True: would fail again at start (exit code EXIT_PERMANENT follows); do not restart in a loop."""


@dataclass(frozen=True, slots=True)
class AdapterAdded:
    route: str
    path: str
    """The file that was looked at: tells this answer from one about an earlier file of the same route."""
    rank: int
    num_bytes: int
    target_modules: list[str]


@dataclass(frozen=True, slots=True)
class AdapterFailed:
    route: str
    path: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Sent after each denoising step of a job (step 0: admitted, nothing run yet)."""

    job_id: str
    step: int
    num_steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """The model's current estimate of the finished image; payload is uint8 RGB, height x width x 3."""

    job_id: str
    index: int
    step: int
    width: int
    height: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Done:
    """payload is uint8, row-major, `num_pictures` times height x width x 3, or x 4 with alpha."""

    job_id: str
    width: int
    height: int
    generate_s: float
    """From admission in the worker to the decoded picture."""
    payload: bytes
    adapter_load_s: float = 0.0
    prepare_s: float = 0.0
    """From admission to the first denoising step: adapter, text encoders, input pictures, its turns."""
    steps_s: float = 0.0
    """From then to the end of the last step; what is left of `generate_s` is decoding. 0: not measured."""
    warnings: list[str] = field(default_factory=list)
    num_pictures: int = 1
    """More than one where the model draws its picture in layers."""

    @property
    def pictures(self) -> list[bytes]:
        """The pixels of each picture."""
        size = len(self.payload) // self.num_pictures
        return [self.payload[start : start + size] for start in range(0, size * self.num_pictures, size)]


@dataclass(frozen=True, slots=True)
class Failed:
    job_id: str
    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, slots=True)
class Cancelled:
    job_id: str


@dataclass(frozen=True, slots=True)
class Pong:
    number: int


@dataclass(frozen=True, slots=True)
class Busy:
    """Sent twice a second by a worker that is long at one thing: it lives, though it answers no Ping."""

    seconds: float
    """How long it has been at it."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Sent about once a second while jobs run, and whenever the worker turns idle."""

    num_jobs: int
    forwards: int
    """Denoiser forwards since the last Stats."""
    rows: int
    """Real rows in those forwards (padding not counted)."""
    padded_rows: int
    busy_s: float
    step_s: Mapping[str, float]
    """Measured seconds per forward by shape key, e.g. {"128x128": 0.0093}."""
    adapters_resident: int = 0
    adapter_bytes: int = 0
    adapter_hits: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    resident_routes: list[str] = field(default_factory=list)
    text_hits: int = 0
    """Calls of text encoders since the last Stats whose result was remembered, and those that ran."""
    text_misses: int = 0
    text_bytes: int = 0
    """What the remembered results take now."""


ToWorker = LoadModel | AddAdapter | RemoveAdapter | PrefetchAdapter | Generate | Cancel | Ping | Shutdown
FromWorker = (
    Loading
    | Placed
    | Ready
    | Measured
    | LoadFailed
    | AdapterAdded
    | AdapterFailed
    | Progress
    | Preview
    | Done
    | Failed
    | Cancelled
    | Pong
    | Busy
    | Stats
)
Message = ToWorker | FromWorker

EXIT_PERMANENT = 78
"""Exit status of a worker that would fail again at start (sysexits' EX_CONFIG)."""
EXIT_UNPLACED = 75
"""Exit status of a worker for which there was no machine; it says nothing of the model (EX_TEMPFAIL)."""

_CLASSES = {cls.__name__: cls for cls in (*ToWorker.__args__, *FromWorker.__args__)}
_CODECS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(cls) for name, cls in _CLASSES.items()}
_WITH_PAYLOAD = {name for name, cls in _CLASSES.items() if "payload" in cls.__dataclass_fields__}
_LENGTH = struct.Struct(">I")
_IS = b'{"is":"'
"""How each header begins."""
_PICTURES: Any = {"__all__": {"pixels"}}
_PIXELS: Any = {
    "payload": True,
    "spec": {"images": _PICTURES, "mask": {"pixels"}, "control_images": _PICTURES},
}
"""The fields that do not travel in the header."""


def encode(message: Message) -> bytes:
    """One frame for `message`."""
    name = type(message).__name__
    head = json.dumps({"is": name, **_fields(message)}, separators=(",", ":"), ensure_ascii=False).encode()
    payload: tuple[bytes, ...] = ()
    if isinstance(message, Preview | Done):
        payload = (message.payload,)
    elif isinstance(message, Generate):
        payload = tuple(picture.pixels for picture in message.spec.pictures)
    return b"".join((_LENGTH.pack(len(head)), head, *payload))


def kind(frame: bytes) -> str:
    """The class's name of the message in a frame of `encode`, without decoding it."""
    return frame[_LENGTH.size + len(_IS) : 64].partition(b'"')[0].decode()


def decode(frame: bytes) -> Message:
    """The message in `frame`; ValueError for anything that `encode` did not make."""
    try:
        (length,) = _LENGTH.unpack_from(frame)
        fields = json.loads(frame[_LENGTH.size : _LENGTH.size + length])
        name, payload = fields.pop("is"), frame[_LENGTH.size + length :]
        known: dict[str, Any] = {}
        if name in _WITH_PAYLOAD:
            known, payload = {"payload": payload}, b""
        elif name == Generate.__name__:
            known["spec"], payload = _with_pixels(fields["spec"], payload)
        message: Message = _CODECS[name].validate_python(fields | known)
        if _fields(message) != fields or payload:  # pydantic drops what it does not know
            raise ValueError(f"{name} has more than its fields, or one of another type")
    except (struct.error, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not a message of this version: {error}") from error
    return message


def _fields(message: Message) -> dict[str, Any]:
    """The header's fields, as JSON has them."""
    fields: dict[str, Any] = _CODECS[type(message).__name__].dump_python(
        message, mode="json", exclude=_PIXELS
    )
    return fields


def _with_pixels(spec: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    """A spec's fields with the pixels of its pictures, and what is left of the payload."""

    def filled(picture: dict[str, Any]) -> dict[str, Any]:
        nonlocal payload
        length = picture["width"] * picture["height"] * picture["channels"]
        pixels, payload = payload[:length], payload[length:]
        if len(pixels) != length or length < 0:
            raise ValueError("a picture has fewer pixels than its size says")
        return picture | {"pixels": pixels}

    images = [filled(picture) for picture in spec["images"]]
    mask = spec["mask"] and filled(spec["mask"])
    controls = [filled(picture) for picture in spec["control_images"]]
    return spec | {"images": images, "mask": mask, "control_images": controls}, payload
