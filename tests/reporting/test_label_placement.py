"""Labels of points cover neither each other nor points, however close these are."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from lrcompress.reporting.label_placement import PointLabel, place_labels
from lrcompress.workflows.sweep import figures
from lrcompress.workflows.sweep.pareto import Front
from tests.large_samples import sweep


def boxes(figure: Figure) -> list[Bbox]:
    """Those of all labels of the first panel."""
    texts = [t for t in figure.axes[0].texts if isinstance(t, Annotation) and t.get_text()]
    return [text.get_window_extent() for text in texts]


def overlaps(first: Bbox, second: Bbox) -> bool:
    shared = Bbox.intersection(first, second)
    return shared is not None and shared.width * shared.height > 1e-6


@pytest.mark.parametrize("spread", [1.0, 0.05])
def test_labels_of_crowded_points_stay_apart(spread: float) -> None:
    draw = random.Random(0)
    points = [(draw.random() * spread, draw.random() * spread) for _ in range(14)]
    figure = Figure((6, 3))
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o", markersize=5)
    axes.set(xlim=(-1, 2), ylim=(-1, 2))
    figure.draw_without_rendering()
    place_labels(axes, [PointLabel(x, y, "0.85", "k") for x, y in points])
    placed = boxes(figure)
    assert len(placed) == len(points)
    assert not any(overlaps(a, b) for a, b in combinations(placed, 2))
    centres = axes.transData.transform(points)
    assert not any(box.contains(x, y) for box in placed for x, y in centres)
    inside = axes.get_window_extent()
    assert all(inside.contains(x, y) for box in placed for x, y in box.corners())


@pytest.mark.parametrize("front", sweep().shown.fronts, ids=lambda front: front.cost.title)
def test_keep_ratios_of_a_sweep_stay_apart(front: Front) -> None:
    figure = Figure((6, 4))
    figures._draw([front], figure)
    assert len(boxes(figure)) == len(front.points) - 1
    assert not any(overlaps(a, b) for a, b in combinations(boxes(figure), 2))
