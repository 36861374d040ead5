"""Writes the small Stable Diffusion as one file in its authors' own format, as checkpoints travel."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write(pipe: Any, path: Path) -> Path:
    """`pipe` is `tiny.build("stable-diffusion")`."""
    parts: list[tuple[str, Any, Callable[[str], str]]] = [
        ("model.diffusion_model.", pipe.unet, _unet_name),
        ("first_stage_model.", pipe.vae, _vae_name),
        ("cond_stage_model.transformer.text_model.", pipe.text_encoder, str),
    ]
    state = {
        prefix + rename(name): tensor.contiguous()
        for prefix, module, rename in parts
        for name, tensor in module.state_dict().items()
    }
    save_file(state, path)
    return path


def _unet_name(name: str) -> str:
    match = re.fullmatch(
        r"(down|up|mid)_blocks?\.(?:(\d)\.)?(resnets|attentions|\w+samplers)\.(\d)\.(.*)", name
    )
    if match is None:
        stem, _, leaf = name.rpartition(".")
        return f"{UNET[stem]}.{leaf}"
    side, block, kind, layer, rest = match.groups()
    if kind == "resnets":
        stem, _, leaf = rest.rpartition(".")
        rest = f"{RESNET[stem]}.{leaf}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(layer)}.{rest}"
    if side == "down":
        number = 1 + 2 * int(block) + (1 if kind == "downsamplers" else int(layer))
        place, rest = (
            f"input_blocks.{number}",
            rest.replace("conv.", "op.") if kind == "downsamplers" else rest,
        )
        return f"{place}.{1 if kind == 'attentions' else 0}.{rest}"
    number = 2 * int(block) + (1 if kind == "upsamplers" else int(layer))
    return f"output_blocks.{number}.{0 if kind == 'resnets' else 1}.{rest}"


def _vae_name(name: str) -> str:
    for old, new in VAE.items():
        name = re.sub(rf"(?<=\.){re.escape(old)}(?=\.)", new, name)
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    up = re.search(r"up_blocks\.(\d)\.", name)
    if up is not None:
        place = f"up.{2 - int(up[1])}."
        name = name.replace(up[0] + "resnets.", place + "block.").replace(
            up[0] + "upsamplers.0.", place + "upsample."
        )
    return name
