"""Where trials run: requests of one pipeline that are stopped at a module's call, and what came out."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from mezzotint.engine.steps.batching import Call, NotMergeable, entries
from mezzotint.engine.steps.pipeline_run import PipelineRun, Tap
from mezzotint.engine.steps.shared_state import AttentionState

STEPS_SEEN = 2
"""Steps of a trial after which every module that runs at each step has been seen."""
TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference between merged and alone, as a share of the result's largest value."""
Trial = Sequence[Mapping[str, Any]]
"""The arguments of three requests: two of one length, and one of another length and guidance."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One call of a module: its arguments by name, and how many rows its result has (0: none)."""

    arguments: Mapping[str, Any]
    rows: int


@dataclass(frozen=True, slots=True)
class Laboratory:
    """One pipeline, its taps, and what its runs share."""

    pipe: Any
    taps: Sequence[Tap]
    attention: AttentionState
    max_forward_s: float | None = None
    """A module whose forward takes longer is left unmerged; None: none is."""

    def start(self, arguments: Mapping[str, Any], seed: int = 0) -> PipelineRun:
        """A run that has not begun."""
        return PipelineRun(self.pipe, arguments, seed=seed, attention=self.attention)

    def record(self, arguments: Mapping[str, Any]) -> dict[str, list[Seen]]:
        """The calls of each module of diffusers in the first steps; NotMergeable where the run fails."""
        modules, limit = self.pipe.components, self.max_forward_s
        calls: dict[str, list[Seen]] = {}
        run = self.start(arguments)
        try:
            run.start()
            while run.call is not None and run.num_steps < STEPS_SEEN and not _decodes(modules, run.call):
                call, began = run.call, time.perf_counter()
                try:
                    result = call.alone()
                except Exception as error:
                    raise NotMergeable(f"its trial failed: {type(error).__name__}: {error}") from error
                if isinstance(modules[call.name], ModelMixin) and not _is_autoencoder(modules, call):
                    rows = next((len(each) for each in tensors(result) if each.ndim), 0)
                    calls.setdefault(call.name, []).append(Seen(call.arguments, rows))
                    if limit is not None and time.perf_counter() - began > limit:
                        raise NotMergeable(
                            f"a forward takes longer than {limit} s, and merging gains nothing there"
                        )
                run.resume(result)
            if run.error is not None:
                raise NotMergeable(f"its trial failed: {type(run.error).__name__}: {run.error}")
        finally:
            run.close()
        return calls

    def doubled(self, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The same request for two pictures: by its prompt twice, then by their number."""
        texts = ("prompt", "negative_prompt")
        yield {
            name: [value, value] if name in texts and isinstance(value, str) else value
            for name, value in arguments.items()
        }
        if "num_images_per_prompt" in inspect.signature(self.pipe.__call__).parameters:
            yield {**arguments, "num_images_per_prompt": 2}


def advance(run: PipelineRun, name: str) -> Call:
    """The run's first call of module `name`."""
    run.start()
    while run.call is not None and run.call.name != name:
        run.resume(run.call.alone())
    if run.call is None:
        raise NotMergeable(f"its trial ended before the module ran: {run.error}")
    return run.call


def agrees(one: Any, other: Any, *, exactly: bool = False) -> bool:
    """Whether two results are equal, but for rounding unless `exactly`."""
    left, right = list(tensors(one)), list(tensors(other))
    return len(left) == len(right) and all(
        torch.equal(a, b) if exactly else near(a, b) for a, b in zip(left, right, strict=True)
    )


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by no more than rounding does."""
    if one.shape != other.shape:
        return False
    if not one.numel():
        return True
    largest = one.abs().max().item()
    return bool((one - other).abs().max().item() <= TOLERANCE.get(one.dtype, 0.0) * largest)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a result."""
    if isinstance(value, Tensor):
        yield value
    for _, entry in entries(value) or ():
        yield from tensors(entry)


@contextlib.contextmanager
def layer_shapes(module: nn.Module) -> Iterator[list[tuple[tuple[int, ...], ...]]]:
    """The shapes that the layers of `module` are given meanwhile, in their order."""
    seen: list[tuple[tuple[int, ...], ...]] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(tuple(tuple(each.shape) for each in inputs if isinstance(each, Tensor)))

    layers = [layer for layer in module.modules() if next(layer.children(), None) is None]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _decodes(modules: Mapping[str, Any], call: Call) -> bool:
    """Whether the run is at its end; one with a picture begins by encoding it."""
    return _is_autoencoder(modules, call) and getattr(call.run, "__name__", "") != "encode"


def _is_autoencoder(modules: Mapping[str, Any], call: Call) -> bool:
    return hasattr(modules[call.name], "decode")
