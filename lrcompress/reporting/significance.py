"""Tests whether two models differ, paired over the windows of a text or the items of a task."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy import stats

from lrcompress.reporting.differences import MAX_EXPONENT
from lrcompress.reporting.intervals import Interval
from lrcompress.reporting.metric import PUBLISHED, Metric, Summary
from lrcompress.reporting.tables import comparable, title

ALPHA = 0.05
POWER = 0.8
# nats per token, or share of right answers: a smaller difference counts as none
NEGLIGIBLE = 0.01
BOOTSTRAP_RESAMPLES = 2000
SIGN_FLIPS = 9999
# with 5 samples the smallest p of the sign-flip test is 2 / 2**5 = 0.06, above ALPHA
MIN_SAMPLES = 6


@dataclass(frozen=True)
class Comparison:
    """A later model against the first, by one metric.

    Where every sample is right or wrong, the interval combines those of the shares that changed
    (Newcombe 1998), and the test is McNemar's exact one; else a paired bootstrap, and the test that
    flips the signs of the samples' differences. A group of tasks is compared by the items of all
    its tasks, and by flipped signs where these have different weights.
    """

    __pydantic_config__ = PUBLISHED

    metric: str
    """Name and, where there is one, text or file of the metric."""
    baseline: str
    model: str
    samples: int
    """Windows of a text, or items of a task or of all tasks of a group."""
    difference: float
    """The later model's less the first's: of a perplexity in nats per token, else in the metric's
    unit."""
    low: float
    """Lower end of the 95 % interval of the difference."""
    high: float
    """Upper end of the 95 % interval of the difference."""
    worst: float
    """The largest loss inside the interval: of a perplexity as a share of the first's, else in the
    metric's unit."""
    p_value: float
    """Adjusted (Holm 1979) for all comparisons of a report that are not of parts of a group; that
    of a part, for all of parts."""
    verdict: str
    """better, worse, no difference seen, or not enough data, with how many samples would decide."""


def comparisons(metrics: Sequence[Metric]) -> tuple[Comparison, ...]:
    """Each later model against the first, by every metric that has samples."""
    pairs = list(_pairs(metrics))
    results = [_compare(base, other) for base, other in pairs]
    adjusted = _adjusted(results, part_names(metrics))
    return tuple(
        _with_verdict(replace(result, p_value=p), other.higher_is_better)
        for result, p, (_, other) in zip(results, adjusted, pairs, strict=True)
    )


def part_names(metrics: Sequence[Summary]) -> set[str]:
    """The names of the metrics that are parts of a group of tasks."""
    return {part for metric in metrics for part in metric.parts}


def _adjusted(results: Sequence[Comparison], parts: Collection[str]) -> list[float]:
    """The p-values adjusted by Holm's method, those of `parts` apart from the others.

    So a group of many tasks is judged as one row.
    """
    adjusted = [0.0] * len(results)
    for of_parts in (False, True):
        rows = [i for i, result in enumerate(results) if (result.metric in parts) == of_parts]
        for row, p in zip(rows, holm([results[row].p_value for row in rows]), strict=True):
            adjusted[row] = p
    return adjusted


def _pairs(metrics: Sequence[Metric]) -> Iterator[tuple[Metric, Metric]]:
    """The metric of the first model, and the same of a later one."""
    first = metrics[0].model if metrics else ""
    for row in dict.fromkeys(title(metric) for metric in metrics):
        by_model = {metric.model: metric for metric in metrics if title(metric) == row}
        base = by_model.pop(first, None)
        for other in by_model.values():
            if base is not None and _can_pair(base, other):
                yield base, other


def _can_pair(base: Metric, other: Metric) -> bool:
    if not base.samples or len(base.samples) != len(other.samples):
        return False
    same_weights = all(a[1] == b[1] for a, b in zip(base.samples, other.samples, strict=True))
    all_finite = bool(np.isfinite([base.samples, other.samples]).all())
    return same_weights and all_finite and comparable(base, other)


def _compare(base: Metric, other: Metric) -> Comparison:
    values, weights = np.array(base.samples, dtype=float).T
    changed = np.array(other.samples, dtype=float)[:, 0]
    difference = float((changed - values).sum() / weights.sum())
    gains = changed - values
    is_binary = bool(np.isin([values / weights, changed / weights], (0.0, 1.0)).all())
    has_equal_weights = np.ptp(weights) == 0
    if is_binary:
        low, high = _newcombe_interval(gains, weights)
    else:
        low, high = _bootstrap_interval(gains, weights, difference)
    return Comparison(
        metric=title(base),
        baseline=base.model,
        model=other.model,
        samples=len(values),
        difference=difference,
        low=low,
        high=high,
        worst=_largest_loss(other, low, high),
        p_value=_mcnemar(gains) if is_binary and has_equal_weights else _sign_flip_test(gains),
        verdict="",
    )


