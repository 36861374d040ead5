"""Reading adapter files: safetensors in PEFT's, diffusers', kohya's or a Flux trainer's layout.

Layouts are translated by diffusers' own converters (`lora_state_dict` of the pipeline's class). Those drop
what they do not know with at most a log line; here nothing is dropped in silence. Every tensor of the file
either ends in a layer or stops the reading: a copy of the file's keys with numbered stand-ins for the tensors
goes through the same converter, and a number that does not come out again names the key that was lost.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mezzotint import hub
from mezzotint.engine.lora.layers import LoraLayer, Weights, padded_rank
from mezzotint.errors import ModelLoadError

State = dict[str, Tensor]

_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".vera_": "VeRA",
    ".lora_mid.": "LoCon with a Tucker core",
    ".on_input": "IA3",
    ".a1.weight": "GLoRA",
    ".diff": "a LyCORIS adapter with full differences",
    ".lora_embedding": "a LoRA of embeddings",
    "emb_params": "an adapter with trained embeddings (pivotal tuning)",
    "lora_controlnet": "Control-LoRA",
    "query_norm.scale": "Flux Control LoRA",
}
_SUFFIX = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")
_ALPHA = ".alpha"
_WRAPPER = "base_model.model."
"""What PEFT's `save_pretrained` puts before every key."""


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """What an adapter's file holds, by component and layer of the pipeline."""

    weights: Mapping[str, Mapping[str, Weights]]
    checksum: str
    rank: int
    num_bytes: int
    target_modules: list[str]


def read_adapter(
    path: Path,
    pipeline: Any,
    layers: Mapping[str, Mapping[str, LoraLayer]],
    *,
    checksum: str = "",
    max_bytes: int,
) -> AdapterWeights:
    """The adapter in `path` (a safetensors file, or a folder with one); ModelLoadError says what is wrong."""
    path = weights_file(path)
    state, metadata, digest = _read(path, max_bytes)
    if checksum and digest != checksum:
        raise _broken(path, f"its SHA-256 is {digest}, not the {checksum} of its registration")
    _refuse_other_kinds(path, state, metadata)
    config = _TrainingConfig(path, metadata)
    state = {
        key: tensor for key, tensor in state.items() if ".diff" not in key
    }  # zeros, or they were refused
    bare = {key.removeprefix(_WRAPPER): tensor for key, tensor in state.items()}
    if _is_peft(bare, layers):
        state = bare
    else:
        _check_nothing_lost(path, state, pipeline)
        state = _convert(path, state, pipeline)
    found = _assign(path, state, config, layers)
    weights = {component: entries for component, entries in found.items() if entries}
    if not weights:
        raise _unfit(path, "none of its tensors belongs to a layer of this model")
    every = [
        (layers[component][name], entry)
        for component, entries in weights.items()
        for name, entry in entries.items()
    ]
    num_bytes = sum(_padded_bytes(layer, entry) for layer, entry in every)
    if num_bytes > max_bytes:
        raise ModelLoadError(
            f"{path.name} takes {num_bytes} bytes in memory, more than all adapters may ({max_bytes}); "
            "raise adapter_bytes of the endpoint",
            code="adapter_too_large",
        )
    rank = max(entry.down.shape[0] for _, entry in every)
    return AdapterWeights(weights, digest, rank, num_bytes, _kinds(weights))


def weights_file(path: Path) -> Path:
    """`path` itself, or the one safetensors file in the folder `path`."""
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix == ".safetensors")
        if len(files) != 1:
            pickled = sorted(each.name for each in path.iterdir() if each.suffix in hub.PICKLES)
            if not files and pickled:
                raise _pickled(pickled[0])
            names = ", ".join(each.name for each in files[:5]) or "none"
            raise ModelLoadError(
                f"the folder {path.name} must hold one .safetensors file (found: {names}); name the file",
                code="adapter_broken",
            )
        path = files[0]
    if path.suffix in hub.PICKLES:
        raise _pickled(path.name)
    return path


def _pickled(name: str) -> ModelLoadError:
    return ModelLoadError(
        f"{name} is {hub.PICKLE_RISK}; convert it to .safetensors",
        code="adapter_unsupported",
    )


def _broken(path: Path, why: str) -> ModelLoadError:
    return ModelLoadError(f"{path.name} cannot be read as an adapter: {why}", code="adapter_broken")


def _unfit(path: Path, why: str) -> ModelLoadError:
    return ModelLoadError(
        f"{path.name} does not fit this endpoint's model: {why}; use an adapter trained for this model",
        code="adapter_wrong_base",
    )


def _unsupported(path: Path, what: str) -> ModelLoadError:
    return ModelLoadError(
        f"{path.name} is {what}, which is not supported; plain LoRA is (linear and convolution layers)",
        code="adapter_unsupported",
    )


