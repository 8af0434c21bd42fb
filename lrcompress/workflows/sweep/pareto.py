"""Quality against cost: the Pareto fronts of the points of a sweep, and their knees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lrcompress.reporting.metric import NO_QUALITY, PUBLISHED, SIZES, SPEEDS, Metric, Number, title
from lrcompress.reporting.tables import comparable
from lrcompress.reporting.task_groups import places
from lrcompress.workflows.sweep.point import DENSE, SweepPoint, label

# smaller distances from the chord are rounding errors, not a knee
ROUNDING = 1e-9


@dataclass(frozen=True)
class Spread:
    """A number, and the ends of its spread, where they are known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class FrontAxis:
    """One of the two numbers of a front: its cost or its quality."""

    __pydantic_config__ = PUBLISHED

    title: str
    unit: str
    higher_is_better: bool
    scale: Literal["linear", "log"]
    """The scale on which distances are measured, for the knee."""

    def goodness(self, value: float) -> float:
        """`value` on the axis's scale, with its sign changed where lower is better."""
        scaled = math.log(value) if self.scale == "log" else value
        return scaled if self.higher_is_better else -scaled


@dataclass(frozen=True)
class FrontPoint:
    """One cost and one quality of a point of a sweep, in the units of the axes."""

    __pydantic_config__ = PUBLISHED

    variant: str
    keep_ratio: float
    x: Number
    """The cost."""
    y: Number
    """The quality."""
    x_low: Number | None
    """Lower end of a speed: the slowest run over the dense model's fastest; null where unknown."""
    x_high: Number | None
    """Upper end of a speed: the fastest run over the dense model's slowest; null where unknown."""
    y_low: Number | None
    """Lower end of a score, as `low` of its metric; null where unknown."""
    y_high: Number | None
    """Upper end of a score, as `high` of its metric; null where unknown."""
    on_front: bool
    """Whether no other point is shown to be at least as good in both and better in one: a speed or
    score that is better only within the intervals of both shows nothing."""
    leads: bool = False
    """Whether it is on the front of the numbers alone, without their intervals."""

    @property
    def label(self) -> str:
        """What reports call the point."""
        return label(self.variant, self.keep_ratio)


@dataclass(frozen=True)
class Front:
    """All points by one cost and one quality, and which of them no other point dominates."""

    __pydantic_config__ = PUBLISHED

    quality: FrontAxis
    cost: FrontAxis
    points: tuple[FrontPoint, ...]
    knee: FrontPoint | None
    """The leading point furthest from the chord between the ends of these; null where there is
    none."""
    left_out: tuple[str, ...]
    """Points that were not measured, or under other conditions than the dense model."""

    @property
    def on_front(self) -> tuple[FrontPoint, ...]:
        """The points that are not shown to be dominated, by ascending cost."""
        return tuple(sorted((p for p in self.points if p.on_front), key=lambda p: p.x))

    @property
    def leading(self) -> tuple[FrontPoint, ...]:
        """The front of the numbers alone, by ascending cost."""
        return tuple(point for point in self.on_front if point.leads)

    @property
    def description(self) -> str:
        """Which points are on the front, in words."""
        leading = ", ".join(point.label for point in self.leading)
        if len(self.on_front) == 1:
            return f"no front: {leading} is best in both"
        others = ", ".join(point.label for point in self.on_front if not point.leads)
        return leading + (f"; within intervals also {others}" if others else "")


def fronts(points: Sequence[SweepPoint]) -> tuple[Front, ...]:
    """A front of every perplexity and task metric against parameters, bytes and each speed.

    The first of `points` is the dense model's, which can be on a front too. A speed is the ratio to
    the dense model's speed in the same run.
    """
    dense_metrics = {metric.name: metric for metric in points[0].metrics}
    costs = [dense_metrics[name] for name in (*SIZES, *SPEEDS) if name in dense_metrics]
    return tuple(_front(points, quality, cost) for quality in qualities(points) for cost in costs)


def qualities(points: Sequence[SweepPoint]) -> tuple[Metric, ...]:
    """The dense model's metrics that are neither sizes nor speeds, nor parts of a group of
    tasks."""
    place_of = places(points[0].metrics)
    return tuple(
        metric
        for metric in points[0].metrics
        if metric.name not in NO_QUALITY and not place_of[title(metric)].group
    )


def over_dense(point: SweepPoint, dense: SweepPoint, name: str) -> Spread | None:
    """Speed `name` of `point` over the dense model's in the same run; lowest and highest ratio.

    None where a speed is unknown, or its conditions differ from those of the point `dense`.
    """
    speed, reference = _named(point.metrics, name), _named(dense.metrics, name)
    if speed is not None and point.variant == DENSE:
        return Spread(1.0)
    base = _named(point.baseline, name)
    if speed is None or base is None or reference is None:
        return None
    if not (_same_conditions(reference, speed) and _same_conditions(reference, base)):
        return None
    ratio = speed.value / base.value
    if speed.low is None or speed.high is None or base.low is None or base.high is None:
        return Spread(ratio)
    return Spread(ratio, speed.low / base.high, speed.high / base.low)


