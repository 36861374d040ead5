"""The metrics, and the dashboard that is drawn from them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mezzotint.messages import Stats
from mezzotint.server.metrics import MAX_SHAPES, Metrics

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def names() -> set[str]:
    """Every name under which a sample of ours can appear."""
    found = set()
    for family in Metrics().registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"], "gauge": [""]}
        found |= {family.name + suffix for suffix in suffixes[family.type]}
    return found


def test_the_dashboard_asks_only_for_metrics_that_exist_and_for_all_of_them() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"mezzotint_\w+", target["expr"])
    }
    assert asked <= names()
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in asked}
    missing = {family.name for family in Metrics().registry.collect()} - shown
    assert not missing


def test_shapes_are_bounded() -> None:
    metrics = Metrics()
    shapes = {f"{number}x{number}": 0.1 for number in range(3 * MAX_SHAPES)}
    metrics.stats("one", Stats(0, 1, 1, 0, 0.1, shapes))
    text = metrics.render().decode()
    lines = [line for line in text.splitlines() if line.startswith("mezzotint_step_seconds{")]
    assert len(lines) == MAX_SHAPES + 1
    assert 'shape="other"' in text


def test_what_a_worker_reports_adds_up() -> None:
    metrics = Metrics()
    for _ in range(2):
        metrics.stats(
            "one",
            Stats(
                0,
                forwards=3,
                rows=9,
                padded_rows=3,
                busy_s=0.5,
                step_s={},
                adapter_hits=2,
                text_hits=4,
                text_misses=1,
                text_bytes=50,
            ),
        )
    text = metrics.render().decode()
    assert 'mezzotint_steps_total{endpoint="one"} 18.0' in text
    assert 'mezzotint_padded_rows_total{endpoint="one"} 6.0' in text
    assert 'mezzotint_adapter_hits_total{endpoint="one"} 4.0' in text
    assert 'mezzotint_text_hits_total{endpoint="one"} 8.0' in text
    assert 'mezzotint_text_misses_total{endpoint="one"} 2.0' in text
    assert 'mezzotint_text_bytes{endpoint="one"} 50.0' in text