def _read(path: Path, max_bytes: int) -> tuple[State, dict[str, str], str]:
    try:
        size = path.stat().st_size
        if (
            size > 4 * max_bytes
        ):  # fp32 in the file may be half as much in memory, and half of it may be repeated
            raise ModelLoadError(
                f"{path.name} has {size} bytes; all adapters together may take {max_bytes}; "
                "raise adapter_bytes of the endpoint",
                code="adapter_too_large",
            )
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with safe_open(path, framework="pt", device="cpu") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            return state, opened.metadata() or {}, digest
    except FileNotFoundError:
        raise _broken(path, "there is no such file") from None
    except SafetensorError as error:
        raise _broken(
            path, f"it is not a whole safetensors file ({error}); copy or download it again"
        ) from None
    except OSError as error:
        raise _broken(path, f"{error.strerror}") from None


def _refuse_other_kinds(path: Path, state: State, metadata: Mapping[str, str]) -> None:
    for key in state:
        for mark, kind in _OTHER_KINDS.items():
            if mark in key and not (mark == ".diff" and not bool(state[key].any())):
                raise _unsupported(path, f"{kind} (it has {key!r})")
        if re.search(r"lora_[AB](\.[^.]+)?\.bias$", key):
            raise _unsupported(path, f"a LoRA with biases (it has {key!r})")
    for name, tensor in state.items():
        if not name.endswith(_ALPHA) and not tensor.is_floating_point():
            raise _unsupported(path, f"quantised ({name!r} is {tensor.dtype})")
        if not bool(torch.isfinite(tensor).all()):
            raise _broken(path, f"{name!r} holds NaN or infinite values")


def _is_peft(state: State, layers: Mapping[str, Mapping[str, LoraLayer]]) -> bool:
    """Whether every key is in PEFT's words and names a layer of this pipeline: nothing needs translating."""
    names = {name for entries in layers.values() for name in entries}
    names |= {f"{component}.{name}" for component, entries in layers.items() for name in entries}
    for key in state:
        match = _SUFFIX.match(key)
        if (match["module"] if match else key.removesuffix(_ALPHA)) not in names:
            return False
    return True


def _convert(path: Path, state: State, pipeline: Any) -> State:
    """The file's tensors under diffusers' names."""
    convert = getattr(type(pipeline), "lora_state_dict", None)
    if convert is None:
        return state
    options: dict[str, Any] = {"return_lora_metadata": True}
    if hasattr(pipeline, "unet"):
        options["unet_config"] = pipeline.unet.config
    if "return_alphas" in inspect.signature(convert).parameters:
        options["return_alphas"] = True
    try:
        converted, *others = convert(dict(state), **options)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, ValueError) as error:
        raise _unfit(path, f"its layout could not be translated ({type(error).__name__}: {error})") from error
    alphas = others[0] if len(others) == 2 else None
    for key, value in (alphas or {}).items():
        converted[key] = torch.as_tensor(value)
    return dict(converted)


def _check_nothing_lost(path: Path, state: State, pipeline: Any) -> None:
    """Sends numbered stand-ins through the converter: each must come out, unless its tensor is all zeros."""
    ranks = {_owner(key): len(tensor) for key, tensor in state.items() if re.search(r"(lora_A|down)\.", key)}
    numbers: dict[float, str] = {}
    probe: State = {}
    for number, (key, tensor) in enumerate(state.items(), start=1):
        if key.endswith(_ALPHA):
            probe[key] = torch.tensor(float(ranks.get(_owner(key), 1)))
        else:
            numbers[number] = key
            probe[key] = torch.tensor(float(number)).expand(tensor.shape)
            if "lora_te" in key:  # some of these are scaled in place
                probe[key] = probe[key].clone()
    for tensor in _convert(path, probe, pipeline).values():
        if tensor.ndim > 1:
            for number in {*tensor.flatten(1)[:, 0].tolist(), *tensor[0].flatten().tolist()}:
                numbers.pop(number, None)
    lost = next((key for key in numbers.values() if bool(state[key].any())), None)
    if lost is not None:
        raise _unfit(path, f"nothing of the model takes {lost!r}")


def _owner(key: str) -> str:
    """The layer that a key of any layout speaks of, as the file spells it."""
    return re.split(r"\.(?:alpha$|lora|down|up|processor)", key)[0]


def _assign(
    path: Path, state: State, config: _TrainingConfig, layers: Mapping[str, Mapping[str, LoraLayer]]
) -> dict[str, dict[str, Weights]]:
    """Every tensor to its layer; the first that has none is named."""
    main = next(name for name in layers if not name.startswith("text_encoder"))
    by_component: dict[str, State] = {name: {} for name in layers}
    for key, tensor in state.items():
        component, _, rest = key.partition(".")
        if component not in layers and component in ("unet", "transformer", "prior"):
            raise _unfit(path, f"{key} belongs to a {component}, and this model has a {main}")
        if component not in layers and re.match(r"text_encoder(_\d)?$", component):
            raise _unsupported(
                path, f"a LoRA of {component}, which this pipeline does not adapt (it has {key!r})"
            )
        by_component[component if component in layers else main][rest if component in layers else key] = (
            tensor
        )
    return {
        component: _pair(path, component, part, config, layers[component])
        for component, part in by_component.items()
    }


