"""Random LoRA files for the tiny pipelines, in every layout that trainers write.

`LAYOUTS[family, layout](pipe, seed)` gives the tensors, `write` puts them into a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint.spec import AdapterUse

State = dict[str, Tensor]
Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""By layer: down [rank, in, ...] and up [out, rank, ...]."""

ATTENTION = r"attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
FEED_FORWARD = r"(ff|ff_context)\.net\.(0\.proj|2)$|proj_mlp$|single.*proj_out$"
MODULATION = r"(norm1|norm1_context|norm|norm_out)\.linear$"
CONVOLUTIONS = r"conv\d?$|conv_shortcut$|proj_in$|proj_out$"
TEXT = r"(q|k|v|out)_proj$|fc[12]$"
USUAL = f"{ATTENTION}|{FEED_FORWARD}"


def pairs(root: nn.Module, pattern: str = USUAL, *, rank: int = 4, seed: int = 0, size: float = 0.2) -> Pairs:
    """Random matrices for the layers whose names match."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in root.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and re.search(pattern, name):
            weight = module.weight
            down = torch.randn(rank, *weight.shape[1:], generator=generator) * size
            up = (
                torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator) * size
            )
            found[name] = (down, up)
    assert found, f"no layer matches {pattern}"
    return found


def peft(prefix: str, found: Pairs) -> State:
    """`transformer.<layer>.lora_A.weight`: PEFT's words, diffusers' prefix; ai-toolkit writes it too."""
    state = {}
    for name, (down, up) in found.items():
        state[f"{prefix}{name}.lora_A.weight"] = down
        state[f"{prefix}{name}.lora_B.weight"] = up
    return state


def kohya(prefix: str, found: Pairs, *, alpha: float = 2.0, rename: Callable[[str], str] = str) -> State:
    """`lora_unet_<layer>.lora_down.weight` with underscores for dots, and an alpha for each layer."""
    state: State = {}
    for name, (down, up) in found.items():
        key = prefix + rename(name).replace(".", "_")
        state |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(alpha),
        }
    return state


def old_diffusers(found: Pairs) -> State:
    """`unet.<attention>.processor.to_q_lora.down.weight`: diffusers before PEFT, attention only."""
    state = {}
    for name, (down, up) in found.items():
        parent, _, own = name.removesuffix(".0").rpartition(".")
        state[f"unet.{parent}.processor.{own}_lora.down.weight"] = down
        state[f"unet.{parent}.processor.{own}_lora.up.weight"] = up
    return state


def old_text_encoder(found: Pairs) -> State:
    """`text_encoder.<layer>.lora_linear_layer.down.weight`."""
    return {
        f"text_encoder.text_model.{name}.lora_linear_layer.{side}.weight": matrix
        for name, matrices in found.items()
        for side, matrix in zip(("down", "up"), matrices, strict=True)
    }


_FLUX = {
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{which}" for which in "qkv"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "double_blocks.0.img_mlp.2": ["transformer_blocks.0.ff.net.2"],
    "double_blocks.0.img_mod.lin": ["transformer_blocks.0.norm1.linear"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{which}_proj" for which in "qkv"],
    "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.net.0.proj"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.net.2"],
    "double_blocks.0.txt_mod.lin": ["transformer_blocks.0.norm1_context.linear"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
    "single_blocks.0.modulation.lin": ["single_transformer_blocks.0.norm.linear"],
}
"""Black Forest Labs' names of layers, and diffusers'."""


def _original_flux(pipe: Any, seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parts in _FLUX.items():
        weights = [pipe.transformer.get_submodule(part).weight for part in parts]
        down = torch.randn(4, weights[0].shape[1], generator=generator) * 0.2
        up = torch.randn(sum(len(weight) for weight in weights), 4, generator=generator) * 0.2
        found[name] = (down, up)
    return found


def flux_kohya(pipe: Any, seed: int) -> State:
    return kohya("lora_unet_", _original_flux(pipe, seed)) | kohya(
        "lora_te1_text_model_", pairs(pipe.text_encoder, TEXT, seed=seed)
    )


def flux_comfy(pipe: Any, seed: int) -> State:
    state = {}
    for name, (down, up) in _original_flux(pipe, seed).items():
        state[f"diffusion_model.{name}.lora_down.weight"] = down
        state[f"diffusion_model.{name}.lora_up.weight"] = up
        state[f"diffusion_model.{name}.alpha"] = torch.tensor(2.0)
    return state


def flux_underscored(pipe: Any, seed: int) -> State:
    return kohya("lora_transformer_", pairs(pipe.transformer, ATTENTION, seed=seed))


def flux_ai_toolkit(pipe: Any, seed: int) -> State:
    found = pairs(pipe.transformer, f"{USUAL}|{MODULATION}", seed=seed)
    return peft("transformer.", found) | {f"transformer.{name}.alpha": torch.tensor(2.0) for name in found}


def flux_xlabs(pipe: Any, seed: int) -> State:
    found = _original_flux(pipe, seed)
    single = pipe.transformer.single_transformer_blocks[0]
    generator = torch.Generator().manual_seed(seed)
    found_single = (
        torch.randn(4, single.attn.to_q.in_features, generator=generator) * 0.2,
        torch.randn(3 * single.attn.to_q.out_features, 4, generator=generator) * 0.2,
    )
    names = {
        "double_blocks.0.processor.qkv_lora1": found["double_blocks.0.img_attn.qkv"],
        "double_blocks.0.processor.qkv_lora2": found["double_blocks.0.txt_attn.qkv"],
        "double_blocks.0.processor.proj_lora1": found["double_blocks.0.img_attn.proj"],
        "double_blocks.0.processor.proj_lora2": found["double_blocks.0.txt_attn.proj"],
        "single_blocks.0.processor.qkv_lora": found_single,
        "single_blocks.0.processor.proj_lora": found["single_blocks.0.linear2"],
    }
    state = {}
    for name, (down, up) in names.items():
        state[f"{name}.down.weight"], state[f"{name}.up.weight"] = down, up
    return state


def _sgm(name: str) -> str:
    """A layer of the tiny SDXL UNet in the names of Stability's own code, which kohya uses for SDXL."""
    name = re.sub(
        r"^down_blocks\.(\d)\.attentions\.(\d)",
        lambda m: f"input_blocks.{2 * int(m[1]) + int(m[2]) + 1}.1",
        name,
    )
    name = re.sub(
        r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1", name
    )
    return re.sub(r"^mid_block\.attentions\.0", "middle_block.1", name)


