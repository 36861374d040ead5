"""The vocabulary that all parts share: what to draw, with which adapters, and how a model is run.

A request is one ImageSpec from the wire to the file. The wire makes it, the messages carry it, the engine
consumes it, and the picture's file and the database store it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

ID_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Endpoint IDs and adapter routes."""
CODE_PERMISSION = r"^\S[^@]*@([0-9a-f]{40}|sha256:[0-9a-f]{64})$"
"""A source and the version of its code."""
MAX_STEPS = 50
MAX_SEED = 2**63 - 1
MAX_ADAPTERS = 8
"""Most adapters of one request."""
MAX_PICTURES = 16
"""Most pictures of one request, its mask aside."""
LIMITS: Mapping[str, tuple[int, int]] = {
    "num_inference_steps": (1, MAX_STEPS),
    "guidance_scale": (0, 100),
    "seed": (0, MAX_SEED),
    "n": (1, 8),
    "width": (8, 16384),
    "height": (8, 16384),
    "adapter scale": (-10, 10),
    "strength": (0, 1),
    "controlnet_weights": (0, 1),
}
"""Smallest and largest value of each number in a request; both are allowed."""

Batching = Literal["exact", "fast", "off"]
Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(ge=0)]


def between(name: str) -> Any:
    """The pydantic constraint for LIMITS[name]."""
    low, high = LIMITS[name]
    return Field(ge=low, le=high)


def sizes_text(sizes: Iterable[tuple[int, int]]) -> str:
    """Sizes in pixels for a message: `128x128 or 256x256`."""
    return " or ".join(f"{width}x{height}" for width, height in sizes)


def loading_text(stage: str, fraction: float | None) -> str:
    """What a model does before it is ready, for people: `loading the model (40 %)`."""
    return stage if fraction is None else f"{stage} ({round(fraction * 100)} %)"


def refuse_twice(what: str, names: list[str]) -> None:
    """ValueError if a name occurs twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} {twice[0]!r} stands twice; it must be unique")


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One LoRA adapter as a request uses it; a `scale` of None is the adapter's own."""

    route: str
    scale: float | None = None


@dataclass(frozen=True, slots=True)
class InputPicture:
    """A picture that a request brings along, decoded; or the mask of one."""

    width: int
    height: int
    pixels: bytes = field(repr=False)
    """uint8, row-major, height x width x channels."""
    channels: int = 3
    """3: red, green, blue; 1: a mask, 255 where the picture is repainted."""

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def num_bytes(self) -> int:
        """How many bytes `pixels` has."""
        return self.width * self.height * self.channels

    @property
    def digest(self) -> str:
        """SHA-256 (hex), equal for equal pictures."""
        return hashlib.sha256(b"%d %d %d " % (*self.size, self.channels) + self.pixels).hexdigest()


DEFAULT_STRENGTH = 0.8
"""How much of a picture is made anew where a request does not say it; what a mask shows is made all anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpec:
    """One image to draw. None means the default of the model or endpoint; a `seed` of None is drawn."""

    prompt: str
    num_inference_steps: int
    seed: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    adapters: tuple[AdapterUse, ...] = ()
    images: tuple[InputPicture, ...] = ()
    """What the image is made from; empty: from words alone."""
    mask: InputPicture | None = None
    """The part of the first picture that is repainted; everything else keeps its pixels."""
    strength: float | None = None
    """How much of the first picture is made anew, 0 to 1: the share of the steps that run."""
    control_images: tuple[InputPicture, ...] = ()
    """What the endpoint's ControlNets follow, in their order: the first picture is for the first of them."""
    controlnet_weights: tuple[float, ...] = ()
    """How much each of `control_images` counts, 0 to 1; empty: as the pipeline has it."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline's call, passed on unchanged. Library users set it; no request can."""

    @property
    def pictures(self) -> tuple[InputPicture, ...]:
        """Everything that came as pixels: the pictures, then the mask, then those for ControlNets."""
        return (*self.images, *filter(None, (self.mask,)), *self.control_images)

    @property
    def num_steps(self) -> int:
        """Denoising steps that run: below a strength of 1 only the last ones do."""
        if not self.images or self.strength is None:
            return self.num_inference_steps
        return max(1, min(int(self.num_inference_steps * self.strength), self.num_inference_steps))

    @property
    def routes(self) -> tuple[str, ...]:
        """Of the adapters that the image uses."""
        return tuple(use.route for use in self.adapters)


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One LoRA adapter as a worker gets to know it: its route and its checked safetensors file."""

    route: str
    path: str
    scale: float = 1.0
    """Strength where a request names none; 1 is as trained."""
    checksum: str = ""
    """SHA-256 (hex) of the file at registration; empty skips the check."""


def default_strength(spec: ImageSpec) -> float:
    """The strength of a request with a picture that names none."""
    return DEFAULT_STRENGTH if spec.mask is None else 1.0


class Table(BaseModel):
    """A table of settings: unknown names, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


def _dtype_of(value: object) -> object:
    """A dtype in our words where it is in torch's."""
    return _DTYPES.get(value.removeprefix("torch."), value) if isinstance(value, str) else value


def _performance_of(value: object) -> object:
    """`max` was called `compiled` once; databases and configuration files may still say so."""
    return "max" if value == "compiled" else value


