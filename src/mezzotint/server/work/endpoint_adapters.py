"""The adapters of one endpoint: the records that requests are resolved by, kept the same in every worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from mezzotint.errors import ModelLoadError
from mezzotint.messages import AdapterAdded, AdapterFailed, AddAdapter, RemoveAdapter
from mezzotint.server.store.adapters import Adapter
from mezzotint.server.workers.replica import Replica


@dataclass(slots=True)
class _Trial:
    """An adapter that the workers know and that requests cannot reach yet."""

    adapter: Adapter
    asked: set[Replica]
    """The workers that have not answered; `check`, `worker_ready`, `receive` and `worker_exited` keep it."""
    accepted: set[Replica] = field(default_factory=set)
    """The workers that hold the adapter now; they get the earlier one back if the trial fails."""
    answer: AdapterAdded | AdapterFailed | None = None
    """The first refusal, else the last acceptance; `check` reads it."""
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class EndpointAdapters(Mapping[str, Adapter]):
    """The records by route. All methods run in the event loop.

    A change takes three steps under `lock`: `check` lets the workers look, the caller writes to the database,
    and `publish` opens the route; `withdraw` instead of `publish` leaves everything as it was.
    """

    def __init__(self, workers: Callable[[], list[Replica]], family: Callable[[], str | None]) -> None:
        self.lock = asyncio.Lock()
        """Held by whoever changes the adapters, from the look at what there is until all places agree."""
        self.closed = False
        """Whether the endpoint has been deleted; nothing may be added then."""
        self._workers = workers
        self._family = family
        self._records: dict[str, Adapter] = {}
        self._leaving: dict[str, Adapter] = {}
        """Adapters of closed routes, until the requests that were taken in for them have ended."""
        self._trial: _Trial | None = None

    def __getitem__(self, route: str) -> Adapter:
        return self._records[route]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    # ------------------------------------------------------------ changes; the caller holds `lock`

    async def check(self, adapter: Adapter) -> Adapter:
        """Has every running worker look at an adapter; ModelLoadError says why one refused it.

        Without a running worker the record stays REGISTERED, and the next worker that starts looks at it.
        """
        trial = self._trial = _Trial(adapter, set())
        for replica in self._workers():
            self._ask(trial, replica)
        while trial.asked:
            trial.answered.clear()
            await trial.answered.wait()
        if isinstance(trial.answer, AdapterFailed):
            self.withdraw()
            raise ModelLoadError(trial.answer.message, code=trial.answer.code)
        return adapter if trial.answer is None else adapter.after(trial.answer, self._family())

    def publish(self, adapter: Adapter) -> None:
        """Opens the route of an adapter that has been checked and stored."""
        self._trial = None
        self._leaving.pop(adapter.route, None)
        self._records[adapter.route] = adapter

    def withdraw(self) -> None:
        """Ends a trial that failed: the workers go back to what they knew before."""
        trial, self._trial = self._trial, None
        assert trial is not None, "only a trial can be withdrawn"
        route = trial.adapter.route
        before = self._records.get(route) or self._leaving.get(route)
        for replica in trial.accepted & set(self._workers()):
            replica.send(AddAdapter(before.spec) if before else RemoveAdapter(route))

    def announce(self, adapters: Iterable[Adapter]) -> None:
        """Opens the routes of stored adapters at once; workers look at them meanwhile."""
        for adapter in adapters:
            self._records[adapter.route] = adapter
            for replica in self._workers():
                replica.send(AddAdapter(adapter.spec))

    def close_route(self, route: str) -> None:
        """Refuses new requests for a route; the workers keep the adapter for those taken in."""
        self._leaving[route] = self._records.pop(route)

    def forget(self, route: str) -> None:
        """Has the workers forget the adapter of a closed route, unless the route has been opened anew."""
        if self._leaving.pop(route, None) is not None:
            for replica in self._workers():
                replica.send(RemoveAdapter(route))

    # ------------------------------------------------------------ what happens to workers

    def worker_ready(self, replica: Replica) -> None:
        """Tells a worker that has just become ready every adapter, before any request that names one."""
        for adapter in (*self._leaving.values(), *self._records.values()):
            replica.send(AddAdapter(adapter.spec))
        if self._trial is not None:
            self._ask(self._trial, replica)

    def receive(self, replica: Replica, answer: AdapterAdded | AdapterFailed) -> None:
        """Takes a worker's answer; one about a file that the route no longer has counts for nothing."""
        trial, record = self._trial, self._records.get(answer.route)
        if trial is not None and (trial.adapter.route, trial.adapter.spec.path) == (
            answer.route,
            answer.path,
        ):
            if isinstance(answer, AdapterAdded):
                trial.accepted.add(replica)
            if not isinstance(trial.answer, AdapterFailed):
                trial.answer = answer
            trial.asked.discard(replica)
            trial.answered.set()
        elif record is not None and record.spec.path == answer.path:
            self._records[answer.route] = record.after(answer, self._family())

    def worker_exited(self, replica: Replica) -> None:
        """Stops waiting for a worker that has ended; the last one to end refuses the adapter by it."""
        trial = self._trial
        if trial is None or replica not in trial.asked:
            return
        trial.asked.discard(replica)
        trial.accepted.discard(replica)
        if trial.answer is None and not trial.asked:
            adapter = trial.adapter.spec
            trial.answer = AdapterFailed(
                adapter.route,
                adapter.path,
                "adapter_load_failed",
                "the worker ended while it looked at the adapter; read its log, then add it again",
            )
        trial.answered.set()

    def _ask(self, trial: _Trial, replica: Replica) -> None:
        trial.asked.add(replica)
        replica.send(AddAdapter(trial.adapter.spec))
