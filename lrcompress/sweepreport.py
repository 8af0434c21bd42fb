"""The points of a sweep -> one report, as Markdown, HTML, JSON and CSV, with its pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrcompress import content, figures
from lrcompress.content import Sweep
from lrcompress.files import render, replace_text
from lrcompress.points import Point
from lrcompress.protocols import PERPLEXITY, Metric
from lrcompress.significance import comparisons
from lrcompress.sweepfigures import pictures
from lrcompress.tables import cell, comparable, conditions, number, title
from lrcompress.tradeoff import SPEEDS, fronts, over_dense, qualities


@dataclass(frozen=True)
class Grid:
    """One metric a column, one point a row; `measured`, how each column was."""

    titles: tuple[str, ...]
    rows: tuple[tuple[Point, tuple[str, ...]], ...]
    measured: Mapping[str, str]


def shown(source: str, points: Sequence[Point]) -> dict[str, Any]:
    """The values that templates are rendered with; `points` begin with the dense model's.

    `perplexities`, `tasks` and `speeds` are Grids.
    """
    found = qualities(points)
    texts = [title(metric) for metric in found if metric.name == PERPLEXITY]
    tasks = [title(metric) for metric in found if metric.name != PERPLEXITY]
    speeds = [metric.name for metric in points[0].metrics if metric.name in SPEEDS]
    return {
        "title": f"{source}: sweep",
        "sizes": {point.label: cell(_titled(point, "parameters")) for point in points},
        "calibration": next((point.text for point in points if point.text), "no text"),
        "perplexities": _grid(points, texts, _with_ratio),
        "tasks": _grid(points, tasks, lambda point, _, name: cell(_titled(point, name))),
        "speeds": _grid(points, speeds, _speed),
        "comparisons": comparisons([metric for point in points for metric in point.metrics]),
        "fronts": fronts(points),
    }


def _grid(
    points: Sequence[Point], titles: Sequence[str], shows: Callable[[Point, Point, str], str]
) -> Grid:
    rows = ((p, tuple(shows(p, points[0], name) for name in titles)) for p in points)
    by_label = {
        name: {p.label: found for p in points if (found := _titled(p, name))} for name in titles
    }
    measured = {name: conditions(found) for name, found in by_label.items()}
    return Grid(tuple(titles), tuple(rows), measured)


def _titled(point: Point, name: str) -> Metric | None:
    return next((metric for metric in point.metrics if title(metric) == name), None)


def _with_ratio(point: Point, dense: Point, name: str) -> str:
    found, base = _titled(point, name), _titled(dense, name)
    if found is None or base is None:
        return "–"
    if point is dense:
        return f"{found.value:,.2f}"
    ratio = f"{found.value / base.value:.3f}" if comparable(base, found) else "not comparable"
    return f"{found.value:,.2f} ({ratio})"


def _speed(point: Point, dense: Point, name: str) -> str:
    found = _titled(point, name)
    if found is None:
        return "–"
    ratio = over_dense(point, dense, name)
    base = next((metric for metric in point.baseline if metric.name == name), None)
    words = "not comparable" if ratio is None else f"{ratio[0]:.3g}x"
    beside = "" if base is None else f" against {number(base.value)}"
    return f"{words} ({number(found.value)}{beside})"


def markdown(source: str, points: Sequence[Point]) -> str:
    return render("sweep.md.jinja", escape=False, **shown(source, points))


def html(source: str, points: Sequence[Point]) -> str:
    """One self-contained page, with the pictures in it: no network."""
    values = shown(source, points)
    drawn = tuple(pictures(values["fronts"]))
    return render("sweep.html.jinja", escape=True, **values, pictures=drawn)


def to_json(source: str, points: Sequence[Point]) -> str:
    """All but the samples of the metrics, which are in the files of the points."""
    values = shown(source, points)
    found = Sweep(
        source=source,
        points=tuple(points),
        comparisons=values["comparisons"],
        fronts=values["fronts"],
    )
    return content.to_json(found)


COLUMNS = ("variant", "keep_ratio", "kept", "seconds", "memory")
VALUES = ("model", "name", "value", "unit", "higher_is_better", "low", "high")


def to_csv(source: str, points: Sequence[Point]) -> str:
    """One row a point and metric, the speeds of the dense model beside it included.

    Every condition of any metric is a column, empty where a metric has none of that name.
    """
    rows = list(_rows(points))
    names = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(points: Sequence[Point]) -> Iterator[dict[str, object]]:
    for point in points:
        about = {key: getattr(point, key) for key in COLUMNS}
        for metric in (*point.metrics, *point.baseline):
            yield about | {key: getattr(metric, key) for key in VALUES} | dict(metric.conditions)


# file name -> what writes it: a new format is one function and one row
FORMATS = {
    "sweep.md": markdown,
    "sweep.html": html,
    content.SWEEP: to_json,
    "sweep.csv": to_csv,
}


def write(folder: Path, source: str, points: Sequence[Point]) -> None:
    """Writes the report in every format into `folder`, each file in one rename, and figures/."""
    for name, formatted in FORMATS.items():
        replace_text(folder / name, formatted(source, points))
    figures.write(folder, tuple(pictures(fronts(points))))