def sd_kohya(pipe: Any, seed: int) -> State:
    return kohya("lora_unet_", pairs(pipe.unet, f"{USUAL}|{CONVOLUTIONS}", seed=seed)) | kohya(
        "lora_te_text_model_", pairs(pipe.text_encoder, TEXT, seed=seed)
    )


def sdxl_kohya(pipe: Any, seed: int) -> State:
    return (
        kohya(
            "lora_unet_",
            pairs(pipe.unet, r"attentions.*(attn\d\.to_[qkv]|ff\.net\.2)$", seed=seed),
            rename=_sgm,
        )
        | kohya("lora_te1_text_model_", pairs(pipe.text_encoder, TEXT, seed=seed))
        | kohya("lora_te2_", pairs(pipe.text_encoder_2, TEXT, seed=seed + 1))
    )


def unet_peft(pipe: Any, seed: int) -> State:
    return peft("unet.", pairs(pipe.unet, f"{USUAL}|{CONVOLUTIONS}", rank=20, seed=seed)) | peft(
        "text_encoder.", pairs(pipe.text_encoder, TEXT, seed=seed)
    )


def unet_old(pipe: Any, seed: int) -> State:
    return old_diffusers(pairs(pipe.unet, r"attn\d\.(to_[qkv]|to_out\.0)$", seed=seed)) | old_text_encoder(
        pairs(pipe.text_encoder, TEXT, seed=seed)
    )


def transformer_peft(pipe: Any, seed: int) -> State:
    return peft("transformer.", pairs(pipe.transformer, f"{USUAL}|{MODULATION}", rank=20, seed=seed)) | peft(
        "text_encoder.", pairs(pipe.text_encoder, TEXT, seed=seed)
    )


LAYOUTS: dict[tuple[str, str], Callable[[Any, int], State]] = {
    ("flux", "peft"): transformer_peft,
    ("flux", "kohya"): flux_kohya,
    ("flux", "comfy"): flux_comfy,
    ("flux", "underscored"): flux_underscored,
    ("flux", "ai-toolkit"): flux_ai_toolkit,
    ("flux", "xlabs"): flux_xlabs,
    ("stable-diffusion-3", "peft"): transformer_peft,
    ("stable-diffusion", "peft"): unet_peft,
    ("stable-diffusion", "old diffusers"): unet_old,
    ("stable-diffusion", "kohya"): sd_kohya,
    ("stable-diffusion-xl", "peft"): unet_peft,
    ("stable-diffusion-xl", "kohya"): sdxl_kohya,
}


def write(state: State, file: Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """The state as a safetensors file; `metadata` is PEFT's configuration as diffusers writes it."""
    header = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file, metadata=header)
    return file


def uses(route: str | None, scale: float | None = None) -> tuple[AdapterUse, ...]:
    """The adapters of a request that uses this one."""
    return (AdapterUse(route, scale),) if route else ()
