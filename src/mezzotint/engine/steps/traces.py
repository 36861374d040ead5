"""What every module inside a forward returned, row by row, as digests: so forwards of other row counts can be
compared in all their parts without keeping what flowed through them.

The bits of a final result may be equal by luck: rounding hides a difference that another input would show.
Linear layers are given probes as well (probes.py), in which rounding hides less.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from mezzotint.engine.steps.laboratory import tensors
from mezzotint.engine.steps.probes import Probes, bare_forward, layer_shape

Place = Hashable
"""A tensor in a result: the module, the number of its call, and which of the call's tensors. Or the shape of
a layer: what it made of probes."""

_MIXER = 0x9E3779B1
"""An odd number whose multiples scatter over all 32 bits."""


@dataclass(frozen=True, slots=True)
class Digests:
    """One tensor that a module returned."""

    dimension: int
    """That of the rows."""
    row_shape: tuple[int, ...]
    """The shape of each row."""
    of_rows: Tensor
    """int32 [rows]."""


class Trace:
    """What the modules of one forward returned: filled inside `recording`.

    Only tensors of floating point that have as many rows as the forward are kept. An expert that gets as many
    tokens as there are rows looks like one of them; it does not in a forward of another number of rows.
    """

    def __init__(self, order: Sequence[int], probes: Probes) -> None:
        """`order` says which rows the forward has."""
        self._order = order
        self._probes = probes
        self._digests: dict[Place, Digests] = {}
        self._calls: Counter[nn.Module] = Counter()
        self._factors: dict[tuple[int, torch.device], Tensor] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the forward."""
        handle = register_module_forward_hook(self._note)
        try:
            yield
        finally:
            handle.remove()
            self._factors.clear()

    def comparable(self, other: Trace) -> set[Place]:
        """The tensors that have rows of one shape in both forwards."""
        return {
            place
            for place, one in self._digests.items()
            if (two := other._digests.get(place)) is not None
            and (one.dimension, one.row_shape) == (two.dimension, two.row_shape)
        }

    def agrees(self, other: Trace, places: set[Place]) -> bool:
        """Whether the rows of `other` are bit for bit those of this forward of all rows, at these places."""
        order = list(other._order)
        return all(
            torch.equal(self._digests[place].of_rows[order], other._digests[place].of_rows)
            for place in places & self.comparable(other)
        )

    def _note(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        shape = layer_shape(module, args[0]) if args else None
        if shape is not None and shape not in self._digests and len(args[0]) == len(self._order):
            self._try(module, args[0], shape)
        number = self._calls[module]
        self._calls[module] += 1
        for index, tensor in enumerate(tensors(result)):
            dimension = next((d for d, size in enumerate(tensor.shape[:2]) if size == len(self._order)), None)
            if dimension is None or not tensor.is_floating_point():
                continue
            rows = tensor.movedim(dimension, 0)
            digests = Digests(dimension, tuple(rows.shape[1:]), self._digest(rows))
            self._digests[module, number, index] = digests

    def _try(self, layer: nn.Module, x: Tensor, shape: Hashable) -> None:
        """Notes what probes show of the layers of this shape."""
        probe = self._probes.of(layer, x, self._order)
        if probe is not None:
            made = torch.stack([bare_forward(probe[0])(each) for each in probe[1]], 1)
            self._digests[shape] = Digests(0, (), self._digest(made))

    def _digest(self, rows: Tensor) -> Tensor:
        """int32 [rows]: of each row the sum of its bits, four bytes at a time, each times its own factor."""
        flat = rows.reshape(len(rows), -1).contiguous()
        in_four = max(1, 4 // flat.element_size())
        if flat.shape[1] % in_four:
            flat = flat.float()  # other values have other bits there, too
        elif flat.storage_offset() % in_four:
            flat = flat.clone()
        words = flat.view(torch.int32)
        key = (words.shape[1], words.device)
        factors = self._factors.get(key)
        if factors is None:
            places = torch.arange(words.shape[1], device=words.device)
            factors = self._factors[key] = (places * _MIXER % 2**31 | 1).to(torch.int32)
        return (words * factors).sum(1, dtype=torch.int32)
