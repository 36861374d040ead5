"""An event loop whose clock leaps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import selectors

BEGIN_S = 1.0
"""What the clock shows at first; not 0, which the server takes for `never`."""


class _Leap(selectors.SelectSelector):
    """Moves a clock on by as long as it is asked to wait."""

    now = BEGIN_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that no timer brings")
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """For code that waits only by timers of the loop, not for threads: an hour passes in no time."""

    def __init__(self) -> None:
        self._leap = _Leap()
        super().__init__(self._leap)

    def time(self) -> float:
        return self._leap.now
