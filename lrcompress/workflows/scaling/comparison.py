"""The laws of a scaling study: fitted to its points, compared with the dense models', in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

import numpy as np

from lrcompress.workflows.scaling.curvature import Bend, bend
from lrcompress.workflows.scaling.intervals import Interval, mean, shown
from lrcompress.workflows.scaling.law_fit import Law, LawFit, SlopeComparison, compare, fit, gap
from lrcompress.workflows.scaling.point import DENSE, ScalingPoint, size_name

Axis = Literal["flops", "non_embedding", "seconds"]
TITLES: dict[Axis, str] = {
    "flops": "training FLOPs",
    "non_embedding": "non-embedding parameters",
    "seconds": "seconds of training",
}


# sizes without which a law is not fitted: one more than it can pass through
SIZES: dict[Law, int] = {"power": 3, "decade": 3, "offset": 4}


@dataclass(frozen=True)
class FittedLaw:
    """One law of one variant along one axis; `against` the dense models' of the same law. `bend` is
    that of both variants' points, with the law "decade" only."""

    axis: Axis
    variant: str
    fit: LawFit
    against: SlopeComparison | None
    bend: Bend | None = None


@dataclass(frozen=True)
class Matched:
    """A variant at what the dense models of one size cost, by axis.

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
    """A variant less another that has as many training FLOPs, over sizes and seeds; in nats."""

    variant: str
    other: str
    count: int
    difference: Interval
    p_value: float

    @property
    def verdict(self) -> str:
        if self.difference.high < 0:
            return "better"
        return "worse" if self.difference.low > 0 else "no difference shown"


def variants(points: Sequence[ScalingPoint]) -> list[str]:
    """Names in order, the dense models' first."""
    found = dict.fromkeys(point.variant for point in points)
    return sorted(found, key=lambda name: name != DENSE)


def usable(points: Sequence[ScalingPoint]) -> list[ScalingPoint]:
    """Those whose training did not diverge."""
    return [point for point in points if point.diverged is None]


def laws(points: Sequence[ScalingPoint], resamples: int) -> list[FittedLaw]:
    """Of every axis, law and variant that has points enough."""
    found: list[FittedLaw] = []
    for axis in TITLES:
        for law in get_args(Law):
            fits = dict(_fits(usable(points), axis, law, resamples))
            dense = fits.get(DENSE)
            for variant, one in fits.items():
                compared = None if dense is None or one is dense else compare(one, dense)
                lines = compared is not None and law == "decade"
                bent = _bend(usable(points), axis, variant) if lines else None
                found.append(FittedLaw(axis, variant, one, compared, bent))
    return found


def _bend(points: Sequence[ScalingPoint], axis: Axis, variant: str) -> Bend | None:
    of = {name: [p for p in points if p.variant == name] for name in (variant, DENSE)}
    x, loss, dense_x, dense_loss = (
        [getattr(point, key) for point in of[name]]
        for name in (variant, DENSE)
        for key in (axis, "loss")
    )
    return bend(x, loss, dense_x, dense_loss)


def _fits(
    points: Sequence[ScalingPoint], axis: Axis, law: Law, resamples: int
) -> Iterator[tuple[str, LawFit]]:
    for index, variant in enumerate(variants(points)):
        own = [point for point in points if point.variant == variant]
        if len({point.size for point in own}) >= SIZES[law]:
            x, y = [getattr(point, axis) for point in own], [point.loss for point in own]
            yield variant, fit(x, y, law, resamples, seed=index)


def verdicts(found: Sequence[FittedLaw], points: Sequence[ScalingPoint]) -> Iterator[str]:
    """A sentence for every variant and axis on its nats per decade against the dense models'."""
    lines = [one for one in found if one.fit.law == "decade"]
    dense = {one.axis: one for one in lines if one.variant == DENSE}
    for one in lines:
        if one.against is not None:
            yield _sentence(one, one.against, dense[one.axis], usable(points))


