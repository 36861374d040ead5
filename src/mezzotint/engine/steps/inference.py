"""Rules that nobody wrote: inferred from a pipeline's own calls, then handed to the proof.

The same request runs for one picture and for two. What doubles is a row, what stays is shared, a single
element is a scalar, a list that doubles has one entry per row. Where a pipeline cannot draw two at once, what
has as many rows as the result is a row. What a request with a longer text has longer is its text. The proof
decides (proof.py); what it refuses is tried once more in the ways that it allows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mezzotint.engine.steps.batching import Kind, NotMergeable, Rule, entries, leaves
from mezzotint.engine.steps.laboratory import Laboratory, Seen, Trial
from mezzotint.engine.steps.objects import contents
from mezzotint.engine.steps.padding import Text
from mezzotint.engine.steps.pipeline_run import Tap
from mezzotint.engine.steps.proof import RowsNotRead, prove

_log = logging.getLogger(__name__)

ALL = "all"
"""Names the finding of a trial that failed: it is of every module."""


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
    objects: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, kind: Kind) -> None:
        if self.arguments.setdefault(name, kind) != kind:
            raise NotMergeable(f"{name} is once {self.arguments[name]} and once {kind}")

    def add_plain(self, name: str, one: Any, other: Any) -> None:
        """Notes what two objects without tensors hold; NotMergeable where one holds a tensor."""
        held = contents(one)
        if held is None or held != contents(other):
            _require_plain(name, one)
        elif self.objects.setdefault(name, held) != held:
            raise NotMergeable(f"{name} holds other things from call to call")


def find_rules(
    laboratory: Laboratory, trial: Trial, written: Mapping[str, Rule] | None = None
) -> dict[str, Finding]:
    """A finding for each module of a pipeline that runs at every step; the proven ones' taps get their Rule.

    `written` has Rules by hand, which are proven like any other. Where the trial itself fails there is one
    finding, of everything: the model is served all the same.
    """
    taps = {tap.name: tap for tap in laboratory.taps if tap.parks}
    found: dict[str, Finding] = {}
    try:
        single = laboratory.record(trial[0])
        for name, rule in (written or {}).items():
            if name in single:
                found[name] = _prove(laboratory, trial, taps[name], rule)
        _infer_all(laboratory, trial, taps, single, found)
    except Exception as error:
        _log.info("the trial of how requests merge failed", exc_info=error)
        return {ALL: Finding(reason=f"{type(error).__name__}: {error}")}
    for name, finding in found.items():
        taps[name].rule = finding.rule
    return found


def _infer_all(
    laboratory: Laboratory,
    trial: Trial,
    taps: Mapping[str, Tap],
    single: Mapping[str, Sequence[Seen]],
    found: dict[str, Finding],
) -> None:
    """Fills `found` with the modules that it lacks, or that lack a Rule there."""
    longer: Mapping[str, Sequence[Seen]] = {}
    for doubled in [*laboratory.doubled(trial[0]), None]:
        missing = [name for name in sorted(single) if found.get(name, Finding()).rule is None]
        if not missing:
            return
        longer = longer or laboratory.record(trial[2])
        try:
            double = None if doubled is None else laboratory.record(doubled)
        except NotMergeable as reason:
            found |= {name: Finding(reason=str(reason)) for name in missing}
            continue
        for name in missing:
            if double is None and not found[name].reason.startswith("its trial failed"):
                continue
            others = None if double is None else double.get(name, [])
            finding = _find(laboratory, trial, taps[name], single[name], others, longer.get(name, ()))
            if finding.rule is not None or double is not None:
                found[name] = finding


def _find(
    laboratory: Laboratory,
    trial: Trial,
    tap: Tap,
    single: Sequence[Seen],
    double: Sequence[Seen] | None,
    longer: Sequence[Seen],
) -> Finding:
    try:
        if len(single) < 2:
            raise NotMergeable("it runs once for a picture")
        rule = infer_by_result(single[0]) if double is None else infer(single, double)
    except NotMergeable as reason:
        return Finding(reason=str(reason))
    finding = _prove(laboratory, trial, tap, rule)
    text = text_of(single[0].arguments, longer[0].arguments, finding.rule or rule) if longer else None
    if text is not None:
        base = finding.rule or rule
        kinds: dict[str, Kind] = {**base.arguments, **({text.mask: "row"} if text.mask else {})}
        with_text = _prove(laboratory, trial, tap, replace(base, arguments=kinds, text=text))
        if with_text.rule is not None:
            return with_text if finding.rule is None else replace(with_text, reason=finding.reason)
        if finding.rule is not None:
            return replace(finding, reason=f"{finding.reason or 'texts of one length'}; {with_text.reason}")
    return finding


def _prove(laboratory: Laboratory, trial: Trial, tap: Tap, rule: Rule) -> Finding:
    """The finding on a Rule, or on one that asks for more to be equal."""
    finding = _try(laboratory, trial, tap, rule)
    scalars = [name for name, kind in rule.arguments.items() if kind == "scalar"]
    if isinstance(finding, RowsNotRead):
        return _prove_shared(laboratory, trial, tap, rule, finding.names, str(finding))
    if isinstance(finding, NotMergeable):
        return _prove_shared(laboratory, trial, tap, rule, scalars, str(finding))
    return finding


def _prove_shared(
    laboratory: Laboratory, trial: Trial, tap: Tap, rule: Rule, names: Sequence[str], reason: str
) -> Finding:
    kinds: tuple[Kind, ...] = ("shared", "equal")
    for kind in kinds if names else ():
        asked = replace(rule, arguments={**rule.arguments, **dict.fromkeys(names, kind)})
        again = _try(laboratory, trial, tap, asked)
        if isinstance(again, Finding):
            return replace(again, reason=f"only while calls share {', '.join(sorted(names))}")
    return Finding(reason=reason)


def _try(laboratory: Laboratory, trial: Trial, tap: Tap, rule: Rule) -> Finding | NotMergeable:
    tap.rule = rule
    try:
        prove(laboratory, trial, tap.name)
    except NotMergeable as reason:
        return reason
    except Exception as error:  # a module may fail on rows that it was never meant for
        return NotMergeable(f"merged calls fail: {error}")
    finally:
        tap.rule = None  # until all are found
    return Finding(rule)


def infer(single: Sequence[Seen], double: Sequence[Seen]) -> Rule:
    """The Rule that follows from calls for one picture and from the same calls for two."""
    if len(single) != len(double):
        raise NotMergeable(f"two prompts make {len(double)} calls where one makes {len(single)}")
    guess = _Guess()
    for one, two in zip(single, double, strict=True):
        if one.arguments.keys() != two.arguments.keys():
            raise NotMergeable("two prompts are called with other arguments than one")
        for name in one.arguments:
            _compare(name, one.arguments[name], two.arguments[name], guess)
    return _rule(guess)


def infer_by_result(seen: Seen) -> Rule:
    """The Rule of a module that is only seen with one picture, in more than one row."""
    if seen.rows < 2:
        raise NotMergeable("the pipeline cannot draw two pictures at once, and one has a single row")
    guess = _Guess()
    for name, value in leaves(seen.arguments, Rule({})):
        if not isinstance(value, Tensor):
            guess.add_plain(name, value, value)
        elif value.ndim and len(value) == seen.rows:
            guess.add(name, "row")
        else:
            guess.add(name, "scalar" if value.numel() == 1 and value.ndim <= 1 else "shared")
    return _rule(guess)


def _rule(guess: _Guess) -> Rule:
    if not {"row", "list"} & set(guess.arguments.values()):
        raise NotMergeable("no argument grows with the number of prompts")
    return Rule(guess.arguments, dimensions=guess.dimensions, objects=guess.objects)


def text_of(one: Mapping[str, Any], longer: Mapping[str, Any], rule: Rule) -> Text | None:
    """What is longer in a call with a longer text; None if nothing is, or if more than length differs."""
    others, lengths, found = dict(leaves(longer, rule)), set(), {}
    masks = [name for name, value in leaves(one, rule) if value is None and "mask" in name]
    for name, value in leaves(one, rule):
        other = others.get(name)
        if not isinstance(value, Tensor) or not isinstance(other, Tensor) or value.shape == other.shape:
            continue
        grown = [
            index
            for index, pair in enumerate(zip(value.shape, other.shape, strict=False))
            if len({*pair}) > 1
        ]
        if value.ndim != other.ndim or len(grown) != 1 or rule.arguments.get(name) != "row":
            return None
        lengths.add((value.shape[grown[0]], other.shape[grown[0]]))
        found[name] = grown[0]
        if "mask" in name:
            masks = [name]
    if len(lengths) != 1:
        return None
    return Text(found, masks[0] if masks else None)


def _compare(name: str, one: Any, two: Any, guess: _Guess) -> None:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        _compare_tensors(name, one, two, guess)
        return
    if isinstance(one, list) and isinstance(two, list) and len(one) > 0 and len(two) == 2 * len(one):
        guess.add(name, "list")
        return
    inner, other = entries(one), entries(two)
    if inner is None or other is None:
        if type(one) is not type(two):
            raise NotMergeable(f"{name} is a {type(one).__name__}")
        guess.add_plain(name, one, two)
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


def _require_plain(name: str, value: Any) -> None:
    """NotMergeable for an object that holds tensors of its own."""
    inner = vars(value).values() if hasattr(value, "__dict__") else ()
    if any(isinstance(each, (Tensor, list, dict)) for each in inner):
        raise NotMergeable(f"{name} is a {type(value).__name__}")
