"""What pipelines change outside their own run: attention processors and hooks, and the random generators.

A run has its own of each. They are in place while the run computes, and what was there before is put back
whenever it parks, so that no run sees another's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Processors = list[tuple[Any, dict[int, Any], dict[int, Any]]]
"""For each attention module its processor, its hooks and its hooks before the forward."""


class AttentionState:
    """The attention modules of one pipeline and what they have where no run has changed them."""

    def __init__(self, components: Mapping[str, Any]) -> None:
        parts = [part for part in components.values() if isinstance(part, nn.Module)]
        self._modules = [
            module for part in parts for module in part.modules() if hasattr(module, "processor")
        ]
        self.usual = self.current()

    def current(self) -> Processors:
        """What the modules have now."""
        return [
            (module.processor, dict(module._forward_hooks), dict(module._forward_pre_hooks))
            for module in self._modules
        ]

    @property
    def changed(self) -> bool:
        """Whether a module differs from what is usual."""
        return any(
            module.processor is not processor
            or module._forward_hooks != hooks
            or module._forward_pre_hooks != before
            for module, (processor, hooks, before) in zip(self._modules, self.usual, strict=True)
        )

    def put(self, processors: Processors) -> None:
        """Gives the modules what `current` returned."""
        for module, (processor, hooks, before) in zip(self._modules, processors, strict=True):
            if module.processor is not processor:
                module.processor = processor
            for place, wanted in ((module._forward_hooks, hooks), (module._forward_pre_hooks, before)):
                if place != wanted:
                    place.clear()
                    place.update(wanted)


def process_generators(device: torch.device | None) -> list[torch.Generator]:
    """The generators that a module draws from when it is given none: the CPU's and the device's."""
    if device is not None and device.type == "cuda":
        return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]
    return [torch.default_generator]


class RunState:
    """The state of one run: its attention processors, if it has set any, and the process's generators."""

    def __init__(self, seed: int, attention: AttentionState | None, device: torch.device | None) -> None:
        """`seed` starts the generators of the process as the run sees them: the CPU's and the device's."""
        self._attention = attention
        self.processors: Processors | None = None
        """Those that the run has set; None while it has set none."""
        self._generators = process_generators(device)
        self._random: list[Tensor] = [
            torch.Generator(each.device).manual_seed(seed).get_state() for each in self._generators
        ]

    def notice(self) -> None:
        """Inside the run: sees whether it has set processors."""
        if self._attention is not None:
            changed = self.processors is not None or self._attention.changed
            self.processors = self._attention.current() if changed else None

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Around whatever computes for the run."""
        outer = [each.get_state() for each in self._generators]
        self._set_generators(self._random)
        own = self.processors
        if own is not None and self._attention is not None:
            self._attention.put(own)
        try:
            yield
        finally:
            self._random = [each.get_state() for each in self._generators]
            self._set_generators(outer)
            if self._attention is not None and (self.processors is not None or own is not None):
                self._attention.put(self._attention.usual)

    def end(self) -> None:
        """After the run's last moment: puts back what it has left behind."""
        if self._attention is not None and self._attention.changed:
            self._attention.put(self._attention.usual)

    def _set_generators(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
