"""The pictures of a sweep: for each quality all points against each cost, and the Pareto front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from lrcompress.reporting.figures import COLOURS, INK, Picture, draw, legend, plain_log_ticks
from lrcompress.reporting.metric import SIZES
from lrcompress.runtime.paths import unique_file_names
from lrcompress.workflows.sweep.pareto import Front, FrontPoint

MARKERS = "os^Dv"  # where there are more variants than colours


def pictures(fronts: Sequence[Front]) -> Iterator[Picture]:
    """One for each quality, with a panel for each cost. Fronts of one quality follow each other."""
    names = unique_file_names(front.quality.title.replace(",", "") for front in fronts)
    for title, found in groupby(fronts, key=lambda front: front.quality.title):
        panels = [front for front in found if len(front.points) > 1]
        if panels:
            yield _picture(f"front-{names[title.replace(',', '')]}", title, panels)


def _picture(name: str, title: str, panels: Sequence[Front]) -> Picture:
    words = "; ".join(
        f"against {front.cost.title}: {', '.join(point.label for point in front.on_front)}"
        + (f", knee {front.knee.label}" if front.knee else "")
        for front in panels
    )
    text = f"{title} of every point, and which are on the Pareto front {words}."
    rows = (len(panels) + 1) // 2
    onto = partial(_draw, panels, rows)
    return draw(name, "fronts", title, text, onto, (8.5, 0.8 + 2.8 * rows))


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
        turn, colour = divmod(index, len(COLOURS))
        _draw_points(axes, points, variant, COLOURS[colour], MARKERS[turn % len(MARKERS)])
    edge = [(point.x, point.y) for point in front.on_front]
    axes.plot(*zip(*edge, strict=True), color=INK, linewidth=0.8, label="Pareto front", zorder=1)
    if front.knee:
        place = (front.knee.x, front.knee.y)
        axes.plot(*place, "o", markersize=12, fillstyle="none", color=INK, label="knee")
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
    across = [_distances(point.x, point.x_low, point.x_high) for point in points]
    along = [_distances(point.y, point.y_low, point.y_high) for point in points]
    ends: dict[str, Any] = {"xerr": np.transpose(across), "yerr": np.transpose(along)}
    axes.errorbar(x, y, fmt=marker, markersize=5, color=colour, elinewidth=0.8, label=label, **ends)


def _distances(value: float, low: float | None, high: float | None) -> tuple[float, float]:
    if low is None or high is None:
        return 0.0, 0.0
    return max(value - low, 0.0), max(high - value, 0.0)
