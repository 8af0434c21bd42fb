"""Intervals of scores are right where none or all of the answers are."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lrcompress.reporting.intervals import CONFIDENCE, normal_quantile, score_interval

NONE_RIGHT, ALL_RIGHT = [[0.0, 1.0]] * 3, [[1.0, 1.0]] * 3


def test_no_and_all_right_answers_have_a_width() -> None:
    low = score_interval(0.0, 0.0, NONE_RIGHT)
    high = score_interval(1.0, 0.0, ALL_RIGHT)
    assert low is not None
    assert high is not None
    assert (low.low, low.high) == pytest.approx((0, 0.25))
    assert (high.low, high.high) == pytest.approx((0.75, 1))


@pytest.mark.parametrize("right", [0, 1, 5, 10])
def test_shares_have_the_interval_of_wilson(right: int) -> None:
    samples = [[float(index < right), 1.0] for index in range(10)]
    interval = score_interval(right / 10, None, samples, normal_quantile(CONFIDENCE))
    expected = stats.binomtest(right, 10).proportion_ci(CONFIDENCE, method="wilson")
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_it_is_the_standard_error_where_there_are_many_items() -> None:
    samples = [[float(index % 3 == 0), 1.0] for index in range(30_000)]
    error = float(np.std([score for score, _ in samples], ddof=1) / 30_000**0.5)
    interval = score_interval(1 / 3, error, samples)
    assert interval is not None
    assert interval.high == pytest.approx(1 / 3 + error, abs=1e-5)


def test_a_group_has_the_pooled_error_of_lm_eval_but_at_the_ends() -> None:
    half_right = [[0.25, 0.25], [0.0, 0.25], [0.5, 0.5]]
    pooled = score_interval(0.75, 0.1, half_right, is_pooled=True)
    assert pooled is not None
    assert (pooled.low, pooled.high) == pytest.approx((0.65, 0.85))
    none = score_interval(0.0, 0.0, [[0.0, 0.5], [0.0, 0.25], [0.0, 0.25]], is_pooled=True)
    assert none is not None
    assert none.high > 0.2


def test_other_scores_have_standard_errors_or_no_interval() -> None:
    assert score_interval(0.5, None, []) is None
    fractions = score_interval(0.5, 0.1, [[0.3, 1.0], [0.7, 1.0]], 1.96)
    assert fractions is not None
    assert fractions.high == pytest.approx(0.5 + 1.96 * 0.1, abs=1e-3)
