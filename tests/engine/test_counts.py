"""The engine does no more than it did: forwards, rows and Python calls do not grow unseen."""

from __future__ import annotations

import json

import pytest

from tests.engine import counts

MARGIN = {"python_calls_per_job_and_step": 1.05}
"""How many times the table's figure is allowed; what is not here is allowed exactly."""


def grown(found: counts.Counts, known: counts.Counts) -> list[str]:
    """What there is more of than the table allows, in words."""
    return [
        f"{name}: {found[name]:g}, where {known[name]:g} is known"
        for name in known
        if found[name] > known[name] * MARGIN.get(name, 1)
    ]


@pytest.mark.parametrize("num_jobs", counts.LIVE_JOBS)
def test_no_count_has_grown(num_jobs: int) -> None:
    found = counts.count(num_jobs)
    known = json.loads(counts.TABLE.read_text(encoding="utf-8"))[str(num_jobs)]
    assert found.keys() == known.keys()
    more = grown(found, known)
    assert not more, (
        f"with {num_jobs} live jobs the engine does more than before: {'; '.join(more)}. If that is meant: "
        "python -m tests.engine.counts accepts it, and the commit says why"
    )


def test_a_forward_more_is_growth_and_a_few_calls_are_not() -> None:
    known = {"forwards": 10.0, "python_calls_per_job_and_step": 100.0}
    assert not grown({"forwards": 10, "python_calls_per_job_and_step": 104}, known)
    assert grown({"forwards": 11, "python_calls_per_job_and_step": 106}, known) == [
        "forwards: 11, where 10 is known",
        "python_calls_per_job_and_step: 106, where 100 is known",
    ]
