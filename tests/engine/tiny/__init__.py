"""Small pipelines with random weights: a few hundred kB, millisecond forwards, tokenizers made on the spot.

`build("flux")` gives a pipeline, `save("flux", folder)` one that `from_pretrained` loads, `call("flux")` the
arguments that keep its run short (size, text length). The same name always gives the same weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers as d
import torch

from tests.engine.tiny import families, others, vision, wider


@dataclass(frozen=True, slots=True)
class Tiny:
    """One small pipeline."""

    pipeline: str
    """Its class in diffusers."""
    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of every call, on top of width and height."""
    size: int = 32
    publish: Callable[[Any, Path], None] = lambda pipe, folder: None
    """Makes a saved folder what a published model looks like."""


TEXT = {"max_sequence_length": 32}
KLEIN = {**TEXT, "text_encoder_out_layers": (1, 2)}
UNBINNED = {"use_resolution_binning": False}
SANA = {**TEXT, **UNBINNED, "complex_human_instruction": None}

FAMILIES: dict[str, Tiny] = {
    "flux": Tiny("FluxPipeline", families.flux, TEXT, 64),
    "flux-schnell": Tiny("FluxPipeline", families.flux_schnell, TEXT, 64),
    "flux2-klein": Tiny("Flux2KleinPipeline", families.flux2_klein, KLEIN),
    "stable-diffusion": Tiny("StableDiffusionPipeline", families.stable_diffusion),
    "stable-diffusion-xl": Tiny("StableDiffusionXLPipeline", families.stable_diffusion_xl),
    "stable-diffusion-3": Tiny("StableDiffusion3Pipeline", families.stable_diffusion_3, TEXT),
    "pixart-sigma": Tiny("PixArtSigmaPipeline", families.pixart_sigma, {**TEXT, **UNBINNED}),
    "sana": Tiny("SanaPipeline", families.sana, SANA),
    "qwen-image": Tiny("QwenImagePipeline", families.qwen_image),
    "z-image": Tiny("ZImagePipeline", families.z_image, {"max_sequence_length": 64}, 64),
}
"""Pipelines whose denoiser has a rule."""

OTHERS: dict[str, Tiny] = {
    "latent-consistency": Tiny("LatentConsistencyModelPipeline", others.latent_consistency),
    "pixart-alpha": Tiny("PixArtAlphaPipeline", others.pixart_alpha, {**TEXT, **UNBINNED}),
    "lumina2": Tiny("Lumina2Pipeline", others.lumina2, {"max_sequence_length": 256}, 64),
    "aura-flow": Tiny("AuraFlowPipeline", others.aura_flow, TEXT),
    "cogview3-plus": Tiny("CogView3PlusPipeline", others.cogview3_plus, TEXT),
    "cogview4": Tiny("CogView4Pipeline", others.cogview4, TEXT),
    "hunyuan-dit": Tiny("HunyuanDiTPipeline", others.hunyuan_dit, UNBINNED, 64),
    "chroma": Tiny("ChromaPipeline", others.chroma, TEXT),
    "kandinsky3": Tiny("Kandinsky3Pipeline", others.kandinsky3, size=64),
    "ovis-image": Tiny("OvisImagePipeline", others.ovis_image, {"max_sequence_length": 64}),
}
"""Pipelines without a tested rule."""

EDITORS: dict[str, Tiny] = {
    "stable-diffusion-3-wide": Tiny("StableDiffusion3Pipeline", families.stable_diffusion_3_wide, TEXT)
}
"""Pipelines for the tests with pictures alone."""


def _pag(name: str, base: str, layers: str = "blocks.1") -> Tiny:
    """The components of `base` in its class for perturbed-attention guidance, which is on by default."""
    tiny = {**FAMILIES, **OTHERS, **WIDER}[base]
    return Tiny(
        name, lambda: wider.as_class(name, tiny.make, pag_applied_layers=layers), tiny.call, tiny.size
    )


