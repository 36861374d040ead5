"""What models would run on here, as facts; `python -m mezzotint.engine.models.doctor --json` prints them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from typing import Any

import huggingface_hub.constants
import torch

from mezzotint.engine.models import hardware, sources

PACKAGES = (
    "mezzotint",
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "huggingface-hub",
    "greenlet",
    "peft",
)
SPEED_FEATURES = ("avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
"""Instruction sets that decide how fast a model runs on the CPU."""


def facts(device: str = "auto") -> dict[str, Any]:
    """Processor, GPU, memory, threads, versions; the device and dtype that `auto` chooses, and why."""
    chosen = hardware.choose_device(device)
    dtype, reason = hardware.choose_dtype("auto", chosen)
    free, total = hardware.memory(torch.device("cpu"))
    return {
        "device": str(chosen),
        "dtype": next(name for name, value in hardware.DTYPES.items() if value == dtype),
        "dtype_reason": reason,
        "cpu": _cpu(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "memory": {"available_bytes": free, "total_bytes": total},
        "num_threads": hardware.num_cores(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "models": {
            "built_in": sources.built_in_names(),
            "hub_cache": str(huggingface_hub.constants.HF_HUB_CACHE),
            "hub_offline": bool(huggingface_hub.constants.HF_HUB_OFFLINE),
        },
    }


def _cpu() -> Mapping[str, Any]:
    capabilities = torch.cpu.get_capabilities()
    features = hardware.cpu_features()
    return {
        "name": capabilities.get("cpu_name", platform.processor()),
        "architecture": capabilities.get("architecture", platform.machine()),
        "usable_cores": hardware.num_cores(),
        "features": {name: features.get(name, False) for name in SPEED_FEATURES},
    }


def _gpu(index: int) -> Mapping[str, Any]:
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    return {
        "device": f"cuda:{index}",
        "name": torch.cuda.get_device_name(index),
        "compute_capability": f"{major}.{minor}",
        "available_bytes": int(free),
        "total_bytes": int(total),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    """Writes the facts as JSON, indented unless `--json` is given."""
    json.dump(facts(), sys.stdout, indent=None if "--json" in sys.argv else 2)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
