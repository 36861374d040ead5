from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mezzotint.config import EndpointSettings
from mezzotint.errors import InvalidRequestError
from mezzotint.load.arrivals import Arrival
from mezzotint.load.generator import Shape
from mezzotint.sizing.simulation import lone_times
from mezzotint.sizing.speed import Speed, of_bench, of_endpoint


def write(file: Path, lone: dict[Shape, float]) -> Path:
    lines = [
        {"steps": steps, "n": n, "size": "{}x{}".format(*size) if size else None, "seconds": seconds}
        for (steps, n, size), seconds in lone.items()
    ]
    file.write_text(json.dumps({"lone_s": lines, "done": 3}))
    return file


def test_lone_times_give_back_the_speed_that_made_them(tmp_path: Path) -> None:
    speed = Speed({1: 0.02, 2: 0.024, 4: 0.04}, 0.1, 0.03, ratios={(1024, 512): 2.5})
    arrivals = [Arrival(0.0, steps, n) for steps in (4, 28, 50) for n in (1, 2, 4, 8)]
    arrivals += [Arrival(0.0, steps, 1, (1024, 512)) for steps in (4, 28)]
    lone = lone_times(arrivals, speed, EndpointSettings(id="plan"))
    found = of_bench(write(tmp_path / "bench.json", lone))
    assert found.forward_s == pytest.approx(dict(speed.forward_s))
    assert (found.picture_s, found.request_s) == pytest.approx((0.1, 0.03))
    assert found.ratios == pytest.approx({(1024, 512): 2.5})


def test_pictures_that_gain_nothing_together_do_not_merge(tmp_path: Path) -> None:
    lone: dict[Shape, float] = {(steps, n, None): 0.1 * n * steps for steps in (4, 28) for n in (1, 2, 4)}
    assert of_bench(write(tmp_path / "bench.json", lone)).forward_s == pytest.approx({1: 0.1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON file of `mezzotint bench`"),
        ('{"lone_s": [{"steps": 4, "n": 1, "size": "big", "seconds": 1}]}', "is no JSON file"),
        ('{"lone_s": [{"steps": 4, "n": 1, "size": null, "seconds": 1}]}', "two numbers of steps"),
        ('{"lone_s": []}', "two numbers of steps"),
    ],
)
def test_a_file_that_says_too_little_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(InvalidRequestError, match=said):
        of_bench(tmp_path / "bench.json")


def shown(**info: Any) -> dict[str, Any]:
    table = [{"rows": rows, "forward_s": 0.01 * (1 + rows), "rows_per_s": 1.0} for rows in (2, 4, 8, 16)]
    known = {
        "rows": 8,
        "mergeable": True,
        "batching": "exact",
        "calibration": table,
        "width": 64,
        "height": 32,
    }
    return {"info": known | info, "replicas": [{"load_s": 3.0}, {"load_s": 5.0}]}


def test_an_endpoints_rows_are_counted_in_jobs() -> None:
    found = of_endpoint(shown(), "one")
    assert found.forward_s == pytest.approx({1: 0.03, 2: 0.05, 4: 0.09})
    assert found.picture_s == pytest.approx(0.03)
    assert (found.load_s, found.own_size) == (5.0, (64, 32))
    for alone in ({"batching": "off"}, {"mergeable": False}):
        assert of_endpoint(shown(**alone), "one").forward_s == pytest.approx({1: 0.03})
    assert of_endpoint(shown(batching="fast"), "one").most_jobs == 8


def test_an_endpoint_that_was_never_measured_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="endpoint one has measured no step yet"):
        of_endpoint({"info": None, "replicas": []}, "one")
