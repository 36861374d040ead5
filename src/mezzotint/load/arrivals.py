"""Which requests arrive when: by chance from a seed, or from a trace. Same input, same arrivals."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.errors import InvalidRequestError, echo

Process = Literal["poisson", "bursty"]
BURSTY_CV = 12.0
"""Coefficient of variation of the gaps between bursty arrivals: that of published production traces."""
MAX_ARRIVALS = 1_000_000
Value = TypeVar("Value")
Size = tuple[int, int] | None
"""Width and height in pixels; None: the endpoint's own."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request that a client sends at `at_s` seconds from the start, whatever became of earlier ones."""

    at_s: float
    steps: int | None
    """None: the server's own."""
    n: int = 1
    size: Size = None
    adapter: str | None = None
    seed: int = 0

    @property
    def shape(self) -> tuple[int | None, int, Size]:
        """What its time alone depends on."""
        return self.steps, self.n, self.size


@dataclass(frozen=True, slots=True)
class Mix:
    """Shares by value; they need not add up to 1."""

    steps: tuple[tuple[int | None, float], ...] = ((4, 60.0), (28, 30.0), (50, 10.0))
    n: tuple[tuple[int, float], ...] = ((1, 58.0), (2, 8.0), (4, 19.0), (8, 15.0))
    sizes: tuple[tuple[Size, float], ...] = ((None, 1.0),)
    adapters: tuple[str, ...] = ()
    """Routes; the k-th is asked for in proportion to k ** -zipf. None: no request has an adapter."""
    zipf: float = 1.0

    def draw(self, dice: random.Random, at_s: float) -> Arrival:
        """One request of this mix."""
        weights = [rank**-self.zipf for rank in range(1, len(self.adapters) + 1)]
        return Arrival(
            at_s,
            _one_of(dice, self.steps),
            _one_of(dice, self.n),
            _one_of(dice, self.sizes),
            dice.choices(self.adapters, weights)[0] if self.adapters else None,
            dice.randrange(2**32),
        )


def _one_of(dice: random.Random, shares: Sequence[tuple[Value, float]]) -> Value:
    return dice.choices([value for value, _ in shares], [share for _, share in shares])[0]


def generated(
    process: Process, *, rate: float, seconds: float, mix: Mix, seed: int, cv: float = BURSTY_CV
) -> list[Arrival]:
    """Arrivals at `rate` a second for so long.

    Gaps are exponential, or gamma-distributed with the coefficient of variation `cv`. Bursty gaps are
    scaled to fill the time, or a short run would be all burst or all silence. With few bursts that makes
    their coefficient smaller.
    """
    if rate * seconds > MAX_ARRIVALS:
        raise InvalidRequestError(
            f"{rate:g} requests/s for {seconds:g} s are over {MAX_ARRIVALS:,}; lower the rate or the time",
            param="rate",
        )
    dice = random.Random(seed)
    if process == "bursty":
        shape = 1 / cv**2
        gaps = [dice.gammavariate(shape, 1.0) for _ in range(max(1, round(rate * seconds)) + 1)]
        scale = seconds / sum(gaps)
        return [mix.draw(dice, at * scale) for at in accumulate(gaps[:-1])]
    found, at_s = [], dice.expovariate(rate)
    while at_s < seconds:
        found.append(mix.draw(dice, at_s))
        at_s += dice.expovariate(rate)
    return found


class _Line(BaseModel):
    """One line of a trace."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    seconds: float = Field(ge=0)
    steps: int | None = Field(None, ge=1, le=50)
    n: int = Field(1, ge=1, le=10)
    adapter: str | None = None
    size: str | None = Field(None, pattern=r"^\d{1,5}x\d{1,5}$")
    seed: int | None = Field(None, ge=0, lt=2**63)


def read_trace(file: Path) -> list[Arrival]:
    """The arrivals of a trace in their order: CSV with a header, else one JSON object a line.

    Its columns are seconds, steps, n, adapter, size (WxH) and seed; only the first is required. A line
    without a seed has its number as its seed.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"--trace {file}: cannot be read ({error})", param="trace") from None
    rows = _csv_rows(text) if file.suffix.lower() == ".csv" else _json_rows(file, text)
    found = [_arrival(file, number, row) for number, row in rows]
    if not found:
        raise InvalidRequestError(f"--trace {file}: has no request in it", param="trace")
    return sorted(found, key=lambda arrival: arrival.at_s)


def _csv_rows(text: str) -> Iterable[tuple[int, Any]]:
    lines = csv.DictReader(text.splitlines())
    for row in lines:
        yield lines.line_num, {name: value for name, value in row.items() if value}


def _json_rows(file: Path, text: str) -> Iterable[tuple[int, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                text = f"--trace {file}, line {number}: is no JSON ({error})"
                raise InvalidRequestError(text, param="trace") from None


def _arrival(file: Path, number: int, row: Any) -> Arrival:
    try:
        line = _Line.model_validate(row)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(
            f"--trace {file}, line {number}: {place or 'the line'}: {first['msg']} "
            f"(got {echo(first['input'])}); the columns are seconds, steps, n, adapter, size and seed",
            param="trace",
        ) from None
    seed = number if line.seed is None else line.seed
    return Arrival(line.seconds, line.steps, line.n, read_size(line.size), line.adapter or None, seed)


def read_size(text: str | None) -> Size:
    """The pixels of `WxH`, which has been checked; None for none."""
    if text is None:
        return None
    width, height = text.split("x")
    return int(width), int(height)
