"""The pictures of a scaling study: losses against costs, with fitted lines and their bands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from lrcompress.reporting.figures import COLOURS, WIDTH, Picture, draw, legend


@dataclass(frozen=True)
class Series:
    """The points (x, y) of one variant, and its fitted curve, if there is one.

    `curve` has four arrays of shape (points,): x, y, and the lower and upper ends of the band.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    curve: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None


def picture(name: str, series: Sequence[Series], cost: str) -> Picture:
    """The losses of all series against a cost, on a logarithmic axis."""
    title = f"Loss by {cost}, nats per token"
    spans = "; ".join(f"{line.label}: {max(line.y):.3f} to {min(line.y):.3f}" for line in series)
    text = f"{title}, with fitted lines. {spans}."
    return draw(name, "loss", title, text, partial(_draw, series, cost), (WIDTH, 4.0))


def _draw(series: Sequence[Series], cost: str, figure: Figure) -> None:
    axes = figure.subplots()
    for index, line in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        axes.scatter(line.x, line.y, s=22, color=colour, label=line.label, zorder=3)
        if line.curve is not None:
            x, y, low, high = line.curve
            axes.plot(x, y, color=colour, linewidth=1.2)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel=cost, ylabel="loss")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    legend(figure)