WIDER: dict[str, Tiny] = {
    "bria": Tiny("BriaPipeline", wider.bria, TEXT),
    "bria-fibo": Tiny("BriaFiboPipeline", wider.bria_fibo, TEXT),
    "ernie-image": Tiny("ErnieImagePipeline", wider.ernie),
    "flux-kontext": Tiny(
        "FluxKontextPipeline",
        lambda: wider.as_class("FluxKontextPipeline", families.flux),
        {**TEXT, "max_area": 64 * 64, "_auto_resize": False},
        64,
    ),
    "flux2-klein-kv": Tiny(
        "Flux2KleinKVPipeline", lambda: wider.as_class("Flux2KleinKVPipeline", families.flux2_klein), KLEIN
    ),
    "hidream": Tiny("HiDreamImagePipeline", wider.hidream, TEXT),
    "hunyuan-image": Tiny("HunyuanImagePipeline", wider.hunyuan_image, {}, 32),
    "deepfloyd-if": Tiny("IFPipeline", wider.deepfloyd, {}, 32),
    "ideogram4": Tiny(
        "Ideogram4Pipeline",
        wider.ideogram4,
        {"guidance_schedule": None, "guidance_scale": 5.0, "max_sequence_length": 128},
    ),
    "kandinsky": Tiny("KandinskyCombinedPipeline", wider.kandinsky, {"prior_num_inference_steps": 2}, 64),
    "kandinsky-2.2": Tiny(
        "KandinskyV22CombinedPipeline", wider.kandinsky22, {"prior_num_inference_steps": 2}, 64
    ),
    "kolors": Tiny("KolorsPipeline", wider.kolors, {"max_sequence_length": 64}),
    "krea2": Tiny("Krea2Pipeline", wider.krea2, {"max_sequence_length": 64}),
    "latent-diffusion": Tiny("LDMTextToImagePipeline", wider.latent_diffusion, {}, 64),
    "lumina": Tiny("LuminaPipeline", wider.lumina, {"max_sequence_length": 64}, 32),
    "prx": Tiny("PRXPipeline", wider.prx, UNBINNED, publish=wider.publish_prx),
    "prx-pixel": Tiny("PRXPixelPipeline", lambda: wider.prx(pixel=True), UNBINNED),
    "sana-sprint": Tiny("SanaSprintPipeline", wider.sana_sprint, {**SANA, "num_inference_steps": 2}),
    "stable-cascade": Tiny(
        "StableCascadeCombinedPipeline", wider.cascade, {"prior_num_inference_steps": 2}, 128
    ),
    "stable-unclip": Tiny("StableUnCLIPPipeline", wider.unclip, {"prior_num_inference_steps": 2}),
    "wuerstchen": Tiny("WuerstchenCombinedPipeline", wider.wuerstchen, {"prior_num_inference_steps": 2}, 128),
    "z-image-omni": Tiny("ZImageOmniPipeline", wider.z_image_omni, {"max_sequence_length": 64}, 64),
}
"""The rest of diffusers' classes that need no package for pictures."""

WIDER |= {
    "stable-diffusion-pag": _pag("StableDiffusionPAGPipeline", "stable-diffusion", "mid"),
    "stable-diffusion-xl-pag": _pag("StableDiffusionXLPAGPipeline", "stable-diffusion-xl", "mid"),
    "stable-diffusion-3-pag": _pag("StableDiffusion3PAGPipeline", "stable-diffusion-3"),
    "hunyuan-dit-pag": _pag("HunyuanDiTPAGPipeline", "hunyuan-dit"),
    "pixart-sigma-pag": _pag("PixArtSigmaPAGPipeline", "pixart-sigma"),
    "sana-pag": _pag("SanaPAGPipeline", "sana"),
    "kolors-pag": _pag("KolorsPAGPipeline", "kolors", "mid"),
}

VISION: dict[str, Tiny] = {
    "bria-fibo-2": Tiny("BriaFibo2Pipeline", vision.bria_fibo2),
    "cosmos-2": Tiny("Cosmos2TextToImagePipeline", wider.cosmos2, TEXT),
    "dreamlite": Tiny("DreamLitePipeline", vision.dreamlite, {}, 32),
    "dreamlite-mobile": Tiny(
        "DreamLiteMobilePipeline", lambda: vision.dreamlite(d.DreamLiteMobilePipeline), {}, 32
    ),
    "flux2": Tiny(
        "Flux2Pipeline", vision.flux2, {"max_sequence_length": 512, "text_encoder_out_layers": (1, 2)}
    ),
    "glm-image": Tiny("GlmImagePipeline", vision.glm_image, {}, 64),
    "kandinsky5": Tiny("Kandinsky5T2IPipeline", vision.kandinsky5, {}, 32),
    "longcat": Tiny("LongCatImagePipeline", vision.longcat, {"enable_prompt_rewrite": False}),
    "nucleus-moe": Tiny("NucleusMoEImagePipeline", vision.nucleus),
    "omnigen": Tiny("OmniGenPipeline", vision.omnigen, {}, 32),
    "qwen-image-2.1": Tiny("QwenImage21Pipeline", vision.qwen_image21, {}, 64),
}
"""Classes that need the package torchvision."""

VISION_EDITORS: dict[str, Tiny] = {
    "qwen-image-edit": Tiny("QwenImageEditPipeline", vision.qwen_image_edit, {}, 32),
    "qwen-image-edit-plus": Tiny(
        "QwenImageEditPlusPipeline", lambda: vision.qwen_image_edit(d.QwenImageEditPlusPipeline), {}, 32
    ),
    "qwen-image-layered": Tiny("QwenImageLayeredPipeline", vision.qwen_image_layered, {"layers": 2}, 640),
}
"""Those of them that make nothing from words alone."""

ALL = {**FAMILIES, **OTHERS, **EDITORS}
EVERY = {**ALL, **WIDER, **VISION, **VISION_EDITORS}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A fresh pipeline, ready to call; seeded, so two builds are equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = EVERY[name].make()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                _randomise(part)
                part.requires_grad_(False).eval()
    if dtype != torch.float32:
        pipe.to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, sizes: Sequence[tuple[int, int]] = ()
) -> Path:
    """The pipeline as a diffusers folder with safetensors weights, which says that it draws `sizes`."""
    pipe = build(name, dtype)
    pipe.save_pretrained(folder, safe_serialization=True)
    EVERY[name].publish(pipe, folder)
    if sizes:
        (folder / "mezzotint.json").write_text(json.dumps({"sizes": sizes}))
    return folder


def call(name: str) -> dict[str, Any]:
    """Arguments of a pipeline call that keep it short."""
    tiny = EVERY[name]
    return {"width": tiny.size, "height": tiny.size, **tiny.call}


def _randomise(module: torch.nn.Module) -> None:
    """Leaves nothing at zero, so that prompt, guidance and time all reach the picture."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        else:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