def _same_conditions(reference: Metric, speed: Metric) -> bool:
    """Whether two speeds compare, and are of one device: ratios to dense differ by device."""
    devices = {metric.conditions.get("device") for metric in (reference, speed)}
    return comparable(reference, speed) and len(devices) == 1


def _front(points: Sequence[SweepPoint], quality: Metric, cost: Metric) -> Front:
    cost_axis, quality_axis = _cost_axis(cost), _quality_axis(quality)
    measured, left_out = list[tuple[SweepPoint, Spread, Spread]](), list[str]()
    for point in points:
        x, y = _cost(point, points[0], cost), _value(point, quality)
        if x is None or y is None:
            left_out.append(point.label)
        else:
            measured.append((point, x, y))
    goods = [(cost_axis.goodness(x.value), quality_axis.goodness(y.value)) for _, x, y in measured]
    ranges = [
        (_goodness_range(cost_axis, x), _goodness_range(quality_axis, y)) for _, x, y in measured
    ]
    leads = non_dominated(goods)
    on_front = not_shown_dominated(ranges)
    front_points = tuple(
        FrontPoint(
            variant=point.variant,
            keep_ratio=point.keep_ratio,
            x=x.value,
            y=y.value,
            x_low=x.low,
            x_high=x.high,
            y_low=y.low,
            y_high=y.high,
            on_front=is_on_front,
            leads=is_leading,
        )
        for (point, x, y), is_on_front, is_leading in zip(measured, on_front, leads, strict=True)
    )
    knee_index = knee([good if lead else None for good, lead in zip(goods, leads, strict=True)])
    return Front(
        quality=quality_axis,
        cost=cost_axis,
        points=front_points,
        knee=None if knee_index is None else front_points[knee_index],
        left_out=tuple(left_out),
    )


def _goodness_range(axis: FrontAxis, number: Spread) -> tuple[float, float]:
    """The goodness of a number at its worst and at its best."""
    if number.low is None or number.high is None:
        return axis.goodness(number.value), axis.goodness(number.value)
    ends = axis.goodness(number.low), axis.goodness(number.high)
    return min(ends), max(ends)


def _cost_axis(metric: Metric) -> FrontAxis:
    if metric.name in SPEEDS:
        return FrontAxis(f"{metric.name} speed over dense", "", True, "linear")
    return FrontAxis(metric.name, metric.unit, metric.higher_is_better, "linear")


def _quality_axis(metric: Metric) -> FrontAxis:
    scale: Literal["linear", "log"] = "log" if "perplexity" in metric.name else "linear"
    return FrontAxis(title(metric), metric.unit, metric.higher_is_better, scale)


def _cost(point: SweepPoint, dense: SweepPoint, cost: Metric) -> Spread | None:
    return over_dense(point, dense, cost.name) if cost.name in SPEEDS else _value(point, cost)


def _value(point: SweepPoint, reference: Metric) -> Spread | None:
    """The finite metric of `point` that compares with `reference`, the dense model's."""
    for metric in point.metrics:
        is_same = title(metric) == title(reference) and comparable(reference, metric)
        if is_same and math.isfinite(metric.value):
            return Spread(metric.value, metric.low, metric.high)
    return None


def _named(metrics: Sequence[Metric], name: str) -> Metric | None:
    return next((metric for metric in metrics if metric.name == name), None)


def non_dominated(goods: Sequence[tuple[float, float]]) -> list[bool]:
    """For each pair, whether no other pair dominates it; in both numbers more is better.

    A pair dominates another if it is at least as good in both numbers and the two differ.
    """
    return [not any(a >= x and b >= y and (a, b) != (x, y) for a, b in goods) for x, y in goods]


def not_shown_dominated(
    ranges: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> list[bool]:
    """For each pair of cost and quality, whether no other is shown to dominate it.

    `ranges` are the lowest and the highest goodness of both; equal ones are those of an exact
    number. A pair is shown to dominate another if it does so with its lowest goodness against the
    other's highest (Limbourg and Aponte 2005).
    """
    least = [(cost[0], quality[0]) for cost, quality in ranges]
    most = [(cost[1], quality[1]) for cost, quality in ranges]
    return [not any(a >= x and b >= y and (a, b) != (x, y) for a, b in least) for x, y in most]


def knee(goods: Sequence[tuple[float, float] | None]) -> int | None:
    """The index of the front's point that is furthest from the chord between the front's ends.

    This is Kneedle (Satopaa et al. 2011): both axes are scaled to 0..1 over the front, and only
    the side of the chord counts where both numbers are better. More is better in `goods`; None
    stands for a point that is not on the front. Returns None for fewer than three distinct points,
    and where no point is on that side.
    """
    front = {good for good in goods if good is not None}
    if len(front) < 3:
        return None
    spans = [(min(axis), max(axis)) for axis in zip(*front, strict=True)]
    distances = [-math.inf if good is None else sum(_scaled(good, spans)) - 1 for good in goods]
    furthest = max(distances)
    return distances.index(furthest) if furthest > ROUNDING else None


def _scaled(good: tuple[float, float], spans: Sequence[tuple[float, float]]) -> Iterator[float]:
    """Both numbers, scaled so that 0 and 1 are the ends of their spans."""
    for value, (lowest, highest) in zip(good, spans, strict=True):
        yield (value - lowest) / (highest - lowest)
