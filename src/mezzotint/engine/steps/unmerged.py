"""Layers that run row by row inside a merged forward.

A library may choose another kernel for a product of many rows than for one of a few, and split its sums in
another way. Then a row gets other last bits in a forward of another number of rows. Such a layer is given
each row alone: every row goes through the kernel that it would have alone, and all other layers stay merged.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from mezzotint.engine.lora.layers import LoraLayer
from mezzotint.engine.steps.probes import Probes, bare_forward, layer_shape

MAX_SHARE = 1 / 3
"""Of the multiplications in linear layers and convolutions: where more would run row by row, merging gains
too little."""


@contextlib.contextmanager
def row_by_row(layers: Collection[nn.Module], num_rows: int) -> Iterator[None]:
    """Inside, these layers run once for each row of a forward of `num_rows` rows.

    What adapters add to a layer is added to all rows as always.
    """
    with contextlib.ExitStack() as patched:
        for layer in layers if num_rows > 1 else ():
            patched.callback(_patch(layer, num_rows))
        yield


def _patch(layer: nn.Module, num_rows: int) -> Callable[[], None]:
    """Replaces the layer's forward, below its adapters; returns what puts it back."""
    alone = functools.partial(_each_row, bare_forward(layer), num_rows)
    adapted = getattr(layer.forward, "__self__", None)
    if isinstance(adapted, LoraLayer):
        base, adapted.base = adapted.base, alone
        return lambda: setattr(adapted, "base", base)
    before = layer.__dict__.get("forward")
    setattr(layer, "forward", alone)  # noqa: B010
    if before is None:
        return lambda: delattr(layer, "forward")
    return lambda: setattr(layer, "forward", before)


def _each_row(forward: Callable[[Tensor], Tensor], num_rows: int, x: Tensor) -> Tensor:
    """The results of the rows, each computed alone and from memory of its own."""
    if len(x) != num_rows:
        return forward(x)
    return torch.cat([forward(x[row : row + 1].clone()) for row in range(num_rows)])


class Finder:
    """Finds the layers that give a row other bytes in a merged forward than alone: `watching` compares both.

    Layers of one shape share a kernel. Where one of them differs all of them count as different, for in the
    others the difference may have been rounded away by chance.
    """

    def __init__(self, probes: Probes) -> None:
        self._probes = probes
        self._layers: dict[nn.Module, Hashable] = {}
        """With their shapes."""
        self._work: dict[nn.Module, int] = {}
        """Multiplications for one row."""
        self._differing: set[Hashable] = set()

    @contextlib.contextmanager
    def watching(self, num_rows: int) -> Iterator[None]:
        """Around a forward of the first `num_rows` rows without adapters."""

        def compare(layer: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            shape = layer_shape(layer, args[0]) if args else None
            if shape is None or len(args[0]) != num_rows:
                return
            self._layers[layer] = shape
            weight: Any = layer.weight
            self._work[layer] = result[0].numel() * weight[0].numel()
            if shape not in self._differing and not self._alike(layer, args[0], result):
                self._differing.add(shape)

        handle = register_module_forward_hook(compare)
        try:
            yield
        finally:
            handle.remove()

    def _alike(self, layer: nn.Module, x: Tensor, result: Tensor) -> bool:
        """Whether each row gets alone what it got in `result`, and whether that holds for probes."""
        if not torch.equal(_each_row(layer.forward, len(x), x), result):
            return False
        tried, inputs = self._probes.of(layer, x, range(len(x))) or (layer, [])
        forward = bare_forward(tried)
        return all(torch.equal(_each_row(forward, len(x), each), forward(each)) for each in inputs)

    @property
    def found(self) -> tuple[nn.Module, ...]:
        """The layers that differ, in the order in which they run."""
        return tuple(layer for layer, shape in self._layers.items() if shape in self._differing)

    @property
    def too_many(self) -> bool:
        """Whether merging would gain too little without them."""
        work = sum(self._work.values())
        return sum(self._work[layer] for layer in self.found) > MAX_SHARE * work
