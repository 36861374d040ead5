"""Facts on model families, as data: what server and engine must know about a pipeline class before it loads.

A pipeline class without an entry runs, and merges where that is proven, with the values of DEFAULT and what
its signature says. An entry says what those do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of one pipeline class."""

    denoiser: str = "transformer"
    """Name of the component that runs once (or twice) a step."""
    default_steps: int | None = None
    """None: the pipeline's own default."""
    distilled_steps: int | None = None
    """Steps by default where guidance was distilled away (see `guided_when`)."""
    default_guidance: float | None = None
    """None: the pipeline's own default."""
    guidance_argument: str | None = "guidance_scale"
    """Name of the pipeline argument that `guidance_scale` feeds; None: the model ignores guidance."""
    guided_when: tuple[str, bool] | None = None
    """Key and value in the denoiser's or the pipeline's configuration where guidance has an effect."""
    negative_prompt: bool = True
    """Whether a negative prompt changes the picture without any further argument."""
    guidance_schedule_argument: str | None = None
    """Name of the pipeline argument with a guidance for each step; it gives way to `guidance_scale`."""
    implied_negative_prompt: str | None = None
    """Handed over when a request has none, for pipelines that guide only against a negative prompt."""
    text_length_argument: str | None = "max_sequence_length"
    """Name of the pipeline argument that says how many tokens of the prompt count."""
    patch: int = 2
    """Width and height are multiples of the VAE's factor times this."""
    max_pictures: int = 1
    """Most pictures of one request, where the class itself edits; 0: it cannot."""
    picture_mode: Literal["RGB", "RGBA"] = "RGB"
    """What the class itself wants its pictures to be, as Pillow calls it."""
    edits_only: bool = False
    """Whether the class makes pictures from pictures, and none from words alone."""
    tolerance_fp32: float = 0.004
    """Largest difference of any channel value (0 to 1) between a merged picture and plain diffusers'."""
    tolerance_bf16: float = 0.02


DEFAULT = Family()
"""For a pipeline class that is not listed."""

_QWEN_IMAGE = Family(
    default_steps=50,
    default_guidance=4.0,
    guidance_argument="true_cfg_scale",
    implied_negative_prompt=" ",
    tolerance_bf16=0.03,  # its texts are padded, and a mask takes other kernels
)

FAMILIES: Mapping[str, Family] = {
    "FluxPipeline": Family(
        default_steps=28,
        distilled_steps=4,
        default_guidance=3.5,
        guided_when=("guidance_embeds", True),
        negative_prompt=False,
    ),
    "FluxKontextPipeline": Family(
        default_steps=28,
        default_guidance=3.5,
        guided_when=("guidance_embeds", True),
        negative_prompt=False,
    ),
    "Flux2Pipeline": Family(max_pictures=4),
    "Flux2KleinPipeline": Family(
        default_steps=50,
        distilled_steps=4,
        default_guidance=4.0,
        guided_when=("is_distilled", False),
        negative_prompt=False,
        max_pictures=4,
    ),
    "StableDiffusionPipeline": Family(
        denoiser="unet",
        default_steps=30,
        default_guidance=7.5,
        text_length_argument=None,
        patch=1,
    ),
    "StableDiffusionXLPipeline": Family(
        denoiser="unet",
        default_steps=30,
        default_guidance=5.0,
        text_length_argument=None,
        patch=1,
    ),
    "StableDiffusion3Pipeline": Family(default_steps=28, default_guidance=7.0),
    "PixArtSigmaPipeline": Family(default_steps=20, default_guidance=4.5),
    "SanaPipeline": Family(default_steps=20, default_guidance=4.5, patch=1),
    "QwenImagePipeline": _QWEN_IMAGE,
    "QwenImageEditPipeline": replace(_QWEN_IMAGE, edits_only=True),
    "QwenImageEditPlusPipeline": replace(_QWEN_IMAGE, edits_only=True, max_pictures=3),
    "QwenImageLayeredPipeline": replace(_QWEN_IMAGE, edits_only=True, picture_mode="RGBA"),
    "GlmImagePipeline": Family(
        text_length_argument=None,  # its limit counts what is quoted in the prompt
        patch=4,
        max_pictures=0,  # diffusers 0.42 hands them on as transformers 5.23 and later do not take them
    ),
    "ZImagePipeline": Family(default_steps=50, default_guidance=5.0),
    "HunyuanImagePipeline": Family(
        guidance_argument="distilled_guidance_scale", guided_when=("guidance_embeds", True)
    ),
    "Ideogram4Pipeline": Family(default_guidance=7.0, guidance_schedule_argument="guidance_schedule"),
    "QwenImage21Pipeline": Family(guidance_argument="true_cfg_scale", implied_negative_prompt=" "),
    "StableCascadeCombinedPipeline": Family(guidance_argument="prior_guidance_scale"),
    "WuerstchenCombinedPipeline": Family(guidance_argument="prior_guidance_scale"),
}
"""The pipeline classes of which more is known than their signature says, by name."""


def family(pipeline_class: str) -> Family:
    """The entry of `pipeline_class`, or DEFAULT."""
    return FAMILIES.get(pipeline_class, DEFAULT)
