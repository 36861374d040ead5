"""What models would run on here, as facts; `python -m mezzotint.engine.models.doctor --json` prints them."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from typing import Any

import huggingface_hub.constants

from mezzotint.engine.models import host, sources

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


def facts() -> dict[str, Any]:
    """Processor, GPU, memory, threads, versions; the device and dtype that `auto` chooses, and why."""
    free, total = host.memory()
    return {
        **_accelerator(),
        "cpu": {
            "name": host.cpu_name(),
            "architecture": platform.machine(),
            "usable_cores": host.num_cores(),
            "features": host.cpu_features(),
        },
        "memory": {"available_bytes": free, "total_bytes": total},
        "num_threads": host.num_cores(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "models": {
            "built_in": sources.built_in_names(),
            "hub_cache": str(huggingface_hub.constants.HF_HUB_CACHE),
            "hub_offline": bool(huggingface_hub.constants.HF_HUB_OFFLINE),
        },
    }


def _accelerator() -> Mapping[str, Any]:
    """The device and dtype of `auto`, and the GPUs."""
    if not host.may_have_gpu():
        dtype, reason = host.cpu_dtype()
        return {"device": "cpu", "dtype": dtype, "dtype_reason": reason, "gpus": []}
    from mezzotint.engine.models import hardware  # loads torch, which takes seconds

    device = hardware.choose_device()
    chosen, reason = hardware.choose_dtype("auto", device)
    name = next(name for name, value in hardware.DTYPES.items() if value == chosen)
    return {"device": str(device), "dtype": name, "dtype_reason": reason, "gpus": hardware.gpus()}


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
