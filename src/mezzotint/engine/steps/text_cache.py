"""Remembers what text encoders returned: a call with equal inputs gets an equal result without a forward.

What a pipeline makes of a prompt before it calls the encoder does not matter, for calls are compared as they
reach the module: tensors by their bytes, strides and type, everything else by value, and the adapter's
weights for this module with their scale. A call that holds anything else runs as always.

A module must earn it. It runs again at the first repeat and must return the same bytes. One that draws from
the process's generators, changes its inputs or returns something else at the repeat is never remembered.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mezzotint.engine.steps.batching import Call, entries, tensor_bytes
from mezzotint.engine.steps.laboratory import agrees
from mezzotint.engine.steps.shared_state import process_generators

_log = logging.getLogger(__name__)
_PLAIN = (type(None), bool, int, float, str, torch.dtype)


class TextCache:
    """The results of one pipeline's text encoders, the least recently used forgotten first.

    Results are handed out as deep copies: a pipeline may write into what it got, and a copy has the strides
    and the shared storages of the original, so that later kernels see the same layout.
    """

    def __init__(self, max_bytes: int, device: torch.device | None = None) -> None:
        """`max_bytes` of results are kept; 0: nothing is."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Of the remembered results."""
        self.hits = 0
        self.misses = 0
        """Calls that might have been remembered and ran."""
        self._generators = process_generators(device)
        self._known: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        """Results and their bytes by the key of their call, the least recently used first."""
        self._proven: set[str] = set()
        """Modules that returned the same bytes at a repeat."""
        self._refused: set[str] = set()
        """Modules that do not give equal calls equal results."""

    def result(self, call: Call) -> Any:
        """The result of the call alone, remembered or made."""
        usable = self.max_bytes and call.repeatable and call.name not in self._refused
        key = _call_key(call) if usable else None
        if key is None:
            return call.alone()
        known = self._known.get(key)
        if known is not None and call.name in self._proven:
            self._known.move_to_end(key)
            self.hits += 1
            return copy.deepcopy(known[0])
        self.misses += 1
        result, drew = self._run(call)
        if drew or _call_key(call) != key or (known is not None and not _same(known[0], result)):
            self._refuse(call.name)
        elif known is not None:
            self._proven.add(call.name)
        elif _holds_only_tensors(result):
            self._keep(key, result)
        return result

    def _run(self, call: Call) -> tuple[Any, bool]:
        """The result, and whether the module has drawn random numbers."""
        with call.in_place():
            before = [each.get_state() for each in self._generators]
            result = call.run(*call.args, **call.kwargs)
            after = [each.get_state() for each in self._generators]
        return result, not all(map(torch.equal, before, after))

    def _keep(self, key: Hashable, result: Any) -> None:
        memo: dict[Any, Any] = {}
        kept = copy.deepcopy(result, memo)
        num_bytes = sum(storage.nbytes() for storage in memo.get("torch", {}).values())
        if num_bytes > self.max_bytes:
            return
        self._known[key] = kept, num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._known.popitem(last=False)[1][1]

    def _refuse(self, name: str) -> None:
        _log.info("equal calls of %s do not have equal results: it runs for each request", name)
        self._refused.add(name)
        for key in [key for key in self._known if isinstance(key, tuple) and key[0] == name]:
            self.num_bytes -= self._known.pop(key)[1]


def _call_key(call: Call) -> Hashable | None:
    """What decides a call's result; None where that cannot be said."""
    adapter = None
    if call.lease is not None and call.name in call.lease.resident.packed:
        adapter = (call.lease.resident.serial, call.lease.scale)
    try:
        return (call.name, adapter, _key(call.args), _key(call.kwargs))
    except TypeError:
        return None


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        digest = hashlib.sha256(tensor_bytes(value)).digest()
        return (value.shape, value.stride(), value.dtype, value.device, digest)
    if type(value) in _PLAIN:
        return (type(value), value)
    inner = entries(value)
    if inner is None:
        raise TypeError(f"a {type(value).__name__} is not compared")
    return (type(value), *((name, _key(entry)) for name, entry in inner))


def _holds_only_tensors(result: Any) -> bool:
    """Whether a copy of the result is all of it. transformers' caches of keys and values are tensors, too."""
    if isinstance(result, (Tensor, Cache)) or type(result) in _PLAIN:
        return True
    inner = entries(result)
    return inner is not None and all(_holds_only_tensors(entry) for _, entry in inner)


def _same(one: Any, other: Any) -> bool:
    return agrees(one, other, exactly=True)
