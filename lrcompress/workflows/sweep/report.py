"""The points of a sweep -> one report, as Markdown, HTML, JSON and CSV, with its pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lrcompress.reporting import figures, metrics_json
from lrcompress.reporting.figures import Picture
from lrcompress.reporting.metric import PERPLEXITY, SPEEDS, Metric
from lrcompress.reporting.render import render
from lrcompress.reporting.significance import Comparison, comparisons
from lrcompress.reporting.tables import cell, comparable, conditions, number, title
from lrcompress.runtime.atomic_io import replace_text
from lrcompress.workflows.sweep import sweep_json
from lrcompress.workflows.sweep.figures import pictures
from lrcompress.workflows.sweep.pareto import Front, fronts, over_dense, qualities
from lrcompress.workflows.sweep.point import SweepPoint
from lrcompress.workflows.sweep.sweep_json import Sweep


@dataclass(frozen=True)
class Grid:
    """One metric a column, one point a row; `measured`, how each column was."""

    titles: tuple[str, ...]
    rows: tuple[tuple[SweepPoint, tuple[str, ...]], ...]
    measured: Mapping[str, str]


@dataclass(frozen=True)
class SweepReport:
    """Of the points of one sweep, which begin with the dense model's; `source` is its name."""

    source: str
    points: tuple[SweepPoint, ...]

    @property
    def title(self) -> str:
        return f"{self.source}: sweep"

    @property
    def calibration(self) -> str:
        return next((point.text for point in self.points if point.text), "no text")

    @cached_property
    def perplexities(self) -> Grid:
        """Each with its ratio to the dense model's."""
        titles = [title(found) for found in qualities(self.points) if found.name == PERPLEXITY]
        return _grid(self.points, titles, _with_ratio)

    @cached_property
    def tasks(self) -> Grid:
        titles = [title(found) for found in qualities(self.points) if found.name != PERPLEXITY]
        return _grid(self.points, titles, lambda point, _, name: cell(_titled(point, name)))

    @cached_property
    def speeds(self) -> Grid:
        """Each as a ratio to the dense model's of the same run."""
        titles = [found.name for found in self.points[0].metrics if found.name in SPEEDS]
        return _grid(self.points, titles, _speed)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        return comparisons([metric for point in self.points for metric in point.metrics])

    @cached_property
    def fronts(self) -> tuple[Front, ...]:
        return fronts(self.points)

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(pictures(self.fronts))

    def size(self, point: SweepPoint) -> str:
        """Parameters of the whole model."""
        return cell(_titled(point, "parameters"))


def _grid(
    points: Sequence[SweepPoint],
    titles: Sequence[str],
    shows: Callable[[SweepPoint, SweepPoint, str], str],
) -> Grid:
    rows = ((p, tuple(shows(p, points[0], name) for name in titles)) for p in points)
    by_label = {
        name: {p.label: found for p in points if (found := _titled(p, name))} for name in titles
    }
    measured = {name: conditions(found) for name, found in by_label.items()}
    return Grid(tuple(titles), tuple(rows), measured)


def _titled(point: SweepPoint, name: str) -> Metric | None:
    return next((metric for metric in point.metrics if title(metric) == name), None)


def _with_ratio(point: SweepPoint, dense: SweepPoint, name: str) -> str:
    found, base = _titled(point, name), _titled(dense, name)
    if found is None or base is None:
        return "–"
    if point is dense:
        return f"{found.value:,.2f}"
    ratio = f"{found.value / base.value:.3f}" if comparable(base, found) else "not comparable"
    return f"{found.value:,.2f} ({ratio})"


def _speed(point: SweepPoint, dense: SweepPoint, name: str) -> str:
    found = _titled(point, name)
    if found is None:
        return "–"
    ratio = over_dense(point, dense, name)
    base = next((metric for metric in point.baseline if metric.name == name), None)
    words = "not comparable" if ratio is None else f"{ratio[0]:.3g}x"
    beside = "" if base is None else f" against {number(base.value)}"
    return f"{words} ({number(found.value)}{beside})"


def markdown(report: SweepReport) -> str:
    return render("sweep.md.jinja", escape=False, report=report)


def html(report: SweepReport) -> str:
    """One self-contained page, with the pictures in it: no network."""
    return render("sweep.html.jinja", escape=True, report=report, title=report.title)


def to_json(report: SweepReport) -> str:
    """All but the samples of the metrics, which are in the files of the points."""
    found = Sweep(
        source=report.source,
        points=report.points,
        comparisons=report.comparisons,
        fronts=report.fronts,
    )
    return metrics_json.to_json(found)


COLUMNS = ("variant", "keep_ratio", "kept", "seconds", "memory")
VALUES = ("model", "name", "value", "unit", "higher_is_better", "low", "high")


def to_csv(report: SweepReport) -> str:
    """One row a point and metric, the speeds of the dense model beside it included.

    Every condition of any metric is a column, empty where a metric has none of that name.
    """
    rows = list(_rows(report.points))
    names = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(points: Sequence[SweepPoint]) -> Iterator[dict[str, object]]:
    for point in points:
        about = {key: getattr(point, key) for key in COLUMNS}
        for metric in (*point.metrics, *point.baseline):
            yield about | {key: getattr(metric, key) for key in VALUES} | dict(metric.conditions)


# file name -> what writes it: a new format is one function and one row
FORMATS = {
    "sweep.md": markdown,
    "sweep.html": html,
    sweep_json.SWEEP: to_json,
    "sweep.csv": to_csv,
}


def write(folder: Path, report: SweepReport) -> None:
    """Writes the report in every format into `folder`, each file in one rename, and figures/."""
    for name, formatted in FORMATS.items():
        replace_text(folder / name, formatted(report))
    figures.write(folder, report.pictures)
