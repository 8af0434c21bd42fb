"""Bends are told from slopes, as often as the intervals say."""

from __future__ import annotations

import numpy as np

from lrcompress.reporting.law_fit import compare, fit
from lrcompress.workflows.scaling.curvature import bend

SIZES = np.repeat(np.geomspace(1e12, 1e16, 6), 2)
CHEAPER = SIZES / 10


def bent(seed: int, sizes: np.ndarray, steeper: float, curvature: float = -0.3) -> np.ndarray:
    """Losses on a parabola in log x; `steeper` nats per decade about its middle."""
    z = np.log10(sizes) - 14
    noise = 0.02 * np.random.default_rng(seed).standard_normal(len(sizes))
    return np.asarray(5 - (0.5 + steeper) * z + curvature * z * z + noise)


def test_a_bend_does_not_pass_for_a_slope() -> None:
    """Two variants of one bent curve, one of which is cheaper at every size."""
    trials, fooled, right = 200, 0, 0
    for seed in range(trials):
        x, base = bent(2 * seed, CHEAPER, 0.0), bent(2 * seed + 1, SIZES, 0.0)
        line = compare(fit(CHEAPER, x, "decade", 50), fit(SIZES, base, "decade", 50))
        fooled += line.verdict == "less steep"
        bow = bend(CHEAPER, x, SIZES, base)
        assert bow is not None
        assert bow.is_shown
        right += 0.0 in bow.steeper and 0.0 in bow.level
    assert fooled > 0.9 * trials
    assert right >= 0.85 * trials  # two intervals of 95 %


def test_a_slope_is_found_beside_a_bend() -> None:
    trials, inside = 200, 0
    for seed in range(trials):
        bow = bend(CHEAPER, bent(seed, CHEAPER, 0.2), SIZES, bent(-seed - 1 + 10**6, SIZES, 0.0))
        assert bow is not None
        inside += 0.2 in bow.steeper
        assert bow.verdict == "steeper"
    assert inside >= 0.9 * trials


def test_straight_points_seldom_show_a_bend() -> None:
    bows = [
        bend(CHEAPER, bent(s, CHEAPER, 0.0, 0.0), SIZES, bent(s + 10**6, SIZES, 0.0, 0.0))
        for s in range(200)
    ]
    assert sum(bow is not None and bow.is_shown for bow in bows) <= 0.1 * len(bows)


def test_too_few_points_have_no_bend() -> None:
    assert bend([1e3, 1e4], [3.0, 2.0], [1e3, 1e4, 1e5], [3.0, 2.0, 1.5]) is None
