"""Bootstraps under a progress, in this process; warnings of lm-eval once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from statistics import fmean, stdev
from typing import TypeVar

import pytest
from lm_eval.api import metrics

from lrcompress.evaluation.tasks import lm_eval_output
from lrcompress.evaluation.tasks.lm_eval_output import resamples, shown_bootstraps, warnings_once
from lrcompress.runtime.progress import silent

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
    with shown_bootstraps(progress) as reduced:
        error = metrics.bootstrap_stderr(fmean, items, 3000)
    assert shown == [("Bootstrapping fmean", 3)]
    assert error == pytest.approx(stdev(items) / math.sqrt(len(items)), rel=0.1)
    assert capfd.readouterr() == ("", "")
    assert metrics.bootstrap_stderr is original
    assert error == original(fmean, items, 3000)
    assert reduced == {}


def test_slow_metrics_and_many_items_get_fewer_resamples() -> None:
    """Metrics of lm-eval's own that are fast have all, up to 10,000 items."""
    assert resamples("perplexity", 10_000, 100_000) == 100_000
    assert resamples("perplexity", 40_000, 100_000) == 25_000
    assert resamples("perplexity", 10**7, 100_000) == 1000
    assert resamples("f1_score", 400, 100_000) == 10_000
    assert resamples("f1_score", 40_000, 100_000) == 2000
    assert resamples("bleu", 10**7, 100) == 100


def test_fewer_resamples_are_the_first_of_lm_eval_and_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lm_eval_output, "SLOW_RESAMPLES", 1000)
    items = [(i % 2, i % 3 % 2) for i in range(20)]
    original = metrics.bootstrap_stderr
    with shown_bootstraps(silent) as reduced:
        error = metrics.bootstrap_stderr(metrics.f1_score, items, 3000)
    assert reduced == {"f1_score": 1000}
    assert error == original(metrics.f1_score, items, 1000)


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
