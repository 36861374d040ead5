"""Rules that nobody wrote: inferred from a pipeline's own calls, and proven by forwards before they are used.

Inference: the same request runs for one picture and for two. What doubles is a row, what
stays is shared, a single element is a scalar, a list that doubles has one entry per row.

Proof: three requests that differ in prompt, seed and guidance stop at their first call of a module. Run
together, in another order, with padding and with their rows turned by one place, each must get what it gets
alone. All of it happens inside their pipelines' calls, where attention processors are those of the request.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from mezzotint.engine.steps.batching import Call, Kind, NotMergeable, Part, Rule, entries, join, merge, split
from mezzotint.engine.steps.exactness import map_rows
from mezzotint.engine.steps.pipeline_run import PipelineRun, Tap
from mezzotint.engine.steps.shared_state import AttentionState

_log = logging.getLogger(__name__)

ALL = "all"
"""Names the finding of a trial that failed: it is of every module."""
STEPS_SEEN = 2
"""Steps of a trial after which every module that runs at each step has been seen."""

TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference between merged and alone, as a share of the result's largest value."""
Trial = Sequence[Mapping[str, Any]]
"""The arguments of three requests: two of one length, and one of another length and guidance."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one module: its Rule, or why it is never merged."""

    rule: Rule | None = None
    reason: str = ""

    @property
    def words(self) -> str:
        """As an endpoint says it."""
        merges = "merges" if self.rule is not None else "does not merge"
        return f"{merges}: {self.reason}" if self.reason else merges


@dataclass(slots=True)
class _Guess:
    arguments: dict[str, Kind] = field(default_factory=dict)
    dimensions: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, kind: Kind) -> None:
        if self.arguments.setdefault(name, kind) != kind:
            raise NotMergeable(f"{name} is once {self.arguments[name]} and once {kind}")


@dataclass(frozen=True, slots=True)
class Laboratory:
    """Where trials run: one pipeline, its taps, and what its runs share."""

    pipe: Any
    taps: Sequence[Tap]
    attention: AttentionState
    max_forward_s: float | None = None
    """A module whose forward takes longer is left unmerged; None: none is."""

    def start(self, arguments: Mapping[str, Any], seed: int = 0) -> PipelineRun:
        """A run that has not begun."""
        return PipelineRun(self.pipe, arguments, seed=seed, attention=self.attention)


def find_rules(laboratory: Laboratory, trial: Trial) -> dict[str, Finding]:
    """A finding for each module of a pipeline that runs at every step; the proven ones' taps get their Rule.

    Where the trial itself fails there is one finding, of everything: the model is served all the same.
    """
    taps = {tap.name: tap for tap in laboratory.taps if tap.parks}
    found: dict[str, Finding] = {}
    try:
        single = _record(laboratory, trial[0])
        for doubled in _doubled(laboratory.pipe, trial[0]):
            missing = [name for name in sorted(single) if found.get(name, Finding()).rule is None]
            if not missing:
                break
            try:
                double = _record(laboratory, doubled)
            except NotMergeable as reason:
                found |= {name: Finding(reason=str(reason)) for name in missing}
                continue
            for name in missing:
                found[name] = _find(laboratory, trial, taps[name], single[name], double.get(name, []))
    except Exception as error:
        _log.info("the trial of how requests merge failed", exc_info=error)
        return {ALL: Finding(reason=f"{type(error).__name__}: {error}")}
    for name, finding in found.items():
        taps[name].rule = finding.rule
    return found


def _find(
    laboratory: Laboratory,
    trial: Trial,
    tap: Tap,
    single: Sequence[Mapping[str, Any]],
    double: Sequence[Mapping[str, Any]],
) -> Finding:
    try:
        if len(single) < 2:
            raise NotMergeable("it runs once for a picture")
        rule = infer(single, double)
    except NotMergeable as reason:
        return Finding(reason=str(reason))
    finding = _try(laboratory, trial, tap, rule)
    scalars: dict[str, Kind] = {name: "shared" for name, kind in rule.arguments.items() if kind == "scalar"}
    if finding.rule is None and scalars:
        in_step = _try(laboratory, trial, tap, replace(rule, arguments={**rule.arguments, **scalars}))
        if in_step.rule is not None:
            return Finding(in_step.rule, f"calls merge only while they share {', '.join(sorted(scalars))}")
    return finding