def _sentence(
    one: FittedLaw, against: SlopeComparison, dense: FittedLaw, points: Sequence[ScalingPoint]
) -> str:
    said = (
        f"{one.variant}: {against.verdict}{'' if 'differ' in against.verdict else ' than dense'}"
        f"{' from dense' if 'differ' in against.verdict else ''} per decade of "
        f"{TITLES[one.axis]}: {shown(one.fit.slope)} nats against {shown(dense.fit.slope)}, "
        f"difference {shown(against.difference, '+')}, p = {against.p_value:.2g}."
    )
    if one.bend is not None and one.bend.is_shown:
        return f"{said} {_bent(one.bend, one.axis)}"
    return f"{said} {_crossing(against, one.axis, points)}"


def _bent(bent: Bend, axis: Axis) -> str:
    return (
        f"But the points bend away from a line (p = {bent.p_value:.2g}), and its slope is that of "
        f"where they lie. With one bend for both, at equal {TITLES[axis]}: "
        f"{bent.verdict}, {shown(bent.steeper, '+')} nats per decade, and "
        f"{shown(bent.level, '+')} nats of loss at the mean."
    )


def _crossing(against: SlopeComparison, axis: Axis, points: Sequence[ScalingPoint]) -> str:
    if against.verdict != "steeper" or against.crossing is None:
        return "Where the lines would cross cannot be said."
    where, largest = against.crossing, max(getattr(point, axis) for point in points)
    beyond = where.value > largest
    times = f", {where.value / largest:.2g} times the largest measured" if beyond else ""
    return (
        f"The fitted lines cross at {where.value:.2g} ({where.low:.1g} to {where.high:.1g})"
        f"{times}{': an extrapolation' if beyond else ''}."
    )


def matched(points: Sequence[ScalingPoint], found: Sequence[FittedLaw]) -> Iterator[Matched]:
    """Every variant at the FLOPs and at the seconds of the dense models of every size."""
    fits = {(one.axis, one.variant): one.fit for one in found if one.fit.law == "decade"}
    points = usable(points)
    axes: tuple[Axis, ...] = ("flops", "seconds")
    for axis in axes:
        dense = _by_size(points, DENSE, axis)
        for variant in variants(points)[1:] if dense else ():
            own, one = _by_size(points, variant, axis), fits.get((axis, variant))
            for size, (x, loss) in dense.items():
                base = fits.get((axis, DENSE))
                span = gap(one, base, x) if one is not None and base is not None else None
                yield Matched(axis, size_name(size), variant, loss, _at(own, x), span)


def _by_size(
    points: Sequence[ScalingPoint], variant: str, axis: Axis
) -> dict[str, tuple[float, float]]:
    """Size -> mean cost and mean loss over the seeds."""
    own = [point for point in points if point.variant == variant]
    return {
        size: (
            fmean(getattr(point, axis) for point in own if point.size == size),
            fmean(point.loss for point in own if point.size == size),
        )
        for size in dict.fromkeys(point.size for point in own)
    }


def _at(means: Mapping[str, tuple[float, float]], x: float) -> float | None:
    pairs = sorted(means.values())
    costs, losses = [cost for cost, _ in pairs], [loss for _, loss in pairs]
    if not costs or not costs[0] <= x <= costs[-1]:
        return None
    return float(np.interp(np.log(x), np.log(costs), losses))


def paired(points: Sequence[ScalingPoint], equal_flops: Mapping[str, str]) -> Iterator[Paired]:
    """Each variant that was held to another's FLOPs against that one."""
    losses = {(p.variant, p.size, p.seed): p.loss for p in usable(points)}
    for variant, other in equal_flops.items():
        differences = [
            loss - losses[other, size, seed]
            for (name, size, seed), loss in losses.items()
            if name == variant and (other, size, seed) in losses
        ]
        if len(differences) > 1:
            span, p_value = mean(differences)
            yield Paired(variant, other, len(differences), span, p_value)
