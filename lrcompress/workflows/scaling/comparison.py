"""Fits the laws of a scaling study, and compares every variant with the dense models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

import numpy as np

from lrcompress.reporting.intervals import Interval, mean_difference, shown
from lrcompress.reporting.law_fit import (
    Law,
    LawFit,
    SlopeComparison,
    compare,
    fit,
    loss_gap,
)
from lrcompress.workflows.scaling.curvature import Bend, bend
from lrcompress.workflows.scaling.point import DENSE, ScalingPoint, size_name

Axis = Literal["flops", "non_embedding", "seconds"]
TITLES: dict[Axis, str] = {
    "flops": "training FLOPs",
    "non_embedding": "non-embedding parameters",
    "seconds": "seconds of training",
}
# sizes that a fit needs: one more than the law can pass through exactly
FEWEST_SIZES: dict[Law, int] = {"power": 3, "decade": 3, "offset": 4}


@dataclass(frozen=True)
class FittedLaw:
    """One law of one variant along one axis.

    `against` compares its slope with the dense models'. `bend` is fitted to the points of both,
    for the law "decade" only.
    """

    axis: Axis
    variant: str
    fit: LawFit
    against: SlopeComparison | None
    bend: Bend | None = None


@dataclass(frozen=True)
class Matched:
    """A variant's loss at the cost of the dense models of one size, along one axis.

    `loss` is interpolated between the variant's sizes, linear in the logarithm of the cost; None
    outside of them. `difference` is that of the two fitted lines (law "decade").
    """

    axis: Axis
    size: str
    variant: str
    dense: float
    loss: float | None
    difference: Interval | None


@dataclass(frozen=True)
class Paired:
    """The loss of `variant` less that of `other` at equal training FLOPs, in nats.

    The mean over `count` pairs of equal size and seed.
    """

    variant: str
    other: str
    count: int
    difference: Interval
    p_value: float

    @property
    def verdict(self) -> str:
        """Whether the variant is better, worse, or not shown to differ."""
        if self.difference.high < 0:
            return "better"
        return "worse" if self.difference.low > 0 else "no difference shown"


def variants(points: Sequence[ScalingPoint]) -> list[str]:
    """The variants of `points` in order, the dense models first."""
    names = dict.fromkeys(point.variant for point in points)
    return sorted(names, key=lambda name: name != DENSE)


def usable(points: Sequence[ScalingPoint]) -> list[ScalingPoint]:
    """The points whose training did not diverge."""
    return [point for point in points if point.diverged is None]


def points_of(points: Sequence[ScalingPoint], variant: str) -> list[ScalingPoint]:
    """The points of one variant."""
    return [point for point in points if point.variant == variant]


def costs(points: Sequence[ScalingPoint], axis: Axis) -> list[float]:
    """The cost of each point along an axis."""
    return [getattr(point, axis) for point in points]


def losses(points: Sequence[ScalingPoint]) -> list[float]:
    """The loss of each point."""
    return [point.loss for point in points]


def fit_laws(points: Sequence[ScalingPoint], resamples: int) -> list[FittedLaw]:
    """Every law of every variant along every axis, where there are enough sizes."""
    points = usable(points)
    fitted: list[FittedLaw] = []
    for axis in TITLES:
        for law in get_args(Law):
            fits = dict(_fits(points, axis, law, resamples))
            dense = fits.get(DENSE)
            for variant, law_fit in fits.items():
                against, bent = None, None
                if dense is not None and variant != DENSE:
                    against = compare(law_fit, dense)
                    bent = _bend(points, axis, variant) if law == "decade" else None
                fitted.append(FittedLaw(axis, variant, law_fit, against, bent))
    return fitted


def _bend(points: Sequence[ScalingPoint], axis: Axis, variant: str) -> Bend | None:
    """The common bend of a variant's points and the dense models'."""
    compressed, dense = points_of(points, variant), points_of(points, DENSE)
    return bend(costs(compressed, axis), losses(compressed), costs(dense, axis), losses(dense))


def _fits(
    points: Sequence[ScalingPoint], axis: Axis, law: Law, resamples: int
) -> Iterator[tuple[str, LawFit]]:
    for index, variant in enumerate(variants(points)):
        of_variant = points_of(points, variant)
        if len({point.size for point in of_variant}) >= FEWEST_SIZES[law]:
            x, y = costs(of_variant, axis), losses(of_variant)
            yield variant, fit(x, y, law, resamples, seed=index)


def verdicts(laws: Sequence[FittedLaw], points: Sequence[ScalingPoint]) -> Iterator[str]:
    """A sentence for each variant and axis: its slope per decade against the dense models'."""
    lines = [law for law in laws if law.fit.law == "decade"]
    dense = {line.axis: line for line in lines if line.variant == DENSE}
    for line in lines:
        if line.against is not None:
            yield _sentence(line, line.against, dense[line.axis], usable(points))


