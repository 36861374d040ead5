"""What the server knows of an endpoint's model: its abilities, its speed, and earlier measurements."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter

from mezzotint.config import EndpointSettings
from mezzotint.errors import InvalidRequestError
from mezzotint.input_pictures import output_size, require_controls, require_pictures
from mezzotint.messages import LoadModel, ModelInfo
from mezzotint.spec import LIMITS, MAX_PICTURES, ImageSpec, default_strength, sizes_text

GUESSED_STEP_S = 0.05
"""Seconds per step until the model has been measured."""
_CALIBRATED = (
    "model", "revision", "dtype", "device", "num_threads", "batching", "performance", "max_rows",
    "min_batch_gain", "max_batch_stretch", "offload",
)  # fmt: skip
"""Settings on which the calibrated rows, and so the promised bytes, may depend."""
_INFO = TypeAdapter(ModelInfo)
_CALIBRATED_IF_SET = ("width", "height", "scheduler", "scheduler_settings", "arguments")
"""Those that count only where they are set: what was measured before there were any still holds."""


@dataclass(frozen=True, slots=True)
class Profile:
    """An endpoint's settings and its model's own information, which is None until it has been loaded once."""

    spec: EndpointSettings
    info: ModelInfo | None
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a lone job's step by "WIDTHxHEIGHT", as the workers' latest steps took."""

    @property
    def rows(self) -> int:
        """Rows that a forward of this model can hold."""
        if self.info is None or self.spec.batching == "off" or not self.info.mergeable:
            return 1
        return self.spec.max_rows if self.spec.batching == "fast" else self.info.rows

    @property
    def pipeline(self) -> dict[str, Any]:
        """How the model is run, for a picture's file: dtype, and what is set of scheduler and arguments."""
        said = {name: getattr(self.spec, name) for name in ("scheduler", "scheduler_settings", "arguments")}
        known = {"dtype": self.info.dtype} if self.info else {}
        return known | {name: value for name, value in said.items() if value}

    @property
    def gain(self) -> float:
        """How many times merging raises throughput, by the calibration's table."""
        if self.info is None or not self.info.calibration:
            return 1.0
        rates = {int(entry["rows"]): entry["rows_per_s"] for entry in self.info.calibration}
        return max(1.0, rates.get(self.info.rows, 0.0) / rates[1]) if rates.get(1) else 1.0

    def size(self, width: int | None, height: int | None) -> tuple[int, int] | None:
        """Width and height of a request's picture in pixels; None while the model's own size is unknown."""
        wide = width or self.spec.width or (self.info.width if self.info else None)
        high = height or self.spec.height or (self.info.height if self.info else None)
        return (wide, high) if wide and high else None

    def size_of(self, spec: ImageSpec) -> tuple[int, int] | None:
        """As `size`, for a request whose picture may say what it leaves open."""
        own = self.size(None, None)
        if not spec.images or self.info is None or own is None or not self.info.takes_size:
            return self.size(spec.width, spec.height)
        if spec.width and spec.height:
            return spec.width, spec.height
        multiple = self.info.size_multiple
        size = output_size(spec.images[0], spec.width, spec.height, own=own, multiple=multiple)
        return self.nearest_size(*size) if self.info.sizes else size

    def filled(self, spec: ImageSpec) -> ImageSpec:
        """With the size and the strength that a request with pictures leaves open, if the model is known."""
        size = self.size_of(spec)
        if not spec.images or self.info is None or size is None:
            return spec
        strength = default_strength(spec) if spec.strength is None else spec.strength
        strength_used = strength if self.info.strength else spec.strength
        return replace(spec, width=size[0], height=size[1], strength=strength_used)

    @property
    def max_pixels(self) -> int | None:
        """Largest width x height of a picture; None while nobody knows the model's own size."""
        return self.spec.max_pixels or (4 * self.info.width * self.info.height if self.info else None)

    def nearest_size(self, width: int, height: int) -> tuple[int, int]:
        """The size that this endpoint can draw and that is nearest in area and shape to the one asked for."""
        width, height = (min(side, LIMITS["width"][1]) for side in (width, height))
        if self.info is None or self.max_pixels is None:
            return width, height
        if self.info.sizes:

            def distance(size: tuple[int, int]) -> tuple[float, float]:
                shape = abs(math.log(size[0] * height / (size[1] * width)))
                return shape, abs(math.log(size[0] * size[1] / (width * height)))

            return min(((w, h) for w, h in self.info.sizes), key=distance)
        step = self.info.size_multiple
        shrink = min(1.0, math.sqrt(self.max_pixels / (width * height)))
        fitted = [max(step, round(side * shrink / step) * step) for side in (width, height)]
        if fitted[0] * fitted[1] > self.max_pixels:
            long = fitted.index(max(fitted))
            fitted[long] = max(step, self.max_pixels // fitted[1 - long] // step * step)
        return fitted[0], fitted[1]

    def step_s(self, width: int | None, height: int | None) -> float:
        """Seconds that one step of a lone job takes: of this size as measured, else scaled by pixels.

        Before the first job's steps it is as calibrated.
        """
        if self.info is None or self.info.step_s <= 0:
            return GUESSED_STEP_S
        own = f"{self.info.width}x{self.info.height}"
        own_s = self.step_seconds.get(own, self.info.step_s)
        size = self.size(width, height)
        if size is None:
            return own_s
        scaled_s = own_s * (size[0] * size[1]) / (self.info.width * self.info.height)
        return self.step_seconds.get(f"{size[0]}x{size[1]}", scaled_s)

    def guidance_scale(self, asked: float | None) -> float | None:
        """The guidance asked for, else the endpoint's own unless the model is known to ignore it.

        (Otherwise the worker would warn a caller who asked for none.)
        """
        if asked is None and (self.info is None or self.info.guidance_effective):
            return self.spec.default_guidance
        return asked

    def work_s(self, spec: ImageSpec) -> float:
        """Seconds that this job would take alone; the text encoder and the decoder count as one step."""
        return (spec.num_steps + 1) * self.step_s(spec.width, spec.height)

    def check_controls(self, num_images: int, weights: Sequence[float], *, edits: bool = False) -> None:
        """InvalidRequestError unless the endpoint has ControlNets for so many pictures."""
        require_controls(num_images, weights, f"endpoint {self.spec.id}", self.controlnets, edits=edits)

    @property
    def controlnets(self) -> list[str]:
        """The routes of the endpoint's ControlNets, in the order of a request's pictures for them."""
        return [each.route for each in self.spec.controlnets]

    def check(self, spec: ImageSpec) -> None:
        """InvalidRequestError if this model is known to be unable to draw this."""
        self.check_controls(len(spec.control_images), spec.controlnet_weights, edits=bool(spec.images))
        if self.info is None:
            return
        require_pictures(
            spec,
            f"endpoint {self.spec.id}",
            min_pictures=self.info.min_pictures,
            max_pictures=self.info.max_pictures,
            masks=self.info.masks,
            strength=self.info.strength,
        )
        for name, value in (("width", spec.width), ("height", spec.height)):
            if value is not None and value % self.info.size_multiple:
                raise InvalidRequestError(
                    f"{name} must be a multiple of {self.info.size_multiple} for endpoint {self.spec.id} "
                    f"(got {value})",
                    code="out_of_range",
                    param=name,
                )
        size = self.size(spec.width, spec.height)
        sizes = [(width, height) for width, height in self.info.sizes]
        if size and sizes and size not in sizes:
            raise InvalidRequestError(
                f"width x height must be {sizes_text(sizes)} for endpoint {self.spec.id} "
                f"(got {sizes_text([size])})",
                code="out_of_range",
                param="width" if spec.width else "height",
            )
        limit = self.max_pixels
        if size and limit and size[0] * size[1] > limit:
            raise InvalidRequestError(
                f"width x height must be at most {limit} pixels for endpoint {self.spec.id} "
                f"(got {size[0]} x {size[1]})",
                code="out_of_range",
                param="width" if spec.width else "height",
            )
        if spec.negative_prompt and not self.info.supports_negative_prompt:
            raise InvalidRequestError(
                f"endpoint {self.spec.id} runs a model without negative prompts; leave negative_prompt out",
                code="not_supported",
                param="negative_prompt",
            )


@dataclass(frozen=True, slots=True)
class Calibration:
    """What an earlier start measured. `fingerprint` is the `settings_digest` that it was measured under."""

    fingerprint: str
    info: ModelInfo
    load_s: float
    version: int = 0
    """The version of the endpoint whose worker measured it: the last one that is known to work."""

    def fits(self, spec: EndpointSettings) -> bool:
        return self.fingerprint == settings_digest(spec)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any] | None) -> Calibration | None:
        """None also for values of another version of the program; the worker then calibrates again."""
        if not values:
            return None
        try:
            # Before models edited pictures: what this one can do, its worker says with its next start.
            unknown = {"max_pictures": MAX_PICTURES, "masks": True, "strength": True}
            info = values["info"] if "max_pictures" in values["info"] else values["info"] | unknown
            info = {"form": info["performance"]} | info  # before there were forms, each setting had its own
            return replace(cls(**values), info=_INFO.validate_python(info))
        except (TypeError, KeyError, ValueError):
            return None


def settings_digest(spec: EndpointSettings) -> str:
    """Equal for settings that share a calibration."""
    values = {name: getattr(spec, name) for name in _CALIBRATED}
    if spec.performance == "max":  # begins as `auto`; what was measured names the form that it holds for
        values["performance"] = "auto"
    values |= {name: value for name in _CALIBRATED_IF_SET if (value := getattr(spec, name))}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def load_message(
    spec: EndpointSettings, calibration: Calibration | None, form: str | None = None
) -> LoadModel:
    """The first message to a worker. It repeats the calibrated rows, because bytes are promised.

    `form` is that of the deployment's other workers, which it must use too; None while there is none.
    """
    known = calibration if calibration and calibration.fits(spec) else None
    return LoadModel(
        spec.id,
        spec.model,
        spec.engine,
        rows=known.info.rows if known else None,
        proof=known.info.proof if known else None,
        form=form,
        rows_form=known.info.form if known else "",
        place=spec.ray,
    )