def _try(laboratory: Laboratory, trial: Trial, tap: Tap, rule: Rule) -> Finding:
    tap.rule = rule
    try:
        prove(laboratory, trial, tap.name)
    except NotMergeable as reason:
        return Finding(reason=str(reason))
    except Exception as error:  # a module may fail on rows that it was never meant for
        return Finding(reason=f"merged calls fail: {error}")
    finally:
        tap.rule = None  # until all are found
    return Finding(rule)


def infer(single: Sequence[Mapping[str, Any]], double: Sequence[Mapping[str, Any]]) -> Rule:
    """The Rule that follows from the arguments of calls for one picture and of the same calls for two."""
    if len(single) != len(double):
        raise NotMergeable(f"two prompts make {len(double)} calls where one makes {len(single)}")
    guess = _Guess()
    for one, two in zip(single, double, strict=True):
        if one.keys() != two.keys():
            raise NotMergeable("two prompts are called with other arguments than one")
        for name in one:
            _compare(name, one[name], two[name], guess)
    if not {"row", "list"} & set(guess.arguments.values()):
        raise NotMergeable("no argument grows with the number of prompts")
    return Rule(guess.arguments, dimensions=guess.dimensions)


def _compare(name: str, one: Any, two: Any, guess: _Guess) -> None:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        _compare_tensors(name, one, two, guess)
        return
    if isinstance(one, list) and isinstance(two, list) and len(one) > 0 and len(two) == 2 * len(one):
        guess.add(name, "list")
        return
    inner, other = entries(one), entries(two)
    if inner is None or other is None:
        if type(one) is not type(two) or _holds_tensors(one):
            raise NotMergeable(f"{name} is a {type(one).__name__}")
        if isinstance(one, (bool, int, float, str)) and one != two:
            raise NotMergeable(f"{name} is {one} for one prompt and {two} for two")
        return
    if [key for key, _ in inner] != [key for key, _ in other]:
        raise NotMergeable(f"{name} has other entries for two prompts than for one")
    for (key, left), (_, right) in zip(inner, other, strict=True):
        _compare(f"{name}.{key}", left, right, guess)


def _compare_tensors(name: str, one: Tensor, two: Tensor, guess: _Guess) -> None:
    if one.shape == two.shape:
        guess.add(name, "scalar" if one.numel() == 1 and one.ndim <= 1 else "shared")
        return
    grown = [index for index, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if a != b]
    if one.ndim != two.ndim or len(grown) != 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        raise NotMergeable(f"{name} is {tuple(one.shape)} for one prompt and {tuple(two.shape)} for two")
    guess.add(name, "row")
    if guess.dimensions.setdefault(name, grown[0]) != grown[0]:
        raise NotMergeable(f"{name} grows in different dimensions")


def _holds_tensors(value: Any) -> bool:
    inner = vars(value).values() if hasattr(value, "__dict__") else ()
    return any(isinstance(each, (Tensor, list, dict)) for each in inner)


def prove(laboratory: Laboratory, trial: Trial, name: str) -> None:
    """Runs module `name` merged and alone for three requests; NotMergeable says how they differ."""
    runs = [laboratory.start(arguments, seed) for seed, arguments in enumerate(trial)]
    try:
        calls = [_advance(run, name) for run in runs]
        first, second = calls[0], calls[1]
        if first.key is None:
            raise NotMergeable(_obstacle(first))
        if second.key != first.key:
            raise NotMergeable(f"{_difference(first, second)} differs between requests of one shape")
        together = [call for call in calls if call.key == first.key]
        alone = [call.alone() for call in together]
        again = together[0].alone()
        if not agrees(alone[0], again, exactly=True):
            raise NotMergeable("it keeps a state, or draws at random: the same call twice gives two results")
        _check_merged(together, alone)
    finally:
        for run in runs:
            run.close()


