"""What every module inside a forward returned, row by row, as digests: so forwards of other row counts can be
compared in all their parts without keeping what flowed through them.

The bits of a final result may be equal by luck: rounding hides a difference that another input would show.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from mezzotint.engine.steps.laboratory import tensors

Place = tuple[nn.Module, int, int]
"""A tensor in a result: the module, the number of its call, and which of the call's tensors."""

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
    """What the modules of one forward of `num_rows` rows returned: filled inside `recording`.

    Only tensors of floating point that have as many rows as the forward are kept. An expert that gets as many
    tokens as there are rows looks like one of them; it does not in a forward of another number of rows.
    """

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
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

    def agrees(self, other: Trace, rows: Sequence[int], places: set[Place]) -> bool:
        """Whether the rows of `other` are bit for bit these `rows` of this forward, at these places."""
        return all(
            torch.equal(self._digests[place].of_rows[list(rows)], other._digests[place].of_rows)
            for place in places & self.comparable(other)
        )

    def _note(self, module: nn.Module, _: Any, result: Any) -> None:
        number = self._calls[module]
        self._calls[module] += 1
        for index, tensor in enumerate(tensors(result)):
            dimension = next((d for d, size in enumerate(tensor.shape[:2]) if size == self._num_rows), None)
            if dimension is None or not tensor.is_floating_point():
                continue
            rows = tensor.movedim(dimension, 0)
            digests = Digests(dimension, tuple(rows.shape[1:]), self._digest(rows))
            self._digests[module, number, index] = digests

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
