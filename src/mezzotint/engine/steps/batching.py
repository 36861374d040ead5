"""Calls and how they merge: one forward of the real module for the rows of many jobs.

A Call is one parked forward with its arguments by name. A Rule says for one model class what each is:

- "row": a tensor [rows, ...], or with the rows in the dimension that the Rule names;
- "scalar": one value for all rows of a call, as a 0-d or one-element tensor (expanded to rows), or a "row";
- "shared": a tensor without rows, or of which only row 0 is read; it must be equal, one copy is passed;
- "equal": a "row" that must be the same in all rows of all calls;
- "list": a Python list with one entry per row;
- "rows": a Python list or tuple of "row" tensors, such as the residuals of a ControlNet.

"outer.inner" names an entry of a dict, list or tuple. Every other argument must be equal and hold no tensor;
objects are equal that hold the same, which is what they held when the Rule was proven.
Calls merge only if they agree in everything but the number of rows; a call that its Rule does not fully
cover is never merged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mezzotint.engine.lora.bank import Lease
from mezzotint.engine.steps.objects import contents
from mezzotint.engine.steps.padding import Text, padded

Kind = Literal["row", "scalar", "shared", "equal", "list", "rows"]
Lists = Literal["list", "rows"]
"""What a list in a result is: one entry per row, or tensors that each have rows."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How the arguments of one model class merge: from an argument's (dotted) name to its kind."""

    arguments: Mapping[str, Kind]
    multiples: Mapping[str, int] = field(default_factory=dict)
    """For a list of tensors: the model pads each to a multiple of this; lengths that pad alike are equal."""
    dimensions: Mapping[str, int] = field(default_factory=dict)
    """Where the row is not dimension 0 of a tensor: which it is."""
    results: Lists = "list"
    text: Text | None = None
    """Where texts of different length merge: what is padded for it."""
    objects: Mapping[str, str] = field(default_factory=dict)
    """What objects without tensors hold (objects.py): with anything else in them a call never merges."""

    def kind(self, name: str) -> Kind | None:
        """The kind of an argument; an entry of "rows" is a "row"."""
        found = self.arguments.get(name)
        in_rows = found is None and self.arguments.get(name.rpartition(".")[0]) == "rows"
        return "row" if in_rows else found


class NotMergeable(Exception):
    """A call or a result does not fit its Rule."""


