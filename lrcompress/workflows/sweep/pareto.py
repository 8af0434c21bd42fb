"""What quality costs: Pareto fronts of the points of a sweep, and their knees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lrcompress.reporting.metric import NO_QUALITY, PUBLISHED, SIZES, SPEEDS, Metric, Number
from lrcompress.reporting.tables import comparable, title
from lrcompress.workflows.sweep.point import DENSE, SweepPoint, label

# distances from the chord that are rounding and no bend
ROUNDING = 1e-9

Value = tuple[float, float | None, float | None]  # with the ends of its spread, where known


@dataclass(frozen=True)
class FrontAxis:
    """One of the two numbers that a front sets against each other."""

    __pydantic_config__ = PUBLISHED

    title: str
    unit: str
    higher_is_better: bool
    scale: Literal["linear", "log"]
    """That of distances, for the knee."""

    def goodness(self, value: float) -> float:
        """`value` on the axis's scale, turned so that more is better."""
        scaled = math.log(value) if self.scale == "log" else value
        return scaled if self.higher_is_better else -scaled


@dataclass(frozen=True)
class FrontPoint:
    """A point of a sweep by one cost and one quality, in the units of the axes."""

    __pydantic_config__ = PUBLISHED

    variant: str
    keep_ratio: float
    x: Number
    """The cost."""
    y: Number
    """The quality."""
    x_low: Number | None
    """Of a speed, the slowest run over the dense model's fastest; null where unknown."""
    x_high: Number | None
    """Of a speed, the fastest run over the dense model's slowest; null where unknown."""
    y_low: Number | None
    """Of an accuracy, one standard error below; null where unknown."""
    y_high: Number | None
    """Of an accuracy, one standard error above; null where unknown."""
    on_front: bool
    """Whether no other point is at least as good in both and better in one."""

    @property
    def label(self) -> str:
        return label(self.variant, self.keep_ratio)


@dataclass(frozen=True)
class Front:
    """All points by one cost and one quality; which of them no other one dominates."""

    __pydantic_config__ = PUBLISHED

    quality: FrontAxis
    cost: FrontAxis
    points: tuple[FrontPoint, ...]
    knee: FrontPoint | None
    """The point of the front furthest from the chord between its ends; null where there is none."""
    left_out: tuple[str, ...]
    """Points that were measured in another way than the dense model, or not at all."""

    @property
    def on_front(self) -> tuple[FrontPoint, ...]:
        """The points that are not dominated, by ascending cost axis."""
        return tuple(sorted((p for p in self.points if p.on_front), key=lambda p: p.x))


def fronts(points: Sequence[SweepPoint]) -> tuple[Front, ...]:
    """For every perplexity and task metric: over parameters, over bytes, over each measured speed.

    The first point is the dense model, which takes part. Sizes count as they are, speeds over the
    dense model's of the same run.
    """
    known = {metric.name: metric for metric in points[0].metrics}
    costs = [known[name] for name in (*SIZES, *SPEEDS) if name in known]
    return tuple(_front(points, quality, cost) for quality in qualities(points) for cost in costs)


def qualities(points: Sequence[SweepPoint]) -> tuple[Metric, ...]:
    """The dense model's metrics that are neither sizes nor speeds."""
    return tuple(metric for metric in points[0].metrics if metric.name not in NO_QUALITY)


def over_dense(point: SweepPoint, dense: SweepPoint, name: str) -> Value | None:
    """Speed `name` of `point` over the dense model's of the same run; lowest and highest ratio.

    None where it is unknown, or either was measured in another way than on the point `dense`.
    """
    speed, reference = _named(point.metrics, name), _named(dense.metrics, name)
    if speed is not None and point.variant == DENSE:
        return 1.0, None, None
    base = _named(point.baseline, name)
    if speed is None or base is None or reference is None:
        return None
    if not (_alike(reference, speed) and _alike(reference, base)):
        return None
    ends = (speed.low, speed.high, base.low, base.high)
    low, high, slowest, fastest = ends
    if low is None or high is None or slowest is None or fastest is None:
        return speed.value / base.value, None, None
    return speed.value / base.value, low / fastest, high / slowest


