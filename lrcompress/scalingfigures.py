"""Pictures of a scaling study: losses against costs, with fitted curves and their bands."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SIZE = (6.4, 4.4)
DOTS = 130
# a palette that is told apart with any eyes (Okabe and Ito)
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
BAND = 0.15


@dataclass(frozen=True)
class Series:
    """Measured points (x, y), and a fitted curve with its band where there is one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    curve: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None = None  # x, y, low, high


def picture(series: Sequence[Series], x_title: str, y_title: str, kind: str) -> bytes:
    """A `kind` (svg or png) of `series`; x is logarithmic. Equal input gives equal bytes."""
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for one, colour in zip(series, COLOURS * len(series), strict=False):
        axes.scatter(one.x, one.y, s=22, color=colour, label=one.label, zorder=3)
        if one.curve is not None:
            x, y, low, high = one.curve
            axes.plot(x, y, color=colour, linewidth=1.2)
            axes.fill_between(x, low, high, color=colour, alpha=BAND, linewidth=0)
    axes.set(xscale="log", xlabel=x_title, ylabel=y_title)
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(frameon=False)
    written = io.BytesIO()
    with rc_context({"svg.hashsalt": x_title}):
        figure.savefig(
            written, format=kind, dpi=DOTS, metadata={"Date": None} if kind == "svg" else {}
        )
    return written.getvalue()
