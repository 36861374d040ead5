"""From a request to the arguments of a pipeline's `__call__`, and the warnings that go with the answer."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin

from diffusers.guiders import BaseGuidance

from mezzotint.engine.manifest import EMPTY, FILE, Manifest
from mezzotint.errors import InvalidRequestError, ModelLoadError, echo, nearest
from mezzotint.families import Family, family
from mezzotint.input_pictures import Size, output_size, to_image
from mezzotint.spec import MAX_SEED, MAX_STEPS, EngineSettings, ImageSpec, sizes_text

DEFAULTS = EngineSettings()

_TRUE_GUIDANCE = "true_cfg_scale"
"""Lets some models that have no negative prompt use one after all."""
_OURS = frozenset(
    (
        *("prompt", "negative_prompt", "num_inference_steps", "width", "height", "generator", "output_type"),
        *("image", "mask_image", "strength"),
        *("return_dict", "num_images_per_prompt", "callback_on_step_end", "callback", "callback_steps"),
    )
)
"""Pipeline arguments that neither `extra` nor an endpoint's `arguments` may set."""
_USUAL_STEPS = 28
"""Where a pipeline has no default."""

_log = logging.getLogger(__name__)


class PipelineProfile:
    """What is fixed for one loaded pipeline: its defaults and limits, and how it wants to be called."""

    def __init__(
        self,
        pipe: Any,
        known: Family | None = None,
        manifest: Manifest = EMPTY,
        settings: EngineSettings = DEFAULTS,
    ) -> None:
        """`known` is the family of the pipeline that this one was made over, else that of its class.

        ModelLoadError for endpoint settings that this pipeline cannot have.
        """
        self.pipe = pipe
        self.manifest = manifest
        self.family: Family = known or family(type(pipe).__name__)
        self.denoiser_name = _denoiser_name(pipe, self.family)
        self.denoiser: Any = pipe.components.get(self.denoiser_name)
        parameters = inspect.signature(pipe.__call__).parameters
        self.parameters = parameters
        self.open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self.size_multiple = int(getattr(pipe, "vae_scale_factor", 8)) * self.family.patch
        self.size_is_guessed = not isinstance(_default_of(parameters, "height"), int)
        self.width, self.height = _default_size(pipe, self.denoiser, parameters)
        self._guiders = _guiders(pipe)
        self._guided_by_argument = self._has_guidance_argument(pipe)
        self.guidance_effective = self._guided_by_argument or bool(self._guiders)
        self.tokenizer, self.max_prompt_tokens = self._text_limit(pipe)
        own_steps = _default_of(parameters, "num_inference_steps")
        own_steps = min(own_steps, MAX_STEPS) if isinstance(own_steps, int) else _USUAL_STEPS
        self.default_steps = self.family.default_steps or own_steps
        if not self.guidance_effective and self.family.distilled_steps is not None:
            self.default_steps = self.family.distilled_steps
        self.default_guidance = self.family.default_guidance
        self.fixed: Mapping[str, Any] = {
            name: value for name, value in settings.arguments.items() if known is None or self._takes(name)
        }
        """Arguments of every call, by the endpoint's settings."""
        self.settings = settings
        self._heed_manifest()
        self._heed_settings()

    def _heed_manifest(self) -> None:
        """What the model's maker recommends goes before what is usual in the family."""
        said = self.manifest
        self.default_steps = said.num_inference_steps or self.default_steps
        if said.guidance_scale is not None:
            self.default_guidance = said.guidance_scale
        for width, height in said.sizes:
            if width % self.size_multiple or height % self.size_multiple:
                raise ModelLoadError(
                    f"{FILE}: sizes: this model draws multiples of {self.size_multiple} pixels "
                    f"(got {width}x{height}); correct the file",
                    code="corrupt_file",
                )
        if said.sizes:
            self.width, self.height = said.sizes[0]
            self.size_is_guessed = False

    def _heed_settings(self) -> None:
        """What the endpoint's owner wants goes before all of that."""
        said = self.settings
        self.default_steps = said.default_steps or self.default_steps
        if said.default_guidance is not None:
            self.default_guidance = said.default_guidance
        self.width, self.height = said.width or self.width, said.height or self.height
        self.size_is_guessed = self.size_is_guessed and not (said.width and said.height)
        for name, size in (("width", said.width), ("height", said.height)):
            if size is not None and size % self.size_multiple:
                raise ModelLoadError(
                    f"{name} must be a multiple of {self.size_multiple} for this model (got {size}); "
                    "change the endpoint's setting",
                    code="invalid_setting",
                )
        for name, value in self.fixed.items():
            self._require_argument(name, value)

    def _require_argument(self, name: str, value: Any) -> None:
        """ModelLoadError unless the pipeline's call takes this from an endpoint's settings."""
        reason = ""
        if name in _OURS:
            reason = "is set by each request"
        elif name == self.family.guidance_argument:
            reason = "is what guidance_scale sets; use default_guidance"
        elif not self._takes(name):
            near = nearest(name, [each for each in self.parameters if each not in _OURS])
            hint = f"; did you mean {near}?" if near else ""
            reason = f"is not an argument of {type(self.pipe).__name__}{hint}"
        elif not _fits(self.parameters.get(name), value):
            reason = f"must be {_words_of(self.parameters[name].annotation)} (got {echo(value)})"
        if reason:
            raise ModelLoadError(f"arguments: {echo(name)} {reason}", code="invalid_setting")

    def learn_size(self, width: object, height: object) -> None:
        """Takes over the size that the pipeline was seen to draw when it was told none."""
        sides = (width, height)
        if self.size_is_guessed and all(
            isinstance(side, int) and side > 0 and side % self.size_multiple == 0 for side in sides
        ):
            said = self.settings
            self.width, self.height = said.width or int(str(width)), said.height or int(str(height))
            self.size_is_guessed = False

    def pipe_for(self, spec: ImageSpec) -> Any:
        """The pipeline for `spec`; one that is guided by components has them at its guidance."""
        guidance = self.default_guidance if spec.guidance_scale is None else spec.guidance_scale
        if not self._guiders or guidance is None:
            return self.pipe
        own = copy.copy(self.pipe)
        for name, guider in self._guiders.items():
            own.__dict__[name] = guider.new(guidance_scale=float(guidance))
        return own

    @property
    def guided_by(self) -> str | None:
        """The argument or the component that `guidance_scale` feeds; None: it has no effect."""
        if self._guided_by_argument:
            return self.family.guidance_argument
        return ", ".join(self._guiders) or None

    @property
    def supports_negative_prompt(self) -> bool:
        takes = self.family.negative_prompt or _TRUE_GUIDANCE in self.fixed
        return takes and "negative_prompt" in self.parameters

    def _has_guidance_argument(self, pipe: Any) -> bool:
        if self.family.guidance_argument not in self.parameters:
            return False
        if self.family.guided_when is None:
            return True
        key, wanted = self.family.guided_when
        for config in (getattr(self.denoiser, "config", {}), pipe.config):
            if key in config:
                return bool(config[key]) == wanted
        return True

    def _text_limit(self, pipe: Any) -> tuple[Any, int | None]:
        """The tokenizer of the longest text encoder (by custom the last), and how many tokens count."""
        names = sorted(name for name in pipe.components if name.startswith("tokenizer"))
        parts = [pipe.components[name] for name in names]
        tokenizers = [
            getattr(part, "tokenizer", part) for part in parts if part is not None
        ]  # of a processor
        if not tokenizers:
            return None, None
        limits = [int(getattr(tokenizers[-1], "model_max_length", 0) or 10**30)]
        parameter = self.parameters.get(self.family.text_length_argument or "")
        if parameter is not None and isinstance(parameter.default, int):
            limits.append(parameter.default)
        limit = min(limits)
        return tokenizers[-1], limit if limit < 10**6 else None

    def call_arguments(self, spec: ImageSpec) -> tuple[dict[str, Any], list[str]]:
        """The arguments of `__call__` for `spec`, and warnings; InvalidRequestError says what is wrong."""
        self._check(spec)
        warnings: list[str] = []
        width, height = self.size(spec)
        arguments: dict[str, Any] = {
            "prompt": spec.prompt,
            "num_inference_steps": spec.num_inference_steps,
            "width": width,
            "height": height,
            "output_type": "np",
            **self.fixed,
        }
        if "max_area" in self.parameters:  # Kontext's, which scales every size to it
            arguments.setdefault("max_area", width * height)
        if (spec.width or width, spec.height or height) != (width, height):
            warnings.append("width and height had no effect: this model chooses them itself")
        self._add_pictures(spec, arguments, (width, height))
        self._add_controls(spec, arguments, (width, height))
        self._add_guidance(spec, arguments, warnings)
        self._add_negative_prompt(spec, arguments, warnings)
        self._add_text_length(spec, arguments, warnings)
        if unknown := self.manifest.warning(spec.prompt):
            warnings.append(unknown)
        arguments |= spec.extra
        return {name: value for name, value in arguments.items() if self._takes(name)}, warnings

    def size(self, spec: ImageSpec) -> Size:
        """Width and height of the picture that `spec` makes."""
        own = self.width, self.height
        if not self.takes_size:
            return own
        if not spec.images or self.manifest.sizes:
            return spec.width or own[0], spec.height or own[1]
        return output_size(spec.images[0], spec.width, spec.height, own=own, multiple=self.size_multiple)

    def _add_pictures(self, spec: ImageSpec, arguments: dict[str, Any], size: Size) -> None:
        """A model with a strength begins from a picture of its own size; others look at pictures of any."""
        if not spec.images:
            return
        if "strength" in self.parameters:
            arguments["image"] = to_image(spec.images[0], size)
            arguments["strength"] = spec.strength
        else:
            images = [to_image(picture).convert(self.family.picture_mode) for picture in spec.images]
            arguments["image"] = images if self.family.max_pictures > 1 else images[0]
        if spec.mask is not None:
            arguments["mask_image"] = to_image(spec.mask, size)

    def _add_controls(self, spec: ImageSpec, arguments: dict[str, Any], size: Size) -> None:
        """Pictures for ControlNets; of pipelines with several each argument is a list."""
        if not spec.control_images:
            return
        many = len(spec.control_images) > 1
        controls = [to_image(picture, size) for picture in spec.control_images]
        name = "control_image" if "control_image" in self.parameters else "image"
        arguments[name] = controls if many else controls[0]
        if spec.controlnet_weights:
            weights = [float(weight) for weight in spec.controlnet_weights]
            arguments["controlnet_conditioning_scale"] = weights if many else weights[0]

    @property
    def takes_size(self) -> bool:
        """Whether a request can set width and height; else the pipeline chooses them itself.

        One with a strength draws in the size of the picture that it begins from, which is ours to set.
        """
        return self._takes("width") or "strength" in self.parameters

    def _takes(self, name: str) -> bool:
        return name in self.parameters or self.open_ended

    def _check(self, spec: ImageSpec) -> None:
        steps = spec.num_inference_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
            raise InvalidRequestError(
                f"num_inference_steps must be an integer between 1 and {MAX_STEPS} (got {echo(steps)})",
                code="out_of_range",
                param="num_inference_steps",
            )
        for name in ("width", "height"):
            size = getattr(spec, name)
            if size is not None and (size <= 0 or size % self.size_multiple):
                rule = f"a positive multiple of {self.size_multiple} for this model"
                raise InvalidRequestError(
                    f"{name} must be {rule} (got {echo(size)})", code="out_of_range", param=name
                )
        size = self.size(spec)
        if self.manifest.sizes and size not in self.manifest.sizes:
            raise InvalidRequestError(
                f"width x height must be {sizes_text(self.manifest.sizes)} for this model "
                f"(got {sizes_text([size])})",
                code="out_of_range",
                param="height" if spec.width is None else "width",
            )
        if spec.seed is not None and not 0 <= spec.seed <= MAX_SEED:
            raise InvalidRequestError(
                f"seed must be between 0 and 2**63-1 (got {echo(spec.seed)})",
                code="out_of_range",
                param="seed",
            )
        for name in spec.extra:
            if name in _OURS or not self._takes(name):
                reason = (
                    "is set by the request itself" if name in _OURS else "is not an argument of this pipeline"
                )
                raise InvalidRequestError(
                    f"extra: {echo(name)} {reason}", code="unknown_field", param="extra"
                )

    def _add_guidance(self, spec: ImageSpec, arguments: dict[str, Any], warnings: list[str]) -> None:
        if not self.guidance_effective:
            if spec.guidance_scale is not None:
                warnings.append("guidance_scale had no effect: this model does not use it")
            return
        schedule = self.family.guidance_schedule_argument
        if schedule is not None:
            if spec.guidance_scale is None and self.settings.default_guidance is None:
                own = arguments.get(schedule, _default_of(self.parameters, schedule))
                if own is not None and len(own) == spec.num_inference_steps:
                    return
            arguments[schedule] = None
        guidance = self.default_guidance if spec.guidance_scale is None else spec.guidance_scale
        if guidance is not None and self._guided_by_argument:
            assert self.family.guidance_argument is not None, "effective guidance has an argument"
            arguments[self.family.guidance_argument] = float(guidance)

    def _add_negative_prompt(self, spec: ImageSpec, arguments: dict[str, Any], warnings: list[str]) -> None:
        negative = spec.negative_prompt
        if negative is None:
            negative = self.family.implied_negative_prompt
        if negative is None:
            return
        arguments["negative_prompt"] = negative
        if not self.supports_negative_prompt and _TRUE_GUIDANCE not in spec.extra:
            warnings.append("negative_prompt had no effect: this model does not use it")
            del arguments["negative_prompt"]

    def _add_text_length(self, spec: ImageSpec, arguments: dict[str, Any], warnings: list[str]) -> None:
        """A text encoder shorter than the pipeline's default gets its own length; what is cut is said."""
        name = self.family.text_length_argument
        limit = self.max_prompt_tokens
        if name is not None and name in self.parameters and limit != self.parameters[name].default and limit:
            arguments.setdefault(name, limit)
        limit = {**self.fixed, **spec.extra}.get(name, limit) if name else limit
        num_tokens = self._num_tokens(spec.prompt)
        if limit is not None and num_tokens is not None and num_tokens > limit:
            warnings.append(f"prompt was cut: it has {num_tokens} tokens, this model reads the first {limit}")

    def _num_tokens(self, prompt: str) -> int | None:
        """None where the tokenizer wants to be called in another way; that must fail no request."""
        if self.tokenizer is None:
            return None
        try:
            return len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)
        except Exception as error:
            _log.debug("the prompt's tokens could not be counted", exc_info=error)
            return None


