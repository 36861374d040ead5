"""One version of an endpoint's settings, and the replicas that run it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from mezzotint.config import EndpointSettings
from mezzotint.messages import FromWorker, Loading
from mezzotint.server.work.profiles import Calibration, load_message, settings_digest
from mezzotint.server.workers.process import WorkerSettings
from mezzotint.server.workers.replica import Replica, ReplicaState

START_S = 0.5
"""What the start of a process takes beside loading the model, about."""


class Deployment:
    """A version and its replicas, which are STOPPED at first. The callbacks are the replicas'.

    `num` of them at first; `grow` and `shrink` change that.
    """

    def __init__(
        self,
        version: int,
        spec: EndpointSettings,
        workers: WorkerSettings,
        calibration: Calibration | None,
        *,
        num: int,
        on_message: Callable[[Replica, FromWorker], None],
        on_change: Callable[[Replica], None],
        on_exit: Callable[[Replica, bool], int],
    ) -> None:
        self.version = version
        self.spec = spec
        self.calibration = calibration if calibration and calibration.fits(spec) else None
        """What was measured under these settings; `became_ready` fills it, starts of workers read it."""
        self.proven = calibration is not None and calibration.version == version
        """Whether a worker has ever been ready with these settings."""
        self.form: str | None = None
        """The form of the denoiser, decided by the first worker that is ready; the others must follow it."""
        self._names = itertools.count()
        self._make: Callable[[], Replica] = lambda: Replica(
            f"{spec.id}/{version}/{next(self._names)}",
            workers,
            lambda: load_message(spec, self.calibration, self.form),
            on_message=on_message,
            on_change=on_change,
            on_exit=on_exit,
        )
        self.replicas = [self._make() for _ in range(num)]

    def grow(self, num: int) -> list[Replica]:
        """Adds replicas, which are STOPPED, up to this number; answers the new ones."""
        added = [self._make() for _ in range(num - len(self.replicas))]
        self.replicas += added
        return added

    def shrink(self, num: int, load_of: Callable[[Replica], float]) -> list[Replica]:
        """Takes replicas out, down to this number; answers them for the caller to stop.

        First go those that are of no use yet, then those that have the least to do.
        """
        by_use = sorted(self.replicas, key=lambda replica: (not replica.is_ready, -load_of(replica)))
        self.replicas, removed = [each for each in self.replicas if each in by_use[:num]], by_use[num:]
        return removed

    @property
    def ready(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.is_ready]

    @property
    def failed(self) -> bool:
        states = [replica.state for replica in self.replicas if not self._waits(replica)]
        return all(state is ReplicaState.FAILED for state in states)

    @property
    def failure(self) -> str:
        return next((replica.failure for replica in self.replicas if replica.failure), "")

    def loading(self, now: float) -> Loading | None:
        """What the first of its workers that starts is doing; None while one is ready or none starts.

        Where the worker does not know its fraction, that of the time which the last start took is told.
        """
        runs = [replica.run for replica in self.replicas if replica.run is not None]
        if self.ready or not runs:
            return None
        first = min(runs, key=lambda run: run.started_at)
        if first.loading is None or first.loading.fraction is not None or self.calibration is None:
            return first.loading
        spent = (now - first.started_at) / (self.calibration.load_s + START_S)
        return replace(first.loading, fraction=min(spent, 0.99))

    def start_left_s(self, now: float) -> float:
        """Estimated seconds until one of its workers is ready; 0 when one is, and when nobody knows."""
        if self.ready or self.calibration is None:
            return 0.0
        expected_s = self.calibration.load_s + START_S
        started = [r.run.started_at for r in self.replicas if r.run and not r.is_ready]
        return max(0.0, expected_s - (now - min(started))) if started else expected_s

    def start(self) -> None:
        """Starts the replicas that do not run; where bytes are not settled yet, first the one that does."""
        for replica in self.replicas:
            stands = replica.state in (ReplicaState.STOPPED, ReplicaState.FAILED)
            if stands and not self._waits(replica):
                replica.start()

    def _waits(self, replica: Replica) -> bool:
        """Whether the first replica measures R, or takes a form, for this one: all must have the same."""
        measures = self.calibration is None and self.spec.batching == "exact"
        chooses = self.form is None and self.spec.performance == "max"
        return (measures or chooses) and replica is not self.replicas[0]

    def became_ready(self, replica: Replica) -> None:
        """Takes note of what a replica measured that has just become ready, or has measured again."""
        assert replica.info is not None
        first = self.calibration is None or self.form is None
        self.proven, self.form = True, replica.info.form if self.form is None else self.form
        self.calibration = Calibration(settings_digest(self.spec), replica.info, replica.load_s, self.version)
        if first:
            self.start()  # those that waited for it
