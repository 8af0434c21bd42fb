"""Places the labels of points so that they cover neither each other nor the points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

# directions from a point, in degrees, and distances, in points, in the order of preference
DIRECTIONS = (45, -45, 135, -135, 90, -90, 0, 180, 65, -65, 115, -115, 25, -25, 155, -155)
DISTANCES = (5.5, 12, 20, 30, 42)
BAR_WEIGHT = 0.1  # of an area that covers an error bar, against one that covers a label or point
LINE_FROM = 12  # distance in points from which a line joins a label to its point


@dataclass(frozen=True)
class PointLabel:
    """A short text for the point (x, y), in the units of the axes.

    `marker` is the size of the point, in points.
    """

    x: float
    y: float
    text: str
    colour: str
    marker: float = 7


def place_labels(axes: Axes, labels: Sequence[PointLabel], bars: Sequence[Bbox] = ()) -> None:
    """Writes `labels`, each at the first place near its point where it covers nothing.

    Where all places cover something, the one that covers least is taken. A label without text only
    keeps its point free. The layout of the figure has to be final. `bars` are lines to keep free,
    as boxes in the units of the axes.
    """
    space = _Space.around(axes, labels, bars)
    left_to_right = sorted(labels, key=lambda label: [*space.pixels(label)])
    for label in left_to_right:
        if label.text:
            text = _write(axes, label)
            size = text.get_window_extent()
            place = space.take(label, size.width, size.height)
            text.xyann = (place.x, place.y)
            if place.distance >= LINE_FROM:
                _join(axes, label, place, size.height / space.scale / 2)


@dataclass(frozen=True)
class _Place:
    """The offset of a label's centre from its point, and the gap between both, in points."""

    x: float
    y: float
    distance: float


@dataclass(frozen=True)
class _Space:
    """What is taken of the space in `axes`; `scale` is pixels in a point.

    Boxes are rows of left, bottom, right and top in pixels.
    """

    axes: Axes
    scale: float
    taken: list[Any]
    lines: Any
    frame: Any

    @classmethod
    def around(cls, axes: Axes, labels: Sequence[PointLabel], bars: Sequence[Bbox]) -> _Space:
        scale = axes.figure.dpi / 72
        ends = [axes.transData.transform(bar.get_points()).ravel() for bar in bars]
        lines = np.reshape(ends, (-1, 4)) + scale * np.array([-1, -1, 1, 1])
        space = cls(axes, scale, [], lines, np.array([axes.get_window_extent().extents]))
        for label in labels:
            size = label.marker * scale
            space.taken.append(_box(space.pixels(label), size, size))
        return space

    def pixels(self, label: PointLabel) -> Any:
        """Shape (2,)."""
        return self.axes.transData.transform((label.x, label.y))

    def take(self, label: PointLabel, width: float, height: float) -> _Place:
        """Takes the best place for a label of that size, in pixels."""
        places = list(_places(width / self.scale, height / self.scale))
        offsets = np.array([(place.x, place.y) for place in places]) * self.scale
        boxes = _box(self.pixels(label) + offsets, width, height)
        best = int(np.argmin(self._covered(boxes)))
        self.taken.append(boxes[best])
        return places[best]

    def _covered(self, boxes: Any) -> Any:
        """The area of each of `boxes` that is taken, or outside of the axes."""
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        outside = area - _shared(boxes, self.frame)
        lines = BAR_WEIGHT * _shared(boxes, self.lines)
        # a place is not left for what is smaller than rounding
        return np.round(outside + _shared(boxes, np.array(self.taken)) + lines, 6)


def _write(axes: Axes, label: PointLabel) -> Annotation:
    """The text of a label, on its point."""
    text = axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=(0, 0),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize="small",
        color=label.colour,
    )
    text.set_in_layout(False)
    return text


def _join(axes: Axes, label: PointLabel, place: _Place, gap: float) -> None:
    """A line from the label to its point, with a gap at both ends, in points."""
    line = {"arrowstyle": "-", "color": label.colour, "linewidth": 0.5}
    axes.annotate(
        "",
        (label.x, label.y),
        xytext=(place.x, place.y),
        textcoords="offset points",
        arrowprops={**line, "shrinkA": gap, "shrinkB": label.marker / 2},
    ).set_in_layout(False)


def _places(width: float, height: float) -> Iterator[_Place]:
    """Places of a label of that size, in points, the best first."""
    for distance in DISTANCES:
        for direction in DIRECTIONS:
            x, y = math.cos(math.radians(direction)), math.sin(math.radians(direction))
            yield _Place(
                _sign(x) * width / 2 + distance * x, _sign(y) * height / 2 + distance * y, distance
            )


def _sign(value: float) -> float:
    return 0.0 if abs(value) < 1e-9 else math.copysign(1.0, value)


def _box(centre: Any, width: float, height: float) -> Any:
    """Boxes (..., 4) of that size around centres (..., 2)."""
    half = np.array([width, height]) / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def _shared(boxes: Any, others: Any) -> Any:
    """The area of each of `boxes` (count, 4) in `others`, summed over these."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=-1).sum(axis=-1)
