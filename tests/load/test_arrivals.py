from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest

from mezzotint.errors import InvalidRequestError
from mezzotint.load.arrivals import Arrival, Mix, generated, read_trace


def gaps(arrivals: list[Arrival]) -> list[float]:
    return [after.at_s - before.at_s for before, after in itertools.pairwise(arrivals)]


def variation(values: list[float]) -> float:
    return statistics.stdev(values) / statistics.fmean(values)


def test_poisson_gaps_are_exponential_at_the_rate() -> None:
    arrivals = generated("poisson", rate=10, seconds=2000, mix=Mix(), seed=1)
    assert len(arrivals) == pytest.approx(20_000, rel=0.03)
    assert variation(gaps(arrivals)) == pytest.approx(1, abs=0.05)


def test_bursty_gaps_vary_as_asked_and_fill_the_time() -> None:
    arrivals = generated("bursty", rate=50, seconds=8000, mix=Mix(steps=((4, 1),)), seed=1)
    assert len(arrivals) == 400_000
    assert variation(gaps(arrivals)) == pytest.approx(12, rel=0.1)
    few = generated("bursty", rate=2, seconds=10, mix=Mix(), seed=3)
    assert len(few) == 20
    assert all(0 <= arrival.at_s <= 10.001 for arrival in few)


def test_the_mix_has_its_shares_and_adapters_follow_zipf() -> None:
    mix = Mix(adapters=("a", "b", "c"), zipf=1.0, sizes=(((64, 64), 1.0), (None, 3.0)))
    arrivals = generated("poisson", rate=100, seconds=300, mix=mix, seed=2)
    total = len(arrivals)
    for n, share in ((1, 0.58), (2, 0.08), (4, 0.19), (8, 0.15)):
        assert sum(arrival.n == n for arrival in arrivals) / total == pytest.approx(share, abs=0.02)
    for route, share in (("a", 6 / 11), ("b", 3 / 11), ("c", 2 / 11)):
        assert sum(arrival.adapter == route for arrival in arrivals) / total == pytest.approx(share, abs=0.02)
    assert sum(arrival.size is None for arrival in arrivals) / total == pytest.approx(0.75, abs=0.02)


def test_the_same_seed_gives_the_same_requests() -> None:
    first, second, other = (
        generated("bursty", rate=5, seconds=20, mix=Mix(), seed=seed) for seed in (7, 7, 8)
    )
    assert first == second
    assert first != other


def test_a_trace_is_read_as_it_is_written(tmp_path: Path) -> None:
    table = tmp_path / "trace.csv"
    table.write_text("seconds,steps,n,adapter,size\n0.5,28,4,ink,64x32\n0.0,4,,,\n")
    expected = [Arrival(0.0, 4, seed=3), Arrival(0.5, 28, 4, (64, 32), "ink", 2)]
    assert read_trace(table) == expected
    lines = tmp_path / "trace.jsonl"
    lines.write_text('{"seconds": 1, "seed": 9}\n\n{"seconds": 2, "n": 2}\n')
    assert read_trace(lines) == [Arrival(1.0, None, seed=9), Arrival(2.0, None, 2, seed=3)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"seconds": -1}', "line 1: seconds"),
        ('{"seconds": 1, "steps": 51}', "line 1: steps"),
        ('{"seconds": 1, "colour": "red"}', "line 1: colour"),
        ('{"seconds": 1}\nnonsense', "line 2: is no JSON"),
        ("", "no request"),
    ],
)
def test_a_bad_trace_is_a_sentence(text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=complaint):
        read_trace(file)


def test_too_many_arrivals_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="1,000,000"):
        generated("poisson", rate=1e6, seconds=60, mix=Mix(), seed=0)
