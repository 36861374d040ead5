"""What becomes of a job that a worker could not do."""

from __future__ import annotations

import pytest

from mezzotint.server.work.dispatch import job_error


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("not_supported", 422),
        ("missing_field", 422),
        ("adapter_broken", 422),
        ("adapter_not_found", 404),
        ("generation_failed", 500),
        ("out_of_memory", 500),
        ("corrupt_file", 500),
    ],
)
def test_a_workers_refusal_has_the_status_of_its_code(code: str, status: int) -> None:
    error = job_error(code, "no", "adapters")
    assert (error.status, error.code, error.message) == (status, code, "no")
