"""The pictures of a sweep: the Pareto fronts of each quality, with a panel for each cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import Bbox

from lrcompress.reporting.figures import (
    COLOURS,
    INK,
    WIDTH,
    Picture,
    draw,
    legend,
    plain_log_ticks,
)
from lrcompress.reporting.label_placement import PointLabel, place_labels
from lrcompress.reporting.metric import SIZES
from lrcompress.runtime.paths import unique_file_names
from lrcompress.workflows.sweep.pareto import Front, FrontPoint
from lrcompress.workflows.sweep.point import DENSE

MARKERS = "os^Dv"  # the next marker, once every colour was used
KNEE_SIZE = 12  # of the circle around the knee, in points
PALE = 0.45  # opacity of points that are not on the front


def pictures(fronts: Sequence[Front]) -> Iterator[Picture]:
    """A picture for each quality, with a panel for each cost.

    Fronts of one quality have to follow each other in `fronts`.
    """
    names = unique_file_names(front.quality.title.replace(",", "") for front in fronts)
    for title, of_quality in groupby(fronts, key=lambda front: front.quality.title):
        panels = [front for front in of_quality if len(front.points) > 1]
        if panels:
            yield _picture(f"front-{names[title.replace(',', '')]}", title, panels)


def _picture(name: str, title: str, panels: Sequence[Front]) -> Picture:
    descriptions = "; ".join(
        f"against {front.cost.title}: {front.description}"
        + (f", knee {front.knee.label}" if front.knee else "")
        for front in panels
    )
    text = f"{title} of every point, and which are on the Pareto front {descriptions}."
    size = (WIDTH, 0.8 + 3.2 * len(panels))
    return draw(name, "fronts", title, text, partial(_draw, panels), size)


def _draw(panels: Sequence[Front], figure: Figure) -> None:
    grid = figure.subplots(len(panels), squeeze=False).ravel()
    for axes, front in zip(grid, panels, strict=True):
        _draw_front(axes, front)
    legend(figure)
    figure.draw_without_rendering()  # lays it out, so that the places of points are known
    for axes, front in zip(grid, panels, strict=True):
        _label_points(axes, front)


def _colours(front: Front) -> dict[str, str]:
    """Variant -> colour."""
    variants = dict.fromkeys(point.variant for point in front.points)
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(variants)}


def _draw_front(axes: Axes, front: Front) -> None:
    for index, (variant, colour) in enumerate(_colours(front).items()):
        points = [point for point in front.points if point.variant == variant]
        marker = MARKERS[index // len(COLOURS) % len(MARKERS)]
        for on_front in (False, True):
            alike = [point for point in points if point.on_front == on_front]
            _draw_points(axes, alike, colour, marker, 1 if on_front else PALE)
        axes.plot([], [], marker, color=colour, markersize=5, label=variant)
    line = [(point.x, point.y) for point in front.leading]
    if len(line) > 1:
        style: Any = {"color": INK, "linewidth": 0.8, "zorder": 1}
        axes.plot(*zip(*line, strict=True), label="Pareto front", **style)
    if front.knee:
        axes.plot(
            front.knee.x,
            front.knee.y,
            "o",
            markersize=KNEE_SIZE,
            fillstyle="none",
            color=INK,
            label="knee",
        )
    axes.set(xlabel=front.cost.title, ylabel=front.quality.title, yscale=front.quality.scale)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if front.cost.title in SIZES:
        axes.xaxis.set_major_formatter(EngFormatter(front.cost.unit))
    if front.quality.scale == "log":
        plain_log_ticks(axes.yaxis)


def _draw_points(
    axes: Axes, points: Sequence[FrontPoint], colour: str, marker: str, alpha: float
) -> None:
    if not points:
        return
    x, y = [point.x for point in points], [point.y for point in points]
    x_errors = [_error_bar(point.x, point.x_low, point.x_high) for point in points]
    y_errors = [_error_bar(point.y, point.y_low, point.y_high) for point in points]
    axes.errorbar(
        x,
        y,
        yerr=np.transpose(y_errors),
        xerr=np.transpose(x_errors),
        fmt=marker,
        markersize=5,
        color=colour,
        elinewidth=0.8,
        alpha=alpha,
    )


def _label_points(axes: Axes, front: Front) -> None:
    """Writes the keep ratio of each point beside it; that of the dense model is no news."""
    colours = _colours(front)
    labels = [
        PointLabel(
            point.x,
            point.y,
            "" if point.variant == DENSE else f"{point.keep_ratio:g}",
            colours[point.variant],
            **({"marker": KNEE_SIZE} if point == front.knee else {}),
        )
        for point in front.points
    ]
    bars = [bar for point in front.points for bar in _bars(point)]
    place_labels(axes, labels, bars)


def _bars(point: FrontPoint) -> Iterator[Bbox]:
    """The error bars of a point, in the units of the axes."""
    if point.x_low is not None and point.x_high is not None:
        yield Bbox([(point.x_low, point.y), (point.x_high, point.y)])
    if point.y_low is not None and point.y_high is not None:
        yield Bbox([(point.x, point.y_low), (point.x, point.y_high)])


def _error_bar(value: float, low: float | None, high: float | None) -> tuple[float, float]:
    """The distances down to `low` and up to `high`; zero where they are unknown."""
    if low is None or high is None:
        return 0.0, 0.0
    return max(value - low, 0.0), max(high - value, 0.0)
