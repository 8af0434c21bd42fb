"""Pictures of a scaling study: losses against costs, with fitted lines and their bands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from lrcompress.reporting.figures import COLOURS, Picture, draw, legend


@dataclass(frozen=True)
class Series:
    """Measured points (x, y), and a fitted curve with its band where there is one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    curve: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None  # x, y, low, high


def picture(name: str, series: Sequence[Series], cost: str) -> Picture:
    """Losses against a cost, which is logarithmic."""
    title = f"Loss by {cost}, nats per token"
    spans = "; ".join(f"{one.label}: {max(one.y):.3f} to {min(one.y):.3f}" for one in series)
    onto = partial(_draw, series, cost)
    return draw(name, "loss", title, f"{title}, with fitted lines. {spans}.", onto, (7.5, 4.2))


def _draw(series: Sequence[Series], cost: str, figure: Figure) -> None:
    axes = figure.subplots()
    for index, one in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        axes.scatter(one.x, one.y, s=22, color=colour, label=one.label, zorder=3)
        if one.curve is not None:
            x, y, low, high = one.curve
            axes.plot(x, y, color=colour, linewidth=1.2)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xscale="log", xlabel=cost, ylabel="loss")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    legend(figure)
