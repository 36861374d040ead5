"""Inputs that show in which order a linear layer adds.

A layer adds in fp32 and rounds the sum to bf16: of sums that were added in another order one in thousands is
rounded to another value, which a forward on noise may well lack. So each layer is given inputs on which its
terms cancel out. What is left then is what the order has left, and rounding hides little of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.engine.lora.layers import LoraLayer

MAX_OUTPUTS = 64
"""Of a layer, for which the terms cancel out."""
MIN_TOKENS, MAX_TOKENS = 16, 64
"""Different tokens of a row: those of a shorter one come one after the other, a longer one repeats them."""

Probe = tuple[nn.Module, list[Tensor]]


def layer_shape(layer: nn.Module, x: Any) -> Hashable | None:
    """What a layer's kernel is chosen by, but for the number of rows; None for other modules.

    `x` is the layer's input [rows, ...].
    """
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or not isinstance(x, Tensor) or not x.ndim:
        return None
    moves = (
        (layer.stride, layer.padding, layer.dilation, layer.groups) if isinstance(layer, nn.Conv2d) else ()
    )
    return (type(layer), layer.weight.shape, layer.weight.dtype, x.dtype, x.shape[1:], moves)


def bare_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layer's forward without what adapters add."""
    adapted = getattr(layer.forward, "__self__", None)
    return adapted.base if isinstance(adapted, LoraLayer) else layer.forward


class Probes:
    """For each shape of linear layers one layer and inputs for it: always the same for one model."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._known: dict[Hashable, tuple[nn.Module, Tensor]] = {}
        """By shape; the inputs are [rows, tokens, in]."""

    def of(self, layer: nn.Module, x: Tensor, order: Sequence[int]) -> Probe | None:
        """A layer of the shape of `layer`, and its inputs for these rows: each is [rows, ..., in] like `x`.

        None for a layer that is not linear, or that does not round its sums.
        """
        if not isinstance(layer, nn.Linear) or layer.weight.dtype not in (torch.bfloat16, torch.float16):
            return None
        shape = layer_shape(layer, x)
        known = self._known.get(shape)
        if known is None:
            known = self._known[shape] = (layer, self._inputs(layer, x))
        chosen, rows = known[0], known[1][list(order)]
        num_tokens, tokens = math.prod(x.shape[1:-1]), rows.shape[1]
        starts = range(0, max(1, tokens - num_tokens + 1), max(1, num_tokens))
        places = [(torch.arange(num_tokens, device=x.device) + start) % tokens for start in starts]
        return chosen, [rows[:, each].reshape(len(rows), *x.shape[1:]) for each in places]

    def _inputs(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Noise [rows, tokens, in], moved to where some of the layer's outputs are nearly zero."""
        num_tokens = min(max(math.prod(x.shape[1:-1]), MIN_TOKENS), MAX_TOKENS)
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(self._num_rows, num_tokens, layer.in_features, generator=generator)
        noise = noise.to(x.device)
        outputs = min(layer.out_features, layer.in_features // 2, MAX_OUTPUTS)
        if outputs:
            step = layer.out_features // outputs
            weight = layer.weight[::step][:outputs].float()
            sums = noise @ weight.T + (0 if layer.bias is None else layer.bias[::step][:outputs].float())
            products = weight @ weight.T
            products.diagonal().add_(1e-6 * products.trace() / outputs + 1e-30)  # or zero weights divide
            noise -= torch.linalg.solve(products, sums, left=False) @ weight
        return noise.to(x.dtype)
