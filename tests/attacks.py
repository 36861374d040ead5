"""The mark of a test that tries an attack; docs/security.md lists them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])


def attack(what: str, *, outcome: str) -> Callable[[Test], Test]:
    """Says what the test tries and what comes of it.

    docs/generate.py reads both from the source, so they are literals. A test may have several marks.
    """
    assert what
    assert outcome
    return lambda test: test