def _guiders(pipe: Any) -> dict[str, Any]:
    """The components that guide in place of an argument, by name."""
    return {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, BaseGuidance) and hasattr(part, "guidance_scale")
    }


def _default_of(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    """The default of a pipeline argument; None where it has none."""
    parameter = parameters.get(name)
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))


def _fits(parameter: inspect.Parameter | None, value: Any) -> bool:
    """Whether a value from a settings file may be what the parameter's annotation says, if it is plain."""
    if parameter is None:
        return True
    kinds = [get_origin(each) or each for each in get_args(parameter.annotation) or (parameter.annotation,)]
    kinds = [get_origin(each) or each for each in kinds]
    if not all(kind in _PLAIN for kind in kinds) or not _is_union_or_type(parameter.annotation):
        return True
    number = isinstance(value, int) and not isinstance(value, bool) and float in kinds
    sequence = isinstance(value, list) and tuple in kinds
    return type(value) in kinds or number or sequence


def _is_union_or_type(annotation: Any) -> bool:
    return annotation in _PLAIN or get_origin(annotation) in (Union, UnionType)


def _words_of(annotation: Any) -> str:
    return str(getattr(annotation, "__name__", annotation)).replace("typing.", "")


def _denoiser_name(pipe: Any, known: Family) -> str:
    """The component that runs at every step."""
    for name in (known.denoiser, "transformer", "unet", "decoder", "prior"):
        if pipe.components.get(name) is not None:
            return name
    return known.denoiser


def _default_size(pipe: Any, denoiser: Any, parameters: Mapping[str, inspect.Parameter]) -> tuple[int, int]:
    """(width, height) that the model was made for; for Flux and its like, what the VAE was trained on."""
    if isinstance(_default_of(parameters, "height"), int):
        return parameters["width"].default, parameters["height"].default
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    sample = getattr(getattr(denoiser, "config", None), "sample_size", None)
    if isinstance(sample, (tuple, list)):
        return int(sample[1]) * factor, int(sample[0]) * factor
    if isinstance(sample, int):
        return sample * factor, sample * factor
    vae = getattr(getattr(pipe, "vae", None), "config", {})
    side = vae.get("sample_size") or int(getattr(pipe, "default_sample_size", 128)) * factor
    return int(side), int(side)