def _sentence(
    line: FittedLaw, against: SlopeComparison, dense: FittedLaw, points: Sequence[ScalingPoint]
) -> str:
    preposition = "from" if "differ" in against.verdict else "than"
    comparison = (
        f"{line.variant}: {against.verdict} {preposition} dense per decade of "
        f"{TITLES[line.axis]}: {shown(line.fit.slope)} nats against {shown(dense.fit.slope)}, "
        f"difference {shown(against.difference, '+')}, p = {against.p_value:.2g}."
    )
    if line.bend is not None and line.bend.is_shown:
        return f"{comparison} {_bend_sentence(line.bend, line.axis)}"
    return f"{comparison} {_crossing_sentence(against, line.axis, points)}"


def _bend_sentence(bent: Bend, axis: Axis) -> str:
    return (
        f"But the points bend away from a line (p = {bent.p_value:.2g}), and its slope is that of "
        f"where they lie. With one bend for both, at equal {TITLES[axis]}: "
        f"{bent.verdict}, {shown(bent.steeper, '+')} nats per decade, and "
        f"{shown(bent.level, '+')} nats of loss at the mean."
    )


def _crossing_sentence(against: SlopeComparison, axis: Axis, points: Sequence[ScalingPoint]) -> str:
    if against.verdict != "steeper" or against.crossing is None:
        return "Where the lines would cross cannot be said."
    crossing, largest = against.crossing, max(costs(points, axis))
    is_beyond = crossing.value > largest
    times = f", {crossing.value / largest:.2g} times the largest measured" if is_beyond else ""
    return (
        f"The fitted lines cross at {crossing.value:.2g} "
        f"({crossing.low:.1g} to {crossing.high:.1g})"
        f"{times}{': an extrapolation' if is_beyond else ''}."
    )


def match_costs(points: Sequence[ScalingPoint], laws: Sequence[FittedLaw]) -> Iterator[Matched]:
    """Every variant at the FLOPs and at the seconds of the dense models of every size."""
    fits = {(law.axis, law.variant): law.fit for law in laws if law.fit.law == "decade"}
    points = usable(points)
    axes: tuple[Axis, ...] = ("flops", "seconds")
    for axis in axes:
        dense_means, dense_fit = _means_by_size(points, DENSE, axis), fits.get((axis, DENSE))
        for variant in variants(points)[1:] if dense_means else ():
            means, variant_fit = _means_by_size(points, variant, axis), fits.get((axis, variant))
            for size, (cost, dense_loss) in dense_means.items():
                loss, difference = _interpolated(means, cost), None
                if variant_fit is not None and dense_fit is not None:
                    difference = loss_gap(variant_fit, dense_fit, cost)
                yield Matched(axis, size_name(size), variant, dense_loss, loss, difference)


def _means_by_size(
    points: Sequence[ScalingPoint], variant: str, axis: Axis
) -> dict[str, tuple[float, float]]:
    """Size -> mean cost and mean loss over the seeds."""
    of_variant = points_of(points, variant)
    by_size = {
        size: [point for point in of_variant if point.size == size]
        for size in dict.fromkeys(point.size for point in of_variant)
    }
    return {
        size: (fmean(costs(of_size, axis)), fmean(losses(of_size)))
        for size, of_size in by_size.items()
    }


def _interpolated(means: Mapping[str, tuple[float, float]], cost: float) -> float | None:
    """The loss at `cost`, linear in log cost between sizes; None outside of all sizes."""
    pairs = sorted(means.values())
    mean_costs, mean_losses = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if not mean_costs or not mean_costs[0] <= cost <= mean_costs[-1]:
        return None
    return float(np.interp(np.log(cost), np.log(mean_costs), mean_losses))


def pair_equal_flops(
    points: Sequence[ScalingPoint], equal_flops: Mapping[str, str]
) -> Iterator[Paired]:
    """Each variant of `equal_flops` against the variant whose training FLOPs limit it."""
    loss_of = {(p.variant, p.size, p.seed): p.loss for p in usable(points)}
    for variant, other in equal_flops.items():
        differences = [
            loss - loss_of[other, size, seed]
            for (name, size, seed), loss in loss_of.items()
            if name == variant and (other, size, seed) in loss_of
        ]
        if len(differences) > 1:
            difference, p_value = mean_difference(differences)
            yield Paired(variant, other, len(differences), difference, p_value)
