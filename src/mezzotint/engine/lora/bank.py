"""Adapters as rows: which LoRA adapters are known and resident, and which row of a forward uses which.

    bank = AdapterBank(pipeline, byte_budget=...)   # once, after loading, before taps: prepares the layers
    info = bank.add(route, path, scale=...)         # reads and checks the file; ModelLoadError says why not
    bank.prefetch(route)                            # a request is on its way: read the file in the background
    if bank.is_ready(route): ...                    # acquire() would not wait for what is being read
    lease = bank.acquire(route, scale)              # at a job's admission; None: the budget is full of those
                                                    # in use, ask again when a job has ended
    with bank.rows("transformer", [lease, None]):   # around every forward of a tapped module: its component's
        module.forward(...)                         # name, one entry per row; padding repeats its row's entry
    lease.release()                                 # when the job has ended, however it ended

What holds: a row without a lease gets the base's own bytes; a row with one gets the same bytes whatever rows
are beside it and wherever it stands, as long as the number of rows is the same (mode `exact` fixes it); base
weights never change. A forward whose rows cannot be told apart (a class without a Rule) is one row:
`[lease]`. Text encoders are components like the denoiser: an adapter may have parts for them. `lease.load_s`
is what the job waited for a cold adapter. All of it belongs to the thread that runs the forwards; only
`check` (the slow part of `add`) may run in any thread: `bank.register(route, bank.check(path))` is
`bank.add(route, path)`.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mezzotint.engine.lora.files import read_adapter
from mezzotint.engine.lora.layers import (
    Layout,
    LoraLayer,
    PackedAdapter,
    RowAdapter,
    RowCopies,
    RowProducts,
    Weights,
    patch_layers,
    together,
)
from mezzotint.errors import ModelLoadError, NotFoundError, nearest
from mezzotint.spec import AdapterUse

_AND, _TIMES = "+", "*"
"""In the names of several adapters; no route has these characters."""
COPY_SHARE = 10
"""Rows are computed together only if the copies of their matrices take at most a tenth of the byte budget."""


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """An adapter's file that fits the model."""

    path: Path
    checksum: str
    """SHA-256 (hex) of the file."""
    rank: int
    """The largest rank among its layers."""
    num_bytes: int
    """What it takes while resident."""
    target_modules: list[str]
    """Kinds of layers it changes, e.g. `attn.to_q`."""


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A registered adapter: what the worker reports of it."""

    route: str
    """Or the name of several that are used together; see `AdapterBank.name_of`."""
    scale: float
    file: CheckedFile
    """The first one's, where it is several."""
    parts: tuple[tuple[CheckedFile, float], ...] = ()
    """The files and scales of several; empty for one."""

    @property
    def num_bytes(self) -> int:
        """What it takes while resident."""
        return sum(file.num_bytes for file, _ in self.parts) if self.parts else self.file.num_bytes


@dataclass(frozen=True, slots=True)
class BankStats:
    """Counters since the start, and what is resident now."""

    hits: int
    loads: int
    evictions: int
    num_bytes: int
    """Resident adapters and the copies for rows."""
    resident_routes: list[str]


class Resident:
    """An adapter in memory: its weights for each component of the pipeline."""

    __slots__ = ("load_s", "num_bytes", "num_leases", "packed", "route", "serial", "wanted")

    def __init__(self, route: str, packed: Mapping[str, PackedAdapter], load_s: float) -> None:
        self.route = route
        self.packed = packed
        self.load_s = load_s
        """Seconds that its loading took; 0 once a lease has passed them on."""
        self.num_bytes = sum(each.num_bytes for each in packed.values())
        # Written by the bank alone.
        self.serial = 0
        """Number of this loading; no two share one, so that rows of an earlier file are told apart."""
        self.wanted = False
        """Read ahead for a job that has not come for it yet."""
        self.num_leases = 0


class Lease:
    """A job's hold on a resident adapter; it is not evicted before `release`."""

    __slots__ = ("_bank", "_released", "load_s", "resident", "scale")

    def __init__(self, bank: AdapterBank, resident: Resident, scale: float, load_s: float) -> None:
        self._bank = bank
        self._released = False
        self.resident = resident
        self.scale = scale
        self.load_s = load_s
        """Seconds that loading the adapter for this job took; 0 for one that was resident."""

    def release(self) -> None:
        """Ends the hold; a second call does nothing."""
        if not self._released:
            self._released = True
            self._bank._released(self.resident)


