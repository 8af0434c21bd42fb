"""Bootstraps under a progress, in this process; warnings of lm-eval once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import TypeVar

import pytest
from lm_eval.api import metrics

from lrcompress.evaluation.tasks.lm_eval_output import shown_bootstraps, warnings_once

T = TypeVar("T")


def test_a_bootstrap_is_shown_and_equals_that_of_lm_eval(
    capfd: pytest.CaptureFixture[str],
) -> None:
    shown: list[tuple[str, int | None]] = []

    def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
        shown.append((description, total))
        return items

    items = [float(i % 7) for i in range(200)]
    original = metrics.bootstrap_stderr
    with shown_bootstraps(progress):
        error = metrics.bootstrap_stderr(fmean, items, 3000)
    assert shown == [("Bootstrapping fmean", 3)]
    assert error == pytest.approx(stdev(items) / math.sqrt(len(items)), rel=0.1)
    assert capfd.readouterr() == ("", "")
    assert metrics.bootstrap_stderr is original
    assert error == original(fmean, items, 3000)


def test_a_warning_is_passed_on_once(caplog: pytest.LogCaptureFixture) -> None:
    source = logging.getLogger("lm_eval")
    source.setLevel(logging.ERROR)
    with warnings_once():
        for _ in range(3):
            logging.getLogger("lm_eval.evaluator").warning("No aggregation for %s.\nMean.", "x")
            logging.getLogger("lm_eval.models").warning("Truncating 7 tokens from the left.")
    assert caplog.messages == ["lm-eval: No aggregation for x. Mean."]
    assert source.level == logging.ERROR
    assert not source.handlers
