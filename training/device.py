"""Where training runs: CUDA when there is one, else the CPU with the threads as given."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Setup:
    """The device, and bf16 autocast for it."""

    device: torch.device

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)


def set_up(threads: int) -> Setup:
    """Finds the device and fixes the number of threads."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")
    return Setup(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