@dataclass(slots=True, eq=False)
class Call:
    """One forward that a job asks for."""

    name: str
    """The pipeline component, e.g. `transformer`; `vae` for its decode."""
    run: Callable[..., Any]
    """The real forward."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rule: Rule | None = None
    parameters: tuple[str, ...] = ()
    """Names of the positional parameters of `run`."""
    lease: Lease | None = None
    """The adapter of the call's rows."""
    merges: bool = True
    """False: the call runs alone whatever its Rule allows."""
    repeatable: bool = False
    """Whether equal inputs may get a remembered result; see text_cache.py."""
    # Filled from the arguments where there is a Rule.
    rows: int = 1
    key: Hashable | None = None
    """Calls with equal keys may share a forward; None: never."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """All arguments by name, as merged forwards take them."""
    obstacle: str = ""
    """Why the Rule does not cover the call: the argument, or what is wrong with it."""
    in_place: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """Puts the state of the call's run in place; set when the run parks."""

    def __post_init__(self) -> None:
        if len(self.args) > len(self.parameters):
            return
        self.arguments = dict(zip(self.parameters, self.args, strict=False)) | self.kwargs
        if self.rule is None:
            return
        try:
            if self.rule.text is not None and self.merges:
                self.arguments = padded(self.arguments, self.rule.text, self.rule.dimensions)
            self.rows = _num_rows(self.arguments, self.rule)
            parts = tuple(
                (name, _key(name, value, self.rule, self.rows))
                for name, value in sorted(self.arguments.items())
            )
            hash(parts)
        except (NotMergeable, TypeError, LookupError, ValueError) as error:
            self.rows, self.obstacle = 1, str(error)
        else:
            self.key = (self.name, self.run, parts) if self.merges else None

    def alone(self) -> Any:
        """The result of the forward exactly as the pipeline asked for it."""
        with self.in_place():
            return self.run(*self.args, **self.kwargs)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `start` to `stop` of a call, as one forward takes them: tensors [stop - start, ...]."""

    call: Call
    start: int
    stop: int


def partition(calls: Sequence[Call], max_rows: int) -> list[list[Part]]:
    """The forwards of `calls` (of one key): together where they fit, a call above `max_rows` in chunks."""
    parts = [
        Part(call, start, min(start + max_rows, call.rows))
        for call in calls
        for start in range(0, call.rows, max_rows)
    ]
    forwards: list[list[Part]] = [[]]
    for part in parts:
        if sum(each.stop - each.start for each in forwards[-1]) + part.stop - part.start > max_rows:
            forwards.append([])
        forwards[-1].append(part)
    return forwards


def merge(parts: Sequence[Part], num_rows: int) -> dict[str, Any]:
    """Arguments of one forward with exactly `num_rows` rows: those of `parts`, then copies of the last one.

    Row tensors come out contiguous whatever they were, so that no kernel is chosen by a neighbour's memory
    layout.
    """
    first = parts[0].call
    assert first.rule is not None, "only calls with a Rule merge"
    return {
        name: _merge(name, [part.call.arguments[name] for part in parts], parts, first.rule, num_rows)
        for name in first.arguments
    }


def split(result: Any, sizes: Sequence[int], lists: Lists = "list") -> list[Any]:
    """The rows of a forward's result, cut into pieces of `sizes` rows; what is left over is padding.

    Pieces are copies: none keeps the whole batch in memory, and none has another alignment than when alone.
    """
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_slice(result, start, start + size, lists) for start, size in zip(starts, sizes, strict=True)]


def join(pieces: Sequence[Any], lists: Lists = "list") -> Any:
    """The result of a call that ran in several forwards, from their pieces in order."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(list(pieces))
    if isinstance(first, list) and lists == "list":
        return [entry for piece in pieces for entry in piece]
    if isinstance(first, (list, tuple)):
        columns = [join(column, lists) for column in zip(*pieces, strict=True)]
        return columns if isinstance(first, list) else tuple(columns)
    if isinstance(first, dict):  # a diffusers BaseOutput is one
        return type(first)(**{name: join([piece[name] for piece in pieces], lists) for name in first})
    return first