def _alike(reference: Metric, speed: Metric) -> bool:
    """Also of one device: the ratio to dense is another one on another."""
    devices = {metric.conditions.get("device") for metric in (reference, speed)}
    return comparable(reference, speed) and len(devices) == 1


def _front(points: Sequence[SweepPoint], quality: Metric, cost: Metric) -> Front:
    axes = (_cost_axis(cost), _quality_axis(quality))
    found = [(p, _cost(p, points[0], cost), _same(p, quality)) for p in points]
    placed = [(p, x, y) for p, x, y in found if x is not None and y is not None]
    goods = [(axes[0].goodness(x[0]), axes[1].goodness(y[0])) for _, x, y in placed]
    kept = non_dominated(goods)
    shown = tuple(
        FrontPoint(p.variant, p.keep_ratio, x[0], y[0], *x[1:], *y[1:], on_front)
        for (p, x, y), on_front in zip(placed, kept, strict=True)
    )
    left_out = tuple(p.label for p, x, y in found if x is None or y is None)
    at = knee([good if on_front else None for good, on_front in zip(goods, kept, strict=True)])
    return Front(axes[1], axes[0], shown, None if at is None else shown[at], left_out)


def _cost_axis(metric: Metric) -> FrontAxis:
    if metric.name in SPEEDS:
        return FrontAxis(f"{metric.name} speed over dense", "", True, "linear")
    return FrontAxis(metric.name, metric.unit, metric.higher_is_better, "linear")


def _quality_axis(metric: Metric) -> FrontAxis:
    scale: Literal["linear", "log"] = "log" if "perplexity" in metric.name else "linear"
    return FrontAxis(title(metric), metric.unit, metric.higher_is_better, scale)


def _cost(point: SweepPoint, dense: SweepPoint, cost: Metric) -> Value | None:
    return over_dense(point, dense, cost.name) if cost.name in SPEEDS else _same(point, cost)


def _same(point: SweepPoint, wanted: Metric) -> Value | None:
    """The metric of `point` that is measured as `wanted` was on the dense model."""
    found = (metric for metric in point.metrics if title(metric) == title(wanted))
    metric = next((m for m in found if comparable(wanted, m) and math.isfinite(m.value)), None)
    return None if metric is None else (metric.value, metric.low, metric.high)


def _named(metrics: Sequence[Metric], name: str) -> Metric | None:
    return next((metric for metric in metrics if metric.name == name), None)


def non_dominated(goods: Sequence[tuple[float, float]]) -> list[bool]:
    """Of pairs, more is better: whether no other is at least as good in both, and differs."""
    return [not any(a >= x and b >= y and (a, b) != (x, y) for a, b in goods) for x, y in goods]


def knee(goods: Sequence[tuple[float, float] | None]) -> int | None:
    """The index of the point of a front that bends out furthest: Kneedle (Satopaa et al. 2011).

    `goods` are the front's points, more is better; None stands for a point that is off it. Both
    axes are scaled to 0..1 over the front; the distance is that from the chord between its ends,
    on the side where both are better. None where fewer than three points differ, or none is there.
    """
    front = {good for good in goods if good is not None}
    if len(front) < 3:
        return None
    spans = [(min(axis), max(axis)) for axis in zip(*front, strict=True)]
    distances = [-math.inf if good is None else sum(_scaled(good, spans)) - 1 for good in goods]
    furthest = max(distances)
    return distances.index(furthest) if furthest > ROUNDING else None


def _scaled(good: tuple[float, float], spans: Sequence[tuple[float, float]]) -> Iterator[float]:
    for value, (least, most) in zip(good, spans, strict=True):
        yield (value - least) / (most - least)