def _largest_loss(metric: Metric, low: float, high: float) -> float:
    """The largest loss inside the interval: of a perplexity as a share, else in its unit."""
    if metric.higher_is_better:
        return -low
    return math.expm1(min(high, MAX_EXPONENT)) if metric.is_exponential else high


def _bootstrap_interval(gains: Any, weights: Any, mean: float) -> tuple[float, float]:
    """The 95 % BCa interval of sum(gains) / sum(weights), both of shape (samples,); the `mean`
    alone where it cannot vary."""
    if len(gains) < 2 or np.ptp(gains / weights) == 0:
        return mean, mean

    def ratio(gains: Any, weights: Any, axis: int) -> Any:
        return gains.sum(axis) / weights.sum(axis)

    interval = stats.bootstrap(
        (gains, weights),
        ratio,
        paired=True,
        n_resamples=BOOTSTRAP_RESAMPLES,
        vectorized=True,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _newcombe_interval(gains: Any, weights: Any) -> tuple[float, float]:
    """The 95 % interval of the share of items that were won less that of items that were lost.

    `gains` and `weights` have shape (items,); a gain is the weight, its negative, or 0. Newcombe
    (1998), from the Wilson intervals of both shares and their correlation: an item is either won
    or lost. Unlike a bootstrap interval it has a width also where no item changed. Items of
    different weights count as the number of equal ones that has the same variance (Kish 1965).
    """
    won, lost = (weights[mask].sum() / weights.sum() for mask in (gains > 0, gains < 0))
    count = weights.sum() ** 2 / (weights**2).sum()
    wins, losses = (_wilson_interval(share, count) for share in (won, lost))
    anticorrelation = 0.0
    if max(won, lost) < 1:
        anticorrelation = math.sqrt(won * lost / ((1 - won) * (1 - lost)))

    def distance(first: float, second: float) -> float:
        return math.sqrt(first**2 + second**2 + 2 * anticorrelation * first * second)

    low = won - lost - distance(won - wins.low, losses.high - lost)
    high = won - lost + distance(wins.high - won, lost - losses.low)
    return float(max(low, -1.0)), float(min(high, 1.0))


def _wilson_interval(share: float, count: float) -> Interval:
    """The 95 % interval of a share of `count` items, which may be no whole number (Wilson 1927)."""
    z = NormalDist().inv_cdf(1 - ALPHA / 2)
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


def _mcnemar(gains: Any) -> float:
    """p of McNemar's exact test: of the items that changed, half should be gains."""
    changed = int((gains != 0).sum())
    return float(stats.binomtest(int((gains > 0).sum()), changed).pvalue) if changed else 1.0


def _sign_flip_test(gains: Any) -> float:
    """p of the permutation test that flips the signs of the gains."""
    if len(gains) < 2 or not gains.any():
        return 1.0
    result = stats.permutation_test(
        (gains,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=SIGN_FLIPS,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """`p_values` adjusted for their number by Holm (1979): bounds the chance of any false alarm."""
    order = np.argsort(p_values)
    scaled = np.array(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in adjusted]


def _with_verdict(result: Comparison, higher_is_better: bool) -> Comparison:
    if result.p_value < ALPHA:
        better = (result.difference > 0) == higher_is_better
        return replace(result, verdict="better" if better else "worse")
    if result.samples >= MIN_SAMPLES and max(-result.low, result.high) < NEGLIGIBLE:
        return replace(result, verdict="no difference seen")
    needed = _samples_needed(result)
    more = f": about {needed:,} samples would decide" if needed else ""
    return replace(result, verdict=f"not enough data{more}")


def _samples_needed(result: Comparison) -> int | None:
    """The fewer of two counts: samples that show a difference of the observed size with POWER, and
    samples that show it to be negligible; never fewer than MIN_SAMPLES. None where the interval has
    no width."""
    half_width = (result.high - result.low) / 2
    if half_width == 0:
        return None
    normal = NormalDist()
    z_alpha = normal.inv_cdf(1 - ALPHA / 2)
    detectable = (z_alpha + normal.inv_cdf(POWER)) / z_alpha * half_width
    size, gap = abs(result.difference), NEGLIGIBLE - abs(result.difference)
    # an interval that has to be this many times narrower takes the square of that in samples
    narrowing = [detectable / size] if size else []
    narrowing += [half_width / gap] if gap > 0 else []
    needed = math.ceil(result.samples * min(narrowing) ** 2)
    return max(MIN_SAMPLES, result.samples + 1, needed)
