"""When a request would be done, and whether it may be let in. Pure: no clock, no event loop, no endpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mezzotint.errors import DeadlineError, MezzotintError, QueueFullError, UnavailableError

DEADLINE_MARGIN = 1.2
"""A request is only let in behind others if it would be done in time even were all this much slower."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """When a request would be done. All times are seconds from now."""

    start_s: float
    """Until the endpoint takes jobs; 0 when it takes them already."""
    wait_s: float
    """Until the request's first job would get its turn; at least `start_s`."""
    share_s: float
    """Time of the whole endpoint that the request's jobs take."""
    alone_s: float
    """From the first job's turn to the last image if nothing else ran."""

    @classmethod
    def of(cls, works_s: Sequence[float], speed: float, *, start_s: float, wait_s: float) -> Estimate:
        """`works_s` has each image's work; no image is done sooner than alone, however many run beside it."""
        share_s = sum(works_s) / max(speed, 1.0)
        return cls(start_s, wait_s, share_s, max(share_s, *works_s))

    def refusal(self, endpoint_id: str, *, timeout_s: float, max_queue_s: float) -> MezzotintError | None:
        """Why the request is not let in, or None.

        What would only be late is refused now: by its deadline in `timeout_s`, or by the queue's bound of
        `max_queue_s` of work.
        """
        if self.start_s > timeout_s:
            return UnavailableError(
                f"endpoint {endpoint_id} is starting and should be ready in {self.start_s:.0f} s, "
                f"after this request's deadline ({timeout_s:g} s); send it again then",
                param="model",
                retry_after=self.start_s,
            )
        if self.start_s + self.alone_s > timeout_s:
            return DeadlineError(
                f"the request needs about {self.start_s + self.alone_s:.1f} s, over its deadline "
                f"({timeout_s:g} s); ask for fewer steps or smaller images, or raise X-Request-Timeout-S"
            )
        late_s = self.wait_s + self.alone_s - timeout_s / DEADLINE_MARGIN
        over_s = max(late_s, self.wait_s + self.share_s - max_queue_s - self.start_s)
        if self.wait_s <= self.start_s or over_s <= 0:
            return None
        return QueueFullError(
            f"endpoint {endpoint_id} has about {self.wait_s:.0f} s of work before this request, "
            f"more than it may wait ({max(0.0, self.wait_s - over_s):.0f} s); "
            f"send it again in {math.ceil(over_s)} s",
            retry_after=max(1.0, over_s),
        )
