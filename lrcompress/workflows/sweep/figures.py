"""The pictures of a sweep: the Pareto fronts of each quality, with a panel for each cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lrcompress.reporting.figures import COLOURS, INK, Picture, draw, legend, plain_log_ticks
from lrcompress.reporting.metric import SIZES
from lrcompress.runtime.paths import unique_file_names
from lrcompress.workflows.sweep.pareto import Front, FrontPoint

MARKERS = "os^Dv"  # the next marker, once every colour was used


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
        f"against {front.cost.title}: {', '.join(point.label for point in front.on_front)}"
        + (f", knee {front.knee.label}" if front.knee else "")
        for front in panels
    )
    text = f"{title} of every point, and which are on the Pareto front {descriptions}."
    rows = (len(panels) + 1) // 2
    size = (8.5, 0.8 + 2.8 * rows)
    return draw(name, "fronts", title, text, partial(_draw, panels, rows), size)


def _draw(panels: Sequence[Front], rows: int, figure: Figure) -> None:
    grid = figure.subplots(rows, min(len(panels), 2), squeeze=False).ravel()
    for axes, front in zip(grid, panels, strict=False):
        _draw_front(axes, front)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    legend(figure)


def _draw_front(axes: Axes, front: Front) -> None:
    variants = dict.fromkeys(point.variant for point in front.points)
    for index, variant in enumerate(variants):
        points = [point for point in front.points if point.variant == variant]
        round_of_colours, colour = divmod(index, len(COLOURS))
        marker = MARKERS[round_of_colours % len(MARKERS)]
        _draw_points(axes, points, variant, COLOURS[colour], marker)
    line = [(point.x, point.y) for point in front.on_front]
    axes.plot(*zip(*line, strict=True), color=INK, linewidth=0.8, label="Pareto front", zorder=1)
    if front.knee:
        axes.plot(
            front.knee.x,
            front.knee.y,
            "o",
            markersize=12,
            fillstyle="none",
            color=INK,
            label="knee",
        )
    axes.set(xlabel=front.cost.title, yscale=front.quality.scale)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if front.cost.title in SIZES:
        axes.xaxis.set_major_formatter(EngFormatter(front.cost.unit))
    if front.quality.scale == "log":
        plain_log_ticks(axes.yaxis)


def _draw_points(
    axes: Axes, points: Sequence[FrontPoint], label: str, colour: str, marker: str
) -> None:
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
        label=label,
    )


def _error_bar(value: float, low: float | None, high: float | None) -> tuple[float, float]:
    """The distances down to `low` and up to `high`; zero where they are unknown."""
    if low is None or high is None:
        return 0.0, 0.0
    return max(value - low, 0.0), max(high - value, 0.0)
