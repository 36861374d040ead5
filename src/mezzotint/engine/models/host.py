"""The computer that models run on, as far as it can be known without torch."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path

import psutil

FEATURES = {
    "avx2": "avx2",
    "avx512_f": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "avx512_vnni": "avx512_vnni",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
}
"""Instruction sets that decide how fast a model runs: torch's names, and Linux's."""
BF16_FEATURES = ("amx_bf16", "avx512_bf16")
"""Those that make bf16 faster than fp32."""
_GPU_FILES = ("/dev/nvidia*", "/dev/nvhost*", "/dev/kfd", "/dev/dxg")


def may_have_gpu() -> bool:
    """False where torch would find none: its build has no support, or Linux shows no device."""
    if importlib.metadata.version("torch").endswith("+cpu"):
        return False
    return sys.platform != "linux" or any(glob.glob(pattern) for pattern in _GPU_FILES)


def cpu_features() -> dict[str, bool]:
    """Which of FEATURES the processor has; elsewhere than on Linux torch is asked."""
    if sys.platform != "linux":
        import torch  # loaded only where nothing else knows

        known = torch.cpu.get_capabilities()
        return {name: bool(known.get(name)) for name in FEATURES}
    flags = set(_cpu_info("flags").split())
    return {name: flag in flags for name, flag in FEATURES.items()}


def cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def cpu_dtype() -> tuple[str, str]:
    """The dtype that `auto` means on this processor, and why."""
    features = cpu_features()
    found = [feature for feature in BF16_FEATURES if features.get(feature)]
    if found:
        return "bf16", f"the CPU has {' and '.join(found)}"
    return "fp32", f"the CPU has neither {' nor '.join(BF16_FEATURES)}, so bf16 would be slower"


def cpp_compiler() -> str | None:
    """Where the C++ compiler is that torch would use for this CPU; None where there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def num_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota where there is one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def memory() -> tuple[int, int]:
    """Available and total bytes of main memory, within a container's limit."""
    host = psutil.virtual_memory()
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit.isdecimal() and used.isdecimal():
        return min(host.available, max(0, int(limit) - int(used))), min(host.total, int(limit))
    return host.available, host.total


def _cpu_info(name: str) -> str:
    """The first processor's entry of that name, "" where there is none."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
