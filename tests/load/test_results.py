from __future__ import annotations

import pytest

from mezzotint.load.arrivals import Arrival
from mezzotint.load.generator import Measured, Sent, Shape, lone_time
from mezzotint.load.plot import svg
from mezzotint.load.results import percentile, summarize, warnings


def sent(seconds: float, status: int = 200, late_s: float = 0.0, n: int = 1) -> Sent:
    return Sent(Arrival(0.0, 4, n), late_s, seconds, status)


def test_percentiles_of_known_values() -> None:
    values = [float(value) for value in range(101)]
    assert [percentile(values, percent) for percent in (50, 95, 99)] == [50, 95, 99]
    assert percentile([3.0], 95) == 3.0


def test_a_summary_counts_refusals_against_the_share_in_time() -> None:
    measured = Measured([sent(0.2), sent(0.4, n=2), sent(0.0, 429), sent(0.0, 429), sent(0.0, 0)], wall_s=2.0)
    found = summarize(measured, {(4, 1, None): 0.1})
    assert found["refused"] == {"0": 1, "429": 2}
    assert found["within_3x_lone"] == pytest.approx(2 / 5)  # two pictures take twice as long alone
    assert found["images_per_s"] == pytest.approx(1.5)
    assert found["lone_work_per_s"] == pytest.approx(0.15)


def test_a_shape_that_was_not_measured_is_scaled_by_work() -> None:
    times: dict[Shape, float] = {(4, 1, None): 1.0, (50, 8, None): 60.0}
    assert lone_time(times, (8, 1, None)) == pytest.approx(2.0)


def test_a_generator_that_is_late_says_so() -> None:
    slow = Measured(
        [sent(0.1, late_s=0.05) for _ in range(20)], lag_s=[0.05] * 20, wall_s=1, processor_s=0.95
    )
    assert len(warnings(summarize(slow, {(4, 1, None): 0.1}))) == 3
    quick = Measured([sent(0.1) for _ in range(20)], lag_s=[0.0] * 20, wall_s=1, processor_s=0.1)
    assert warnings(summarize(quick, {(4, 1, None): 0.1})) == []


def test_the_plot_has_every_request() -> None:
    picture = svg("a < b", [(0.0, 0.1, "4 steps"), (1.0, 0.2, "8 steps")], [0.5], [1.0, 4.0])
    assert picture.count("<circle") == 2
    assert "no picture (1)" in picture
    assert "a &lt; b" in picture
    assert "<svg" in svg("nothing", [], [], [])