class _ReadAhead:
    """An adapter being read in the background; its bytes count from the start."""

    def __init__(self, future: Future[Resident], num_bytes: int) -> None:
        self.future = future
        self._num_bytes = num_bytes

    @property
    def num_bytes(self) -> int:
        failed = self.future.done() and self.future.exception() is not None
        return 0 if failed else self._num_bytes


class AdapterBank:
    """All adapters of one pipeline; see the module's docstring."""

    def __init__(self, pipeline: Any, *, byte_budget: int) -> None:
        self.byte_budget = byte_budget
        self._pipeline = pipeline
        parts = {name: getattr(pipeline, name) for name in adaptable_components(pipeline)}
        self._compiled = any(hasattr(part.forward, "_torchdynamo_orig_callable") for part in parts.values())
        """A compiled model runs as it was compiled: its layers cannot be adapted any more."""
        self._layers: dict[str, dict[str, LoraLayer]] = {
            name: patch_layers(part) for name, part in parts.items() if not self._compiled
        }
        self._known: dict[str, AdapterInfo] = {}
        """What routes mean; filled by `register`."""
        self._resident: OrderedDict[str, Resident] = OrderedDict()
        """By route, the least recently used first; filled by `_install`, emptied by `_make_room`."""
        self._detached: list[Resident] = []
        """Replaced or removed while leased; the last lease to end drops them."""
        self._ahead: dict[str, _ReadAhead] = {}
        """By route; filled by `prefetch`, emptied into `_resident`."""
        self._copies: OrderedDict[tuple[str, Layout, int], RowCopies] = OrderedDict()
        """By component, layout and number of rows, the least recently used first."""
        self._products: dict[str, tuple[Any, RowProducts]] = {}
        """The latest of each component, with the rows that it is for."""
        self._hits = self._loads = self._evictions = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapter-reader")

    # ------------------------------------------------------------ registration

    def add(self, route: str, path: Path | str, *, scale: float = 1.0, checksum: str = "") -> AdapterInfo:
        """Reads the whole file, checks it against the model and makes the route known; loads nothing.

        ModelLoadError tells what is wrong with the file; the route then keeps what it had.
        """
        return self.register(route, self.check(path, checksum=checksum), scale=scale)

    def check(self, path: Path | str, *, checksum: str = "") -> CheckedFile:
        """The slow part of `add`: reads the whole file and checks it against the model."""
        if self._compiled:
            raise ModelLoadError(
                "a pipeline whose model was compiled beforehand takes no adapters; hand it over "
                'uncompiled, and set performance to "max"',
                code="adapter_unsupported",
            )
        adapter = read_adapter(
            Path(path), self._pipeline, self._layers, checksum=checksum, max_bytes=self.byte_budget
        )
        return CheckedFile(
            Path(path), adapter.checksum, adapter.rank, adapter.num_bytes, adapter.target_modules
        )

    def register(self, route: str, file: CheckedFile, *, scale: float = 1.0) -> AdapterInfo:
        """The quick part of `add`. A known route is replaced; jobs with a lease finish on what they hold."""
        info = AdapterInfo(route, scale, file)
        self._known[route] = info
        self._detach(route)
        return info

    def remove(self, route: str) -> None:
        """Forgets the route; jobs that hold a lease finish with it. Unknown routes are ignored."""
        self._known.pop(route, None)
        self._detach(route)

    def name_of(self, uses: Sequence[AdapterUse]) -> str:
        """The name under which these adapters are prefetched and acquired: a route, or for several one name.

        Several are one adapter of their summed rank whose scales are part of it, `ink*0.5+glow*1.0`: its rows
        are rows like any other's. NotFoundError as for `info`.
        """
        infos = [self.info(use.route) for use in uses]
        if len(uses) == 1:
            return uses[0].route
        scales = [
            info.scale if use.scale is None else use.scale for info, use in zip(infos, uses, strict=True)
        ]
        return _AND.join(
            f"{info.route}{_TIMES}{float(scale)!r}" for info, scale in zip(infos, scales, strict=True)
        )

    def info(self, route: str) -> AdapterInfo:
        """What `route`, or the name of several, stands for; NotFoundError names the nearest."""
        if _AND in route:
            uses = [part.split(_TIMES) for part in route.split(_AND)]
            parts = tuple((self.info(each).file, float(scale)) for each, scale in uses)
            return AdapterInfo(route, 1.0, parts[0][0], parts)
        known = self._known.get(route)
        if known is None:
            near = nearest(route, self._known)
            hint = f"; nearest: {near}" if near else ""
            raise NotFoundError(
                f"there is no adapter {route!r} here{hint}", code="adapter_not_found", param="model"
            )
        return known

    def _knows(self, name: str) -> bool:
        return all(route in self._known for route in _routes_in(name))

    # ------------------------------------------------------------ residency

    def prefetch(self, route: str) -> None:
        """Starts to read a cold adapter in the background, if it fits beside what is in use or read ahead."""
        if not self._knows(route) or route in self._ahead:
            return
        info = self.info(route)
        resident = self._resident.get(route)
        if resident is not None:
            resident.wanted = True
        elif self._make_room(info.num_bytes, spare_wanted=True):
            self._ahead[route] = _ReadAhead(self._reader.submit(self._read, info), info.num_bytes)

    def is_ready(self, route: str) -> bool:
        """False while the adapter is being read in the background, which this starts where it can."""
        if not self._knows(route) or route in self._resident:
            return True
        self.prefetch(route)
        ahead = self._ahead.get(route)
        return ahead is None or ahead.future.done()

    def acquire(self, route: str, scale: float | None = None) -> Lease | None:
        """A hold on the adapter, loading it if it is cold; None when adapters in use leave no room for it.

        `scale` None is the adapter's own. NotFoundError for an unknown route, ModelLoadError if the file has
        changed or vanished since it was added.
        """
        info = self.info(route)
        resident = self._resident.get(route)
        if resident is None:
            resident = self._load(info)
            if resident is None:
                return None
        else:
            self._hits += 1
            self._resident.move_to_end(route)
        resident.wanted = False
        resident.num_leases += 1
        scale = info.scale if scale is None else scale
        load_s, resident.load_s = resident.load_s, 0.0
        return Lease(self, resident, scale, load_s)

    def stats(self) -> BankStats:
        """Counters and residency, for the worker's Stats."""
        routes = [name for name in self._resident if _AND not in name]
        return BankStats(self._hits, self._loads, self._evictions, self._used_bytes(), routes)

    def close(self) -> None:
        """Stops the background reader and gives the layers back as they were."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        for layers in self._layers.values():
            for layer in layers.values():
                layer.close()

    def _read(self, info: AdapterInfo) -> Resident:
        start = time.monotonic()
        with torch.inference_mode(False), torch.no_grad():
            weights = (
                together([(self._weights(file), scale) for file, scale in info.parts])
                if info.parts
                else self._weights(info.file)
            )
            packed = {name: PackedAdapter(self._layers[name], part) for name, part in weights.items()}
        return Resident(info.route, packed, time.monotonic() - start)

    def _weights(self, file: CheckedFile) -> Mapping[str, Mapping[str, Weights]]:
        return read_adapter(
            file.path, self._pipeline, self._layers, checksum=file.checksum, max_bytes=self.byte_budget
        ).weights

    def _load(self, info: AdapterInfo) -> Resident | None:
        self._install_ahead(but=info.route)
        ahead = self._ahead.pop(info.route, None)
        if ahead is not None:
            return self._install(ahead.future.result())
        if not self._make_room(info.num_bytes):
            return None
        return self._install(self._read(info))

    def _install(self, resident: Resident) -> Resident:
        self._loads += 1
        resident.serial = self._loads
        self._resident[resident.route] = resident
        return resident

    def _install_ahead(self, but: str = "") -> None:
        """Makes resident what has been read ahead; a failure waits for the job that comes for the adapter."""
        for route, ahead in list(self._ahead.items()):
            if route != but and ahead.future.done() and ahead.future.exception() is None:
                del self._ahead[route]
                self._install(ahead.future.result()).wanted = True

    def _released(self, resident: Resident) -> None:
        resident.num_leases -= 1
        if resident.num_leases == 0 and resident in self._detached:
            self._products.clear()  # they hold tensors
            self._detached.remove(resident)

    def _detach(self, route: str) -> None:
        """What is resident or being read under `route`, alone or with others, is no longer what it means."""
        for name in [name for name in (*self._ahead, *self._resident) if route in _routes_in(name)]:
            self._ahead.pop(name, None)
            resident = self._resident.pop(name, None)
            if resident is not None:
                self._products.clear()
                if resident.num_leases:
                    self._detached.append(resident)

    def _used_bytes(self) -> int:
        held = sum(each.num_bytes for each in (*self._resident.values(), *self._detached))
        held += sum(each.num_bytes for each in self._ahead.values())
        return held + sum(copies.num_bytes for copies in self._copies.values())

    def _make_room(self, num_bytes: int, *, spare_wanted: bool = False) -> bool:
        """Evicts what is not in use, least recently used first, until they fit; False if they never do."""
        self._install_ahead()
        excess = self._used_bytes() + num_bytes - self.byte_budget
        if excess <= 0:
            return True
        idle = [each for each in self._resident.values() if not each.num_leases]
        idle = [each for each in idle if not each.wanted or not spare_wanted]
        copies = sum(each.num_bytes for each in self._copies.values())
        if sum(each.num_bytes for each in idle) + copies < excess:
            return False
        self._products.clear()  # they hold tensors
        for resident in idle:
            if excess <= 0:
                return True
            del self._resident[resident.route]
            self._evictions += 1
            excess -= resident.num_bytes
        while excess > 0:
            _, dropped = self._copies.popitem(last=False)
            excess -= dropped.num_bytes
        return True

    # ------------------------------------------------------------ rows

    def rows(self, component: str, leases: Sequence[Lease | None]) -> contextlib.AbstractContextManager[None]:
        """Applies each row's adapter to the forwards of `component` inside the `with`."""
        rows = [
            None if lease is None or component not in lease.resident.packed
            else RowAdapter(lease.resident.serial, lease.resident.packed[component], lease.scale)
            for lease in leases
        ]  # fmt: skip
        if not any(rows):
            return _NO_ADAPTERS
        key = tuple(None if row is None else (row.serial, row.scale) for row in rows)
        known = self._products.get(component)
        if known is not None and known[0] == key:
            return known[1]
        with torch.inference_mode(False), torch.no_grad():
            products = self._row_products(component, rows)
        self._products[component] = (key, products)
        return products

    def _row_products(self, component: str, rows: Sequence[RowAdapter | None]) -> RowProducts:
        products = RowProducts(self._layers[component])
        by_layout: dict[Layout, list[tuple[int, RowAdapter]]] = {}
        for index, row in enumerate(rows):
            if row is not None:
                by_layout.setdefault(row.packed.layout, []).append((index, row))
        for layout, members in by_layout.items():
            packed = members[0][1].packed
            batched = packed.linear_bytes * len(rows) * COPY_SHARE <= self.byte_budget or len(rows) == 1
            if batched and layout.blocks:
                matrices = self._matrices(component, members, len(rows))
                products.add_batched(layout, matrices, _mask(members, len(rows), packed.downs[0].device))
            products.add_row_by_row(len(rows), members, linear=not batched)
        products.finish()
        return products

    def _matrices(
        self, component: str, members: Sequence[tuple[int, RowAdapter]], num_rows: int
    ) -> RowCopies | PackedAdapter:
        first = members[0][1]
        if num_rows == 1 and first.scale == 1.0:
            return first.packed
        key = (component, first.packed.layout, num_rows)
        copies = self._copies.get(key)
        if copies is None:
            self._make_room(first.packed.linear_bytes * num_rows)
            copies = self._copies[key] = RowCopies(first.packed, num_rows)
        self._copies.move_to_end(key)
        for index, row in members:
            copies.fill(index, row)
        return copies


def _routes_in(name: str) -> list[str]:
    return [part.partition(_TIMES)[0] for part in name.split(_AND)]


_NO_ADAPTERS: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def _mask(
    members: Sequence[tuple[int, RowAdapter]], num_rows: int, device: torch.device
) -> torch.Tensor | None:
    """[rows, 1, 1], true where a row is among `members`; None if all are."""
    if len(members) == num_rows:
        return None
    mask = torch.zeros(num_rows, 1, 1, dtype=torch.bool, device=device)
    mask[[index for index, _ in members]] = True
    return mask


def adaptable_components(pipeline: Any) -> list[str]:
    """The pipeline's components that adapters may change: those that diffusers says, else the denoiser."""
    names = getattr(pipeline, "_lora_loadable_modules", None) or ["transformer", "unet"]
    return [name for name in names if isinstance(getattr(pipeline, name, None), torch.nn.Module)]
