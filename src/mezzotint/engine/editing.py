"""What a pipeline can do with pictures, and the pipelines that do it over the same components.

A pipeline whose own call takes `image` edits by itself. For others diffusers has a sister class for
image-to-image and one for inpainting, called after it. They share every component with it, so they cost no
memory; each is made when the first request needs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import diffusers

from mezzotint.engine.arguments import PipelineProfile
from mezzotint.engine.models import controlnets
from mezzotint.input_pictures import require_controls, require_pictures
from mezzotint.spec import ImageSpec, default_strength

NO_CONTROLNETS: Mapping[str, Any] = MappingProxyType({})
_FROM_PICTURE = ("Img2Img", "image")
_REPAINT = ("Inpaint", "mask_image")
"""What a sister class has in its name, and an argument that its call must take."""


class Editing:
    """The ways in which one loaded pipeline turns a request into a picture."""

    def __init__(self, words: PipelineProfile, nets: Mapping[str, Any] = NO_CONTROLNETS) -> None:
        """`nets` are the ControlNets by route, in the order in which a request's pictures are for them."""
        self._words = words
        """The pipeline as it was loaded: for requests without pictures."""
        self.controlnets = nets
        self._made: dict[tuple[type, int], PipelineProfile] = {}
        """By class and number of ControlNets."""
        self._from_picture: type | None = None
        self._repaint: type | None = None
        self.min_pictures = int(words.family.edits_only)
        self.max_pictures = 0
        """Most pictures of one request; 0: words only."""
        if "image" in words.parameters:
            self.max_pictures = words.family.max_pictures
        else:
            self._from_picture = _sister(words.pipe, *_FROM_PICTURE)
            self._repaint = _sister(words.pipe, *_REPAINT)
            self.max_pictures = 1 if self._from_picture else 0
        self.masks = self._repaint is not None
        self.strength = self._from_picture is not None

    def profile(self, spec: ImageSpec) -> PipelineProfile:
        """The pipeline for this request; InvalidRequestError names what the model can do instead."""
        require_pictures(
            spec, "this model", min_pictures=self.min_pictures, max_pictures=self.max_pictures,
            masks=self.masks, strength=self.strength,
        )  # fmt: skip
        require_controls(
            len(spec.control_images), spec.controlnet_weights, "this model", tuple(self.controlnets),
            edits=bool(spec.images),
        )  # fmt: skip
        if spec.control_images:
            return self._over_the_same(controlnets.pipeline_class(self._words.pipe), len(spec.control_images))
        cls = self._repaint if spec.mask is not None else self._from_picture
        return self._words if not spec.images or cls is None else self._over_the_same(cls)

    def _over_the_same(self, cls: Any, num_nets: int = 0) -> PipelineProfile:
        """The pipeline of this class, with the first `num_nets` of the ControlNets."""
        if (cls, num_nets) not in self._made:
            words, nets = self._words, list(self.controlnets.values())[:num_nets]
            beside = {"controlnet": controlnets.together(words.pipe, nets)} if nets else {}
            pipe = _over_the_same(cls, words.pipe, beside)
            made = PipelineProfile(pipe, words.family, words.manifest, words.settings)
            self._made[cls, num_nets] = made
        return self._made[cls, num_nets]

    def filled(self, spec: ImageSpec) -> tuple[ImageSpec, list[str]]:
        """The spec with the strength that it runs at, and a warning where it names one without effect."""
        if self.strength and spec.images:
            strength = default_strength(spec) if spec.strength is None else spec.strength
            return replace(spec, strength=strength), []
        warned = spec.strength is not None
        warnings = ["strength had no effect: this model does not use it"] if warned else []
        return replace(spec, strength=None), warnings


def _sister(pipe: Any, word: str, argument: str) -> type | None:
    """The class of the same family with `word` in its name, if these components are all that it needs."""
    name = type(pipe).__name__.replace("Pipeline", f"{word}Pipeline")
    cls = getattr(diffusers, name, None)
    if cls is None:
        return None
    needed, _ = cls._get_signature_keys(cls)
    parameters = inspect.signature(cls.__init__).parameters
    required = {part for part in needed if parameters[part].default is inspect.Parameter.empty}
    takes = set(inspect.signature(cls.__call__).parameters)
    missing = required - set(cls._optional_components) - set(pipe.components)
    suits = not missing and {argument, "strength"} <= takes
    found: type | None = cls if suits else None
    return found


def _over_the_same(cls: Any, pipe: Any, beside: Mapping[str, Any]) -> Any:
    """A pipeline of this class over the very components of `pipe`, and those `beside` it.

    (diffusers' own `from_pipe` would also cast them.)
    """
    needed, options = cls._get_signature_keys(cls)
    parts = {name: part for name, part in pipe.components.items() if name in needed} | dict(beside)
    config = {name: pipe.config[name] for name in options if name in pipe.config}
    absent = {name: None for name in needed if name not in parts and name in cls._optional_components}
    return cls(**absent, **parts, **config)
