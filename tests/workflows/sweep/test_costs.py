"""Each point is charged its own work, and all the shared work that it uses."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from lrcompress.workflows.sweep.costs import CostLedger


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_reading_is_charged_once_and_saved_decompositions_are(clock: list[float]) -> None:
    session: Any = SimpleNamespace(text_seconds=0.0, moment_seconds={True: 7.0})
    decompositions: Any = SimpleNamespace(saved=2.0)
    ledger = CostLedger(session)
    with ledger.timing(decompositions):
        session.text_seconds = 3.0
        clock[0] += 10.0
        decompositions.saved += 5.0
    assert ledger.seconds == 10.0 - 3.0 + 5.0
    prepared: Any = SimpleNamespace(moments=SimpleNamespace(gradient_tokens=64))
    ledger.charge_calibration(prepared, 1000)
    assert ledger.seconds == 12.0 + 3.0 + 7.0
    assert ledger.memory == 1000


def test_without_moments_only_reading_is_charged() -> None:
    session: Any = SimpleNamespace(text_seconds=3.0, moment_seconds={})
    ledger = CostLedger(session)
    ledger.charge_calibration(SimpleNamespace(moments=None), 1000)  # type: ignore[arg-type]
    assert (ledger.seconds, ledger.memory) == (3.0, None)


def test_the_largest_peak_counts() -> None:
    ledger = CostLedger(SimpleNamespace())  # type: ignore[arg-type]
    for memory in (None, 5, 9, 7, None):
        ledger.charge(1.0, memory)
    assert (ledger.seconds, ledger.memory) == (5.0, 9)
