"""What this machine can do, and what `auto` means on it: device, dtype, threads, free memory."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import torch

from mezzotint.errors import ModelLoadError, echo

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BF16_FEATURES = ("amx_bf16", "avx512_bf16")
"""CPU features that make bf16 faster than fp32."""


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
    if dtype != "auto":
        raise ModelLoadError(
            f"dtype {echo(dtype)} is unknown; use auto, {', '.join(DTYPES)}", code="invalid_setting"
        )
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in bf16"
        return torch.float16, "the GPU has no bf16"
    if device.type != "cpu":
        return torch.bfloat16, f"bf16 is the rule on {device.type}"
    found = [feature for feature in BF16_FEATURES if cpu_features().get(feature)]
    if found:
        return torch.bfloat16, f"the CPU has {' and '.join(found)}"
    return torch.float32, f"the CPU has neither {' nor '.join(BF16_FEATURES)}, so bf16 would be slower"


def cpu_features() -> dict[str, bool]:
    """Instruction sets by name, as torch sees them."""
    return {name: value for name, value in torch.cpu.get_capabilities().items() if isinstance(value, bool)}


def num_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota where there is one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def set_threads(num_threads: int) -> int:
    """Sets torch's intra-op threads (0: one per core that this process may use) and says how many."""
    chosen = num_threads or num_cores()
    torch.set_num_threads(chosen)
    return chosen


def memory(device: torch.device) -> tuple[int, int]:
    """Available and total bytes of the memory that models on `device` live in."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    host = psutil.virtual_memory()
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdecimal() and used.isdecimal():
        total = min(host.total, int(limit))
        return min(host.available, max(0, int(limit) - int(used))), total
    return host.available, host.total


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""
