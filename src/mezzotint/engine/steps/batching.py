"""Calls and how they merge: one forward of the real module for the rows of many jobs.

A Call is one parked forward with its arguments by name. A Rule says for one model class what each is:

- "row": a tensor [rows, ...];
- "scalar": one value for all rows of a call, as a 0-d or one-element tensor (expanded to rows), or a "row";
- "shared": a tensor without rows, or of which only row 0 is read; it must be equal, one copy is passed;
- "list": a Python list with one entry per row.

"outer.inner" names an entry of a dict argument. Every other argument must be equal and hold no tensor.
Calls merge only if they agree in everything but the number of rows; a call that its Rule does not fully
cover is never merged.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mezzotint.engine.lora.bank import Lease

Kind = Literal["row", "scalar", "shared", "list"]


@dataclass(frozen=True, slots=True)
class Rule:
    """How the arguments of one model class merge: from an argument's (dotted) name to its kind."""

    arguments: Mapping[str, Kind]
    multiples: Mapping[str, int] = field(default_factory=dict)
    """For a list of tensors: the model pads each to a multiple of this; lengths that pad alike are equal."""


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
    # Filled from the arguments where there is a Rule.
    rows: int = 1
    key: Hashable | None = None
    """Calls with equal keys may share a forward; None: never."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """All arguments by name."""

    def __post_init__(self) -> None:
        if self.rule is None or len(self.args) > len(self.parameters):
            return
        self.arguments = dict(zip(self.parameters, self.args, strict=False)) | self.kwargs
        try:
            self.rows = _num_rows(self.arguments, self.rule)
            parts = tuple(
                (name, _key(name, value, self.rule, self.rows))
                for name, value in sorted(self.arguments.items())
            )
            hash(parts)
        except (NotMergeable, TypeError):
            self.rows = 1
        else:
            self.key = (self.name, parts) if self.merges else None

    def alone(self) -> Any:
        """The result of the forward exactly as the pipeline asked for it."""
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


def split(result: Any, sizes: Sequence[int]) -> list[Any]:
    """The rows of a forward's result, cut into pieces of `sizes` rows; what is left over is padding.

    Pieces are copies: none keeps the whole batch in memory, and none has another alignment than when alone.
    """
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_slice(result, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def join(pieces: Sequence[Any]) -> Any:
    """The result of a call that ran in several forwards, from their pieces in order."""
    if len(pieces) == 1:
        return pieces[0]
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(list(pieces))
    if isinstance(first, list):
        return [entry for piece in pieces for entry in piece]
    if isinstance(first, tuple):
        return tuple(join(column) for column in zip(*pieces, strict=True))
    if isinstance(first, dict):  # a diffusers BaseOutput is one
        return type(first)(**{name: join([piece[name] for piece in pieces]) for name in first})
    return first


def leaves(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every (dotted name, value) of possibly nested dict arguments."""
    for name, value in arguments.items():
        if isinstance(value, dict):
            for inner, leaf in leaves(value):
                yield f"{name}.{inner}", leaf
        else:
            yield name, value


def _num_rows(arguments: Mapping[str, Any], rule: Rule) -> int:
    for name, value in leaves(arguments):
        kind = rule.arguments.get(name)
        if (kind == "row" and isinstance(value, Tensor)) or (kind == "list" and isinstance(value, list)):
            return len(value)
    raise NotMergeable("no argument has rows")


def _key(name: str, value: Any, rule: Rule, rows: int) -> Hashable:
    """What must be equal for this argument to merge."""
    kind = rule.arguments.get(name)
    if isinstance(value, dict):
        return tuple(
            (inner, _key(f"{name}.{inner}", entry, rule, rows)) for inner, entry in sorted(value.items())
        )
    if isinstance(value, Tensor):
        return _tensor_key(name, value, kind, rows)
    if kind == "list" and isinstance(value, list):
        if len(value) != rows:
            raise NotMergeable(name)
        return _list_key(value, rule.multiples.get(name, 1))
    return _freeze(value)


