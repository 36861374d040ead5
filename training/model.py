"""The whole model: denoiser, text side, scheduler; kept as a checkpoint or as a diffusers folder."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from training.device import Setup
from training.latents import image_ids
from training.text import TEXT_LENGTH, WIDTH, TextSide

SHIFT = 1.0


def build_transformer(channels: int) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )


class Denoiser(nn.Module):
    """The transformer called as FluxPipeline calls it."""

    img_ids: torch.Tensor
    txt_ids: torch.Tensor

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.register_buffer("img_ids", image_ids(), persistent=False)
        self.register_buffer("txt_ids", torch.zeros(TEXT_LENGTH, 3), persistent=False)

    def forward(
        self,
        noisy: torch.Tensor,
        time: torch.Tensor,
        guidance: torch.Tensor,
        text: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """The velocity (noise minus picture) at `time` in 0..1."""
        states, pooled = text
        velocity: torch.Tensor = self.transformer(
            hidden_states=noisy,
            timestep=time,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            return_dict=False,
        )[0]
        return velocity


@dataclass(slots=True)
class Model:
    """All that is trained after the autoencoder."""

    denoiser: Denoiser
    text: TextSide

    def modules(self) -> dict[str, nn.Module]:
        return {"transformer": self.denoiser.transformer, "clip": self.text.clip, "t5": self.text.t5}

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for module in self.modules().values() for parameter in module.parameters()]

    def to(self, device: torch.device) -> Model:
        for module in (self.denoiser, self.text.clip, self.text.t5):
            module.to(device)
        return self

    def frozen_copy(self) -> Model:
        """A second set of weights that takes no gradient, sharing the tokenizers."""
        text = TextSide(
            self.text.tokenizer, self.text.tokenizer_2, deepcopy(self.text.clip), deepcopy(self.text.t5)
        )
        copy = Model(deepcopy(self.denoiser), text)
        for parameter in copy.parameters():
            parameter.requires_grad_(False)
        return copy

    @torch.no_grad()
    def follow(self, other: Model, decay: float) -> None:
        """Moves these weights towards the other's: the running average."""
        for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
            mine.lerp_(theirs, 1 - decay)


def as_pipeline(model: Model, vae: AutoencoderKL, shift: float = SHIFT) -> FluxPipeline:
    """The pipeline around these very weights."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=model.text.clip,
        tokenizer=model.text.tokenizer,
        text_encoder_2=model.text.t5,
        tokenizer_2=model.text.tokenizer_2,
        transformer=model.denoiser.transformer,
    )


def save_folder(model: Model, vae: AutoencoderKL, out: Path, shift: float = SHIFT) -> None:
    """Writes a diffusers folder in bf16 that FluxPipeline.from_pretrained loads."""
    copy = model.frozen_copy()
    pipeline = as_pipeline(copy, deepcopy(vae), shift)
    for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        nn.Module.to(part, dtype=torch.bfloat16)
    pipeline.save_pretrained(out, safe_serialization=True)
    for path in out.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # a path of the machine that trained
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_folder(folder: Path, setup: Setup) -> Model:
    """The trained parts of a diffusers folder in fp32, to go on from shipped weights."""
    text = TextSide(
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        AutoTokenizer.from_pretrained(folder / "tokenizer_2"),
        CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2").float(),
    )
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer").float()
    return Model(Denoiser(transformer), text).to(setup.device)
