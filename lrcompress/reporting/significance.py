"""Tests whether two models differ, paired over the windows of a text or the items of a task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np
from scipy import stats

from lrcompress.reporting.differences import MAX_EXPONENT
from lrcompress.reporting.intervals import normal_quantile, wilson_interval
from lrcompress.reporting.metric import PUBLISHED, Metric, title
from lrcompress.reporting.tables import comparable
from lrcompress.reporting.task_groups import places

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
    its tasks, and by flipped signs where these have different weights. The interval has the level
    of the test, so that both are adjusted (the Bonferroni intervals of what Holm's procedure
    leaves, Guilbaud 2008). It holds 0 where the test does not reject 0, and ends there where the
    test does.
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
    """Lower end of the interval of the difference, of `confidence`."""
    high: float
    """Upper end of the interval of the difference, of `confidence`."""
    worst: float
    """The largest loss inside the 95 % interval of this comparison alone: of a perplexity as a
    share of the first's, else in the metric's unit."""
    p_value: float
    """Adjusted for all comparisons of a report, or for those of the parts of one group of tasks
    (Holm 1979)."""
    verdict: str
    """better, worse, no difference seen, or not enough data, with how many samples would decide."""
    confidence: float = 1 - ALPHA
    """Of the interval: 1 - 0.05 / the number of comparisons that Holm's procedure did not reject
    before this one."""


def comparisons(metrics: Sequence[Metric]) -> tuple[Comparison, ...]:
    """Each later model against the first, by every metric that has samples.

    Adjusted for their number are the metrics that are no part of a group of tasks, and by
    themselves the parts of each group, so that a group costs no more than a task.
    """
    place_of = places(metrics)
    tests = list(_tests(metrics))
    adjusted = dict[int, Comparison]()
    for group in dict.fromkeys(place.group for place in place_of.values()):
        family = [i for i, test in enumerate(tests) if place_of[title(test.base)].group == group]
        adjusted |= zip(family, _compare([tests[i] for i in family]), strict=True)
    return tuple(adjusted[index] for index in range(len(tests)))


def _tests(metrics: Sequence[Metric]) -> Iterator[_PairedTest]:
    """The metric of the first model, and the same of a later one."""
    first = metrics[0].model if metrics else ""
    for row in dict.fromkeys(title(metric) for metric in metrics):
        by_model = {metric.model: metric for metric in metrics if title(metric) == row}
        base = by_model.pop(first, None)
        for other in by_model.values():
            if base is not None and _can_pair(base, other):
                yield _PairedTest(base, other)


def _can_pair(base: Metric, other: Metric) -> bool:
    if not base.samples or len(base.samples) != len(other.samples):
        return False
    same_weights = all(a[1] == b[1] for a, b in zip(base.samples, other.samples, strict=True))
    all_finite = bool(np.isfinite([base.samples, other.samples]).all())
    return same_weights and all_finite and comparable(base, other)


@dataclass(frozen=True)
class _PairedTest:
    """One metric of two models, on the same windows or items."""

    base: Metric
    other: Metric

    @cached_property
    def _samples(self) -> Any:
        """Shape (3, samples): values of the first and of the later model, and their weights."""
        first, later = np.array(self.base.samples, float), np.array(self.other.samples, float)
        return np.stack([first[:, 0], later[:, 0], first[:, 1]])

    @cached_property
    def gains(self) -> Any:
        """Shape (samples,)."""
        return self._samples[1] - self._samples[0]

    @property
    def weights(self) -> Any:
        """Shape (samples,)."""
        return self._samples[2]

    @property
    def is_binary(self) -> bool:
        return bool(np.isin(self._samples[:2] / self.weights, (0.0, 1.0)).all())

    @property
    def difference(self) -> float:
        return float(self.gains.sum() / self.weights.sum())

    @cached_property
    def p_value(self) -> float:
        has_equal_weights = np.ptp(self.weights) == 0
        is_exact = self.is_binary and has_equal_weights
        return _mcnemar(self.gains) if is_exact else _sign_flip_test(self.gains)

    def interval(self, confidence: float) -> tuple[float, float]:
        """Of the difference.

        A bootstrap is of 95 %. For another confidence both its arms are stretched as those of a
        normal distribution are: 2000 resamples do not tell its far ends.
        """
        if self.is_binary:
            return _newcombe_interval(self.gains, self.weights, confidence)
        low, high = self._bootstrapped
        stretch = normal_quantile(confidence) / normal_quantile(1 - ALPHA)
        middle = self.difference
        return middle - stretch * (middle - low), middle + stretch * (high - middle)

    @cached_property
    def _bootstrapped(self) -> tuple[float, float]:
        return _bootstrap_interval(self.gains, self.weights, self.difference)


def _compare(tests: Sequence[_PairedTest]) -> Iterator[Comparison]:
    """The comparison of each of `tests`, adjusted for their number."""
    p_values = [test.p_value for test in tests]
    for test, p, level in zip(tests, holm(p_values), holm_levels(p_values), strict=True):
        low, high = test.interval(1 - level)
        side = _with_zero(low, high) if p >= ALPHA else _without_zero(low, high, test.difference)
        result = Comparison(
            metric=title(test.base),
            baseline=test.base.model,
            model=test.other.model,
            samples=len(test.gains),
            difference=test.difference,
            low=side[0],
            high=side[1],
            worst=_largest_loss(test.other, *test.interval(1 - ALPHA)),
            p_value=p,
            verdict="",
            confidence=1 - level,
        )
        needed = _samples_needed(result, (high - low) / 2)
        yield replace(result, verdict=_verdict(result, test.other.higher_is_better, needed))


def _with_zero(low: float, high: float) -> tuple[float, float]:
    return min(low, 0.0), max(high, 0.0)


def _without_zero(low: float, high: float, difference: float) -> tuple[float, float]:
    return (max(low, 0.0), high) if difference > 0 else (low, min(high, 0.0))


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


def _newcombe_interval(gains: Any, weights: Any, confidence: float) -> tuple[float, float]:
    """The interval of the share of items that were won less that of items that were lost.

    `gains` and `weights` have shape (items,); a gain is the weight, its negative, or 0. Newcombe
    (1998), from the Wilson intervals of both shares and their correlation: an item is either won
    or lost. Unlike a bootstrap interval it has a width also where no item changed. Items of
    different weights count as the number of equal ones that has the same variance (Kish 1965).
    """
    won, lost = (weights[mask].sum() / weights.sum() for mask in (gains > 0, gains < 0))
    count = weights.sum() ** 2 / (weights**2).sum()
    z = normal_quantile(confidence)
    wins, losses = (wilson_interval(share, count, z) for share in (won, lost))
    anticorrelation = 0.0
    if max(won, lost) < 1:
        anticorrelation = math.sqrt(won * lost / ((1 - won) * (1 - lost)))

    def distance(first: float, second: float) -> float:
        return math.sqrt(first**2 + second**2 + 2 * anticorrelation * first * second)

    low = won - lost - distance(won - wins.low, losses.high - lost)
    high = won - lost + distance(wins.high - won, lost - losses.low)
    return float(max(low, -1.0)), float(min(high, 1.0))


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


def holm_levels(p_values: Sequence[float]) -> list[float]:
    """The level that Holm's procedure tests each of `p_values` at: ALPHA / the number of those that
    are not rejected before it."""
    rejected = sum(p < ALPHA for p in holm(p_values))
    ranks = np.minimum(stats.rankdata(p_values, "min") - 1, rejected)
    return [float(level) for level in ALPHA / (len(p_values) - ranks)]


def _verdict(result: Comparison, higher_is_better: bool, needed: int | None) -> str:
    if result.p_value < ALPHA:
        return "better" if (result.difference > 0) == higher_is_better else "worse"
    if result.samples >= MIN_SAMPLES and max(-result.low, result.high) < NEGLIGIBLE:
        return "no difference seen"
    more = f": about {needed:,} samples would decide" if needed else ""
    return f"not enough data{more}"


def _samples_needed(result: Comparison, half_width: float) -> int | None:
    """The fewer of two counts: samples that show a difference of the observed size with POWER, and
    samples that show it to be negligible; never fewer than MIN_SAMPLES. None where the interval has
    no width."""
    if half_width == 0:
        return None
    z_level = normal_quantile(result.confidence)
    detectable = (z_level + NormalDist().inv_cdf(POWER)) / z_level * half_width
    size, gap = abs(result.difference), NEGLIGIBLE - abs(result.difference)
    # an interval that has to be this many times narrower takes the square of that in samples
    narrowing = [detectable / size] if size else []
    narrowing += [half_width / gap] if gap > 0 else []
    needed = math.ceil(result.samples * min(narrowing) ** 2)
    return max(MIN_SAMPLES, result.samples + 1, needed)