def entries(value: Any) -> list[tuple[str, Any]] | None:
    """The named entries of a dict, list or tuple; None for what has none."""
    if isinstance(value, dict):
        return sorted((str(name), entry) for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return [(str(index), entry) for index, entry in enumerate(value)]
    return None


def rebuilt(value: Any, change: Callable[[str, Any], Any]) -> Any:
    """A dict, list or tuple like `value` with every entry changed; `change` is given its name, too."""
    if isinstance(value, dict):
        return {name: change(str(name), entry) for name, entry in value.items()}
    return type(value)(change(str(index), entry) for index, entry in enumerate(value))


def leaves(arguments: Mapping[str, Any], rule: Rule) -> Iterator[tuple[str, Any]]:
    """Every (dotted name, value) of possibly nested arguments; a list of rows is one."""
    for name, value in arguments.items():
        inner = None if rule.kind(name) == "list" else entries(value)
        if inner is None:
            yield name, value
        else:
            yield from leaves({f"{name}.{key}": entry for key, entry in inner}, rule)


def _num_rows(arguments: Mapping[str, Any], rule: Rule) -> int:
    for name, value in leaves(arguments, rule):
        kind = rule.kind(name)
        if kind == "list" and isinstance(value, list):
            return len(value)
        if kind == "row" and isinstance(value, Tensor):
            return value.shape[rule.dimensions.get(name, 0)]
    raise NotMergeable("no argument has rows")


def _key(name: str, value: Any, rule: Rule, rows: int) -> Hashable:
    """What must be equal for this argument to merge."""
    kind = rule.kind(name)
    if isinstance(value, Tensor):
        return _tensor_key(name, value, kind, rule.dimensions.get(name, 0), rows)
    if kind == "list" and isinstance(value, list):
        if len(value) != rows:
            raise NotMergeable(name)
        return _list_key(value, rule.multiples.get(name, 1))
    inner = entries(value)
    if name in rule.objects:
        if contents(value) != rule.objects[name]:
            raise NotMergeable(f"{name}, which holds something else than when the Rule was proven")
        return (type(value), rule.objects[name])
    if inner is None:
        return (type(value), value)  # 1 is not True
    return (type(value), *((key, _key(f"{name}.{key}", entry, rule, rows)) for key, entry in inner))


def _list_key(rows: list[Any], multiple: int) -> Hashable:
    """One entry's key where all are alike; else all in order, for then the model pads them to the longest."""
    keys = [_entry_key(entry, multiple) for entry in rows]
    return ("list", *(keys if len(set(keys)) > 1 else keys[:1]))


def _entry_key(entry: Any, multiple: int) -> Hashable:
    if isinstance(entry, Tensor):
        return (-(-len(entry) // multiple), entry.shape[1:], entry.dtype, entry.device)
    inner = entries(entry)
    if inner is None:
        return (type(entry), entry)
    return (type(entry), *((key, _entry_key(value, multiple)) for key, value in inner))


def _tensor_key(name: str, value: Tensor, kind: Kind | None, dimension: int, rows: int) -> Hashable:
    if kind == "shared":
        return (*_like(value), _contents(value))
    if kind == "scalar" and value.numel() == 1 and value.ndim <= 1:
        return (torch.Size(()), value.dtype, value.device)
    if kind in ("row", "scalar", "equal") and value.ndim > dimension and value.shape[dimension] == rows:
        first = value.select(dimension, 0)
        if kind == "equal":
            if not torch.equal(value, first.unsqueeze(dimension).expand_as(value)):
                raise NotMergeable(f"{name}, whose rows must be equal")
            return (
                *_like(first),
                _contents(value)[: first.nbytes] if dimension == 0 else tensor_bytes(first),
            )
        return (first.shape, value.dtype, value.device)
    raise NotMergeable(name)


def _like(value: Tensor) -> tuple[Hashable, ...]:
    return (value.shape, value.dtype, value.device)


def _contents(value: Tensor) -> bytes:
    """The bytes of a shared tensor, kept while it lives: nobody writes into ids of positions."""
    known = _CONTENTS.get(value)
    if known is None:
        known = _CONTENTS[value] = tensor_bytes(value)
    return known


def tensor_bytes(value: Tensor) -> bytes:
    """What the tensor holds, in the order of its elements."""
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


_CONTENTS: MutableMapping[Tensor, bytes] = WeakIdKeyDictionary()


def _merge(name: str, values: list[Any], parts: Sequence[Part], rule: Rule, num_rows: int) -> Any:
    first, kind = values[0], rule.kind(name)
    if kind == "list" and isinstance(first, list):
        rows = [
            entry
            for value, part in zip(values, parts, strict=True)
            for entry in value[part.start : part.stop]
        ]
        return rows + rows[-1:] * (num_rows - len(rows))
    if entries(first) is not None:
        columns = {
            key: [dict(entries(value) or ())[key] for value in values] for key, _ in entries(first) or ()
        }
        return rebuilt(first, lambda key, _: _merge(f"{name}.{key}", columns[key], parts, rule, num_rows))
    if not isinstance(first, Tensor) or kind == "shared":
        return first
    dimension = rule.dimensions.get(name, 0)
    pieces = [_rows(value, part, kind, dimension) for value, part in zip(values, parts, strict=True)]
    missing = num_rows - sum(piece.shape[dimension] for piece in pieces)
    if missing:
        last = pieces[-1].narrow(dimension, pieces[-1].shape[dimension] - 1, 1)
        pieces += [last] * missing
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dimension)).contiguous()


def _rows(value: Tensor, part: Part, kind: Kind | None, dimension: int) -> Tensor:
    if kind == "scalar" and value.ndim <= 1 and value.numel() == 1:
        return value.reshape(1).expand(part.stop - part.start)
    return value.narrow(dimension, part.start, part.stop - part.start)


def _slice(result: Any, start: int, stop: int, lists: Lists) -> Any:
    if isinstance(result, Tensor):
        if result.ndim == 0 or len(result) < stop:
            raise NotMergeable(f"the result has no row {stop - 1}: its shape is {tuple(result.shape)}")
        return result[start:stop].clone()
    if isinstance(result, list) and lists == "list":
        return [entry.clone() if isinstance(entry, Tensor) else entry for entry in result[start:stop]]
    if isinstance(result, (list, tuple)):
        pieces = [_slice(entry, start, stop, lists) for entry in result]
        return pieces if isinstance(result, list) else tuple(pieces)
    if isinstance(result, dict):
        return type(result)(**{name: _slice(entry, start, stop, lists) for name, entry in result.items()})
    if result is None:
        return None
    raise NotMergeable(f"the result holds a {type(result).__name__}")
