"""What models would run on here, as facts; `python -m mezzotint.engine.models.doctor` prints them."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants

from mezzotint import hub
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


OVERHEAD = 1.1
"""What a loaded model takes, over its weights."""
_ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


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
        "cpp_compiler": host.cpp_compiler(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "models": {
            "built_in": sources.built_in_names(),
            "hub_cache": str(huggingface_hub.constants.HF_HUB_CACHE),
            "hub_offline": bool(huggingface_hub.constants.HF_HUB_OFFLINE),
        },
    }


def model_facts(source: str, dtype: str) -> dict[str, Any]:
    """What a model would take here: `needed_bytes`, None where it is not on this disk, and why.

    Only headers are read, and nothing is fetched.
    """
    path = _on_disk(source)
    if path is None:
        return {"source": source, "needed_bytes": None, "reason": "it is not on this disk"}
    try:
        return {"source": source, "needed_bytes": _needed_bytes(path, _ITEM_BYTES[dtype]), "reason": ""}
    except (OSError, hub.HeaderError) as error:
        return {"source": source, "needed_bytes": None, "reason": f"its weights cannot be read: {error}"}


def _on_disk(source: str) -> Path | None:
    """The file or folder of a model, if it is here: built in, a path, or a repository in the Hub's cache."""
    reference = hub.parse_reference(source)
    if source in sources.built_in_names() or Path(source).expanduser().exists():
        return sources.locate(source)
    if reference is None:
        return None
    found = huggingface_hub.try_to_load_from_cache(
        reference.repository, sources.INDEX, revision=reference.revision
    )
    return Path(found).parent if isinstance(found, str) else None


def _needed_bytes(path: Path, item_bytes: int) -> int:
    """Bytes of all weights as floats of `item_bytes`, and a tenth more; of variants only the plain one."""
    files = [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))
    plain = [file for file in files if file.name.count(".") == 1] or files
    total = 0
    for file in plain:
        for tensor in hub.read_header(file).values():
            total += math.prod(tensor["shape"]) * item_bytes
    return round(total * OVERHEAD)


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
    """Writes the facts as JSON, and what each source among the arguments would take."""
    found = facts()
    models = [model_facts(source, found["dtype"]) for source in sys.argv[1:]]
    json.dump(found | {"asked": models, "load": os.getloadavg()[0]}, sys.stdout)
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