class RayPlace(Table):
    """What each worker of an endpoint needs of the machine that Ray finds for it."""

    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    memory: Bytes = 0
    """Bytes that are set aside; 0 sets none aside."""
    resources: dict[str, float] = Field({})
    """Of those that the nodes were started with, by name."""
    accelerator_type: str | None = None
    """As Ray names it, such as `H100`."""
    placement: Literal["spread", "packed"] = "packed"


class ControlNetSettings(Table):
    """One ControlNet of an endpoint, as written in the configuration file."""

    route: str = Field(pattern=f"^{ID_PATTERN}$", description="Its name in answers and messages.")
    source: str = Field(
        min_length=1,
        description="A folder with `config.json` and safetensors, or a Hub repository "
        "(`owner/name[@revision]`).",
    )


class EngineSettings(Table):
    """How a model is loaded and run. An endpoint has all of these; each reaches its workers by name."""

    revision: str | None = Field(
        None, max_length=250, description="Branch, tag or commit of a Hub repository."
    )
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"], BeforeValidator(_dtype_of)] = Field(
        "auto",
        description="`auto` is bf16 on a GPU and on a CPU with AMX or AVX512-BF16, else fp32. torch's own "
        "words are understood, too (`float32`, `torch.bfloat16`).",
    )
    device: str = Field(
        "auto",
        pattern=r"^[a-z]{1,20}(:[0-9]{1,4})?$",
        description="`auto` (cuda, then mps, then cpu), or a torch device such as `cuda:1`.",
    )
    num_threads: int = Field(0, ge=0, le=1024, description="torch threads of the worker; 0 is one per core.")
    batching: Batching = Field(
        "exact",
        description="`exact`: a seed gives the same bytes under any load. `fast`: merge what is there. "
        "`off`: never merge.",
    )
    performance: Annotated[Literal["auto", "reference", "max"], BeforeValidator(_performance_of)] = Field(
        "auto",
        description="`reference` keeps plain diffusers' bytes; `auto` uses faster memory layouts; `max` also "
        "compiles the denoiser in the background, for the next start, where that is faster. `compiled` is an "
        "older name of `max`.",
    )
    max_rows: int = Field(16, ge=1, le=256, description="Most rows of one merged forward.")
    max_jobs: int = Field(
        64, ge=1, le=4096, description="Most jobs in flight in a worker; more wait in the server."
    )
    min_batch_gain: float = Field(
        1.4, ge=1, description="`exact` merges only if that raises throughput at least this many times."
    )
    max_batch_stretch: float = Field(
        2.5, ge=1, description="A merged forward may take at most this many times a single row's."
    )
    max_wait_s: Seconds = Field(20.0, description="A job that waited longer than this for a step goes first.")
    offload: bool = Field(False, description="Keep idle modules in host memory (slower; for small GPUs).")
    allow_remote_code: Annotated[str, Field(pattern=CODE_PERMISSION)] | None = Field(
        None,
        description="The one source whose own Python code may run, in one version: `owner/name@COMMIT` or "
        "`FOLDER@sha256:HASH`. The refusal of such a model says what to write.",
    )
    adapter_bytes: Bytes = Field(512 * 2**20, description="Byte budget for resident adapters in one worker.")
    text_cache_bytes: Bytes = Field(
        128 * 2**20,
        description="Byte budget, on the model's device, for remembered results of text encoders in one "
        "worker; 0 remembers none. Bytes of pictures do not depend on it.",
    )
    default_steps: Annotated[int, between("num_inference_steps")] | None = Field(
        None, description="Steps when a dialect lets them be unset."
    )
    default_guidance: Annotated[float, between("guidance_scale")] | None = Field(
        None, description="Guidance scale when unset."
    )
    width: Annotated[int, between("width")] | None = Field(
        None, description="Default width in pixels; the model's own when unset."
    )
    height: Annotated[int, between("height")] | None = Field(
        None, description="Default height in pixels; the model's own when unset."
    )
    scheduler: str | None = Field(
        None,
        pattern=r"^[A-Za-z][A-Za-z0-9]*$",
        description="Scheduler class of diffusers, such as `DPMSolverMultistepScheduler`; the model's own "
        "when unset.",
    )
    scheduler_settings: dict[str, Any] = Field(
        {}, description="Settings of the scheduler that differ from the model's: `{ shift = 5.0 }`."
    )
    arguments: dict[str, Any] = Field(
        {}, description="Arguments that every call of the pipeline gets: `{ clip_skip = 1 }`."
    )
    controlnets: tuple[ControlNetSettings, ...] = Field(
        (), description="ControlNets beside the model; a request's `control_images` use them in this order."
    )

    @field_validator("allow_remote_code", mode="before")
    @classmethod
    def _names_its_source(cls, value: object) -> object:
        if value is True:
            raise ValueError(
                "must name what may run, as owner/name@COMMIT or FOLDER@sha256:HASH; without it, the refusal "
                "of the model says what to write"
            )
        return None if value is False else value

    @field_validator("controlnets")
    @classmethod
    def _controlnets_are_unique(
        cls, controlnets: tuple[ControlNetSettings, ...]
    ) -> tuple[ControlNetSettings, ...]:
        refuse_twice("controlnet route", [each.route for each in controlnets])
        return controlnets
