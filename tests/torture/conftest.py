"""How often the tests that try to break things try it, and what they count."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Times = Callable[[int, int], int]
Tally = Callable[[str, int], None]


@pytest.fixture
def times(request: pytest.FixtureRequest) -> Times:
    """times(full, sample): how often to try: `full` with --full, `sample` otherwise."""
    full = bool(request.config.getoption("full"))
    return lambda whole, sample: whole if full else sample


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Tally:
    """tally(what, count) adds to the counts that the summary prints; from every process."""
    return lambda what, count: record_property(f"torture: {what}", count)
