"""The optimizers and the learning rate over the time that is left."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalised(update: torch.Tensor, rounds: int = 3) -> torch.Tensor:
    """The nearest semi-orthogonal matrix by a few Newton-Schulz rounds in bf16 (Jordan et al., Muon, 2024).

    `update` is (n, rows, columns), a stack of independent matrices.
    """
    a, b, c = NEWTON_SCHULZ
    tall = update.shape[-2] > update.shape[-1]
    x: torch.Tensor = update.mT.bfloat16() if tall else update.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    result: torch.Tensor = (x.mT if tall else x).to(update.dtype)
    return result


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolution kernels (flattened to output x the rest), those of one shape stacked.

    A step has the size of AdamW's (0.2 times the root of the larger side): both take one learning rate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[nn.Parameter, torch.Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"]).flatten(1)
                shapes.setdefault((update.shape[0], update.shape[1]), []).append((parameter, update))
            for (rows, columns), pairs in shapes.items():
                stack = orthogonalised(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for (parameter, _), update in zip(pairs, stack, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update.view_as(parameter), alpha=scale)


def build_optimizers(
    modules: Iterable[nn.Module], lr: float, words_factor: float = 1.0
) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels inside the blocks, AdamW for all else (embeddings, modulation, ends).

    Embeddings learn `words_factor` times as fast.
    """
    matrices: list[nn.Parameter] = []
    words: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        tables = [part.weight for part in module.modules() if isinstance(part, nn.Embedding)]
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            inside = ("block" in name or "layers." in name) and not re.search(r"norm\w*\.linear", name)
            plain = parameter.ndim < 2 or "relative_attention_bias" in name or min(parameter.shape[:2]) < 16
            if any(parameter is table for table in tables):
                words.append(parameter)
            elif inside and not plain:
                matrices.append(parameter)
            else:
                others.append(parameter)
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if words:
        adamw.add_param_group({"params": words, "factor": words_factor})
    if matrices:
        optimizers.append(Muon(matrices, lr))
    return optimizers


def rate_at(fraction: float, step: int, warmup: int = 50, decay_from: float = 0.7) -> float:
    """Multiplier of the learning rate: a short warm-up, constant, then linear to zero at the end."""
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, max(0.0, (1 - fraction) / (1 - decay_from)))
    return rise * fall


def set_rate(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)
