"""What torch can use on this machine, and what `auto` means on it: device, dtype, threads, free memory."""

from __future__ import annotations

from typing import Any

import torch

from mezzotint.engine.models import host
from mezzotint.errors import ModelLoadError, echo

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(device: str = "auto") -> torch.device:
    """`auto` is cuda, then mps, then cpu; ModelLoadError for a device that is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelLoadError(
            f"device {echo(device)} cannot be used: {reason}; use auto, cpu, cuda or cuda:N",
            code="device_unavailable",
        ) from error
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype that `dtype` (auto, bf16, fp16, fp32) means on `device`, and why."""
    if dtype in DTYPES:
        return DTYPES[dtype], "as asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in bf16"
        return torch.float16, "the GPU has no bf16"
    if device.type != "cpu":
        return torch.bfloat16, f"bf16 is the rule on {device.type}"
    name, reason = host.cpu_dtype()
    return DTYPES[name], reason


def set_threads(num_threads: int) -> int:
    """Sets torch's intra-op threads (0: one per core that this process may use) and says how many."""
    chosen = num_threads or host.num_cores()
    torch.set_num_threads(chosen)
    return chosen


def memory(device: torch.device) -> tuple[int, int]:
    """Available and total bytes of the memory that models on `device` live in."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    return host.memory()


def gpus() -> list[dict[str, Any]]:
    """Name, compute capability and memory of each CUDA device."""
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": torch.cuda.get_device_name(index),
                "compute_capability": f"{major}.{minor}",
                "available_bytes": int(free),
                "total_bytes": int(total),
            }
        )
    return found