def _list_key(entries: list[Any], multiple: int) -> Hashable:
    """One entry's key where all are alike; else all in order, for then the model pads them to the longest."""
    keys = [_entry_key(entry, multiple) if isinstance(entry, Tensor) else _freeze(entry) for entry in entries]
    return ("list", *(keys if len(set(keys)) > 1 else keys[:1]))


def _entry_key(entry: Tensor, multiple: int) -> Hashable:
    return (-(-len(entry) // multiple), entry.shape[1:], entry.dtype, entry.device)


def _tensor_key(name: str, value: Tensor, kind: Kind | None, rows: int) -> Hashable:
    if kind == "shared":
        return (*_like(value), _contents(value))
    if kind == "scalar" and value.numel() == 1 and value.ndim <= 1:
        return (torch.Size(()), value.dtype, value.device)
    if kind in ("row", "scalar") and value.ndim > 0 and len(value) == rows:
        return (value.shape[1:], value.dtype, value.device)
    raise NotMergeable(name)


def _like(value: Tensor) -> tuple[Hashable, ...]:
    return (value.shape, value.dtype, value.device)


def _contents(value: Tensor) -> bytes:
    """The bytes of a shared tensor, kept while it lives: nobody writes into ids of positions."""
    known = _CONTENTS.get(value)
    if known is None:
        known = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        _CONTENTS[value] = known
    return known


_CONTENTS: MutableMapping[Tensor, bytes] = WeakIdKeyDictionary()


def _freeze(value: Any) -> Hashable:
    """A hashable stand-in that is equal only for equal values of equal types (1 is not True)."""
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_freeze(entry) for entry in value))
    if isinstance(value, dict):
        return (dict, tuple((name, _freeze(entry)) for name, entry in sorted(value.items())))
    if isinstance(value, Tensor):
        raise NotMergeable("a tensor that no Rule names")
    return (type(value), value)


def _merge(name: str, values: list[Any], parts: Sequence[Part], rule: Rule, num_rows: int) -> Any:
    first, kind = values[0], rule.arguments.get(name)
    if isinstance(first, dict):
        return {
            inner: _merge(f"{name}.{inner}", [value[inner] for value in values], parts, rule, num_rows)
            for inner in first
        }
    if kind == "list" and isinstance(first, list):
        entries = [
            entry
            for value, part in zip(values, parts, strict=True)
            for entry in value[part.start : part.stop]
        ]
        return entries + entries[-1:] * (num_rows - len(entries))
    if not isinstance(first, Tensor) or kind == "shared":
        return first
    pieces = [_rows(value, part, kind) for value, part in zip(values, parts, strict=True)]
    missing = num_rows - sum(len(piece) for piece in pieces)
    if missing:
        pieces.append(pieces[-1][-1:].expand(missing, *pieces[-1].shape[1:]))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).contiguous()


def _rows(value: Tensor, part: Part, kind: Kind | None) -> Tensor:
    if kind == "scalar" and value.ndim <= 1 and value.numel() == 1:
        return value.reshape(1).expand(part.stop - part.start)
    return value[part.start : part.stop]


def _slice(result: Any, start: int, stop: int) -> Any:
    if isinstance(result, Tensor):
        if result.ndim == 0 or len(result) < stop:
            raise NotMergeable(f"the result has no row {stop - 1}: its shape is {tuple(result.shape)}")
        return result[start:stop].clone()
    if isinstance(result, list):
        return [entry.clone() if isinstance(entry, Tensor) else entry for entry in result[start:stop]]
    if isinstance(result, tuple):
        return tuple(_slice(entry, start, stop) for entry in result)
    if isinstance(result, dict):
        return type(result)(**{name: _slice(entry, start, stop) for name, entry in result.items()})
    if result is None:
        return None
    raise NotMergeable(f"the result holds a {type(result).__name__}")