def _check_merged(calls: list[Call], alone: list[Any]) -> None:
    rows = sum(call.rows for call in calls)
    rule = calls[0].rule
    assert rule is not None, "a call with a key has a Rule"
    for order, padding in ((1, 1), (-1, 0)):
        turned, wanted = calls[::order], alone[::order]
        result = _forward(turned, rows + padding)
        pieces = split(result, [call.rows for call in turned], rule.results)
        if not all(agrees(one, other) for one, other in zip(wanted, pieces, strict=True)):
            raise NotMergeable("merged calls give other results than calls alone")
    arguments = merge([Part(call, 0, call.rows) for call in calls], rows)
    turned_by_one = map_rows(arguments, rule, lambda each: each[1:] + each[:1])
    pieces = split(calls[0].run(**turned_by_one), [1] * rows, rule.results)
    back = join(pieces[-1:] + pieces[:-1], rule.results)
    if not agrees(join(alone, rule.results), back):
        raise NotMergeable("a row's result depends on its place among the rows")


def _forward(calls: Sequence[Call], num_rows: int) -> Any:
    return calls[0].run(**merge([Part(call, 0, call.rows) for call in calls], num_rows))


def agrees(one: Any, other: Any, *, exactly: bool = False) -> bool:
    """Whether two results are equal, but for rounding unless `exactly`."""
    left, right = list(_tensors(one)), list(_tensors(other))
    return len(left) == len(right) and all(
        torch.equal(a, b) if exactly else _near(a, b) for a, b in zip(left, right, strict=True)
    )


def _near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = one.abs().max().item() if one.numel() else 0.0
    difference = (one - other).abs().max().item() if one.numel() else 0.0
    return bool(difference <= TOLERANCE.get(one.dtype, 0.0) * largest)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    for _, entry in entries(value) or ():
        yield from _tensors(entry)


def _record(laboratory: Laboratory, arguments: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The arguments of the calls of each module of diffusers, up to the first that decodes."""
    modules, limit = laboratory.pipe.components, laboratory.max_forward_s
    calls: dict[str, list[Mapping[str, Any]]] = {}
    run = laboratory.start(arguments)
    try:
        run.start()
        while run.call is not None and run.num_steps < STEPS_SEEN and not _decodes(modules, run.call):
            call, began = run.call, time.perf_counter()
            try:
                result = call.alone()
            except Exception as error:
                raise NotMergeable(f"its trial failed: {type(error).__name__}: {error}") from error
            if isinstance(modules[call.name], ModelMixin):
                calls.setdefault(call.name, []).append(call.arguments)
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


def _decodes(modules: Mapping[str, Any], call: Call) -> bool:
    return hasattr(modules[call.name], "decode")


def _advance(run: PipelineRun, name: str) -> Call:
    """The run's first call of module `name`."""
    run.start()
    while run.call is not None and run.call.name != name:
        run.resume(run.call.alone())
    if run.call is None:
        raise NotMergeable(f"its trial ended before the module ran: {run.error}")
    return run.call


def _doubled(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same request for two pictures: by its prompt twice, or where that shows nothing by their number."""
    texts = ("prompt", "negative_prompt")
    yield {
        name: [value, value] if name in texts and isinstance(value, str) else value
        for name, value in arguments.items()
    }
    if "num_images_per_prompt" in inspect.signature(pipe.__call__).parameters:
        yield {**arguments, "num_images_per_prompt": 2}


def _obstacle(call: Call) -> str:
    return (
        f"no Rule covers its argument {call.obstacle}"
        if call.obstacle
        else ("the pipeline sets attention processors of its own")
    )


def _difference(one: Call, other: Call) -> str:
    """The arguments in which two calls differ."""
    if one.key is None or other.key is None:
        return _obstacle(other)
    left, right = dict(one.key[1]), dict(other.key[1])  # type: ignore[index]
    return ", ".join(sorted(name for name in left if left.get(name) != right.get(name))) or "what is passed"