def _pair(
    path: Path, component: str, state: State, config: _TrainingConfig, layers: Mapping[str, LoraLayer]
) -> dict[str, Weights]:
    names = _peft_names(path, [key for key in state if not key.endswith(_ALPHA)], component, layers)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, name in names.items():
        match = _SUFFIX.match(name)
        if match is None or match["module"] not in layers:
            what = "has no layer of that name" if match else "cannot be read as a LoRA weight"
            raise _unfit(path, f"{component}.{key} {what}")
        sides.setdefault(match["module"], {})[match["side"]] = state[key]
    alphas = _alphas(state, names)
    found = {}
    for module, pair in sides.items():
        if len(pair) != 2:
            raise _broken(path, f"{component}.{module} has only one of its two matrices")
        rank = pair["A"].shape[0]
        factor = alphas[module] / rank if module in alphas else config.factor(component, module, rank)
        found[module] = Weights(pair["A"], pair["B"], factor)
        misfit = layers[module].misfit(found[module])
        if misfit is not None:
            raise _unfit(path, f"{component}.{module}: {misfit}")
    return found


def _peft_names(
    path: Path, keys: list[str], component: str, layers: Mapping[str, LoraLayer]
) -> dict[str, str]:
    """What diffusers' name of each key is in PEFT's words."""
    table: dict[str, Any] = {key: key for key in keys}
    if not keys:
        return {}
    if not component.startswith("text_encoder"):
        table = convert_unet_state_dict_to_peft(table)
    elif not all(_SUFFIX.match(key) for key in keys):
        try:
            table = convert_state_dict_to_peft(convert_state_dict_to_diffusers(table))
        except ValueError as error:
            raise _unfit(path, f"{component}.{keys[0]} cannot be read as a LoRA weight") from error
    if component.startswith("text_encoder") and not any(name.startswith("text_model.") for name in layers):
        table = {name.removeprefix("text_model."): key for name, key in table.items()}
    return {key: name for name, key in table.items()}


def _alphas(state: State, names: Mapping[str, str]) -> dict[str, float]:
    """The alpha of each module; converters hang it on the module or on its first matrix."""
    found = {}
    for key, tensor in state.items():
        if key.endswith(_ALPHA):
            owner = key.removesuffix(_ALPHA)
            match = _SUFFIX.match(names.get(owner, ""))
            found[match["module"] if match else owner] = float(tensor)
    return found


class _TrainingConfig:
    """The training configuration that came with a file, where one did: PEFT's, by component."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path = path
        beside = path.with_name(hub.PEFT_CONFIG)
        try:
            if "lora_adapter_metadata" in metadata:
                self._values = json.loads(metadata["lora_adapter_metadata"])
            elif path.name == hub.PEFT_WEIGHTS and beside.is_file():
                self._values = json.loads(beside.read_text(encoding="utf-8"))
            else:
                self._values = {}
        except ValueError as error:
            raise _broken(path, f"its configuration is not JSON ({error})") from None
        if not isinstance(self._values, dict):
            raise _broken(path, "its configuration is not a JSON object")
        for name, value in self._values.items():
            self._check(name.rpartition(".")[2], value)

    def _check(self, name: str, value: Any) -> None:
        if name == "peft_type" and value != "LORA":
            raise _unsupported(self._path, f"{value}")
        if name in ("use_dora", "lora_bias") and value:
            raise _unsupported(self._path, "DoRA" if name == "use_dora" else "a LoRA with biases")
        if name == "modules_to_save" and value:
            raise _unsupported(self._path, f"an adapter with whole modules ({', '.join(value)})")

    def factor(self, component: str, module: str, rank: int) -> float:
        """alpha / rank of a module; without a configuration alpha is the rank."""
        prefixed = f"{component}.lora_alpha" in self._values
        values = {
            name.removeprefix(f"{component}."): value
            for name, value in self._values.items()
            if name.startswith(f"{component}.") or not prefixed
        }
        patterns = values.get("alpha_pattern") or {}
        alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), values.get("lora_alpha", rank)))
        return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _padded_bytes(layer: LoraLayer, weights: Weights) -> int:
    size = layer.module.weight.element_size()
    if weights.down.ndim == 4:
        return (weights.down.numel() + weights.up.numel()) * size
    return padded_rank(weights.down.shape[0]) * (weights.down.shape[1] + weights.up.shape[0]) * size


def _kinds(weights: Mapping[str, Mapping[str, Weights]]) -> list[str]:
    """The kinds of layers, without their place in the model: `attn.to_q`, `text_encoder.mlp.fc1`."""
    return sorted(
        {
            (f"{component}." if component.startswith("text_encoder") else "")
            + re.sub(r"^.*s\.\d+\.", "", module)
            for component, entries in weights.items()
            for module in entries
        }
    )
