"""The report of a sweep as Markdown, HTML, JSON and CSV, with its pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lrcompress.reporting import figures, metrics_json
from lrcompress.reporting.figures import Picture
from lrcompress.reporting.metric import PERPLEXITY, SPEEDS, Metric, title
from lrcompress.reporting.names import ShortNames, separate
from lrcompress.reporting.remarks import remarks
from lrcompress.reporting.render import render
from lrcompress.reporting.significance import Comparison, comparisons
from lrcompress.reporting.tables import cell, comparable, conditions, number
from lrcompress.reporting.task_groups import places
from lrcompress.runtime.atomic_io import replace_text
from lrcompress.workflows.sweep import sweep_json
from lrcompress.workflows.sweep.figures import pictures
from lrcompress.workflows.sweep.pareto import Front, Spread, fronts, over_dense, qualities
from lrcompress.workflows.sweep.point import SweepPoint
from lrcompress.workflows.sweep.sweep_json import Sweep


@dataclass(frozen=True)
class Grid:
    """A table with a column for each metric and a row for each point.

    `measured` says how the metric of each column was measured.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[SweepPoint, tuple[str, ...]], ...]
    measured: Mapping[str, str]


@dataclass(frozen=True)
class SweepReport:
    """The points of one sweep, the dense model's first. `source` names the dense model."""

    source: str
    points: tuple[SweepPoint, ...]

    @property
    def title(self) -> str:
        return f"{self.source}: sweep"

    @property
    def calibration(self) -> str:
        """The calibration text in words."""
        return next((point.text for point in self.points if point.text), "no text")

    @property
    def calibration_parts(self) -> tuple[str, tuple[str, ...]]:
        """`calibration` up to the first text, and the texts."""
        words, of, data = self.calibration.partition(" of ")
        return words + of, tuple(separate(data)) if of else ()

    @cached_property
    def perplexities(self) -> Grid:
        """Perplexities, each with its ratio to the dense model's."""
        titles = [title(m) for m in qualities(self.points) if m.name == PERPLEXITY]
        return _grid(self.points, titles, _with_ratio)

    @cached_property
    def tasks(self) -> Grid:
        """Task metrics, each with its standard error."""
        titles = [title(m) for m in qualities(self.points) if m.name != PERPLEXITY]
        return _grid(self.points, titles, _with_spread)

    @cached_property
    def parts(self) -> Mapping[str, Grid]:
        """By the outermost group of tasks, the metrics of its parts."""
        place_of = places(self.points[0].metrics)
        groups = dict.fromkeys(place.group for place in place_of.values() if place.group)
        titles = {g: [name for name, place in place_of.items() if place.group == g] for g in groups}
        return {group: _grid(self.points, titles[group], _with_spread) for group in groups}

    @cached_property
    def speeds(self) -> Grid:
        """Speeds, each as a ratio to the dense model's speed in the same run."""
        titles = [metric.name for metric in self.points[0].metrics if metric.name in SPEEDS]
        return _grid(self.points, titles, _speed)

    @property
    def sentences(self) -> tuple[str, ...]:
        """What has to be known about the metrics: values that are not finite, prompts cut."""
        return remarks([metric for point in self.points for metric in point.metrics])

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every point against the dense model's, with a test of significance."""
        return comparisons([metric for point in self.points for metric in point.metrics])

    @cached_property
    def fronts(self) -> tuple[Front, ...]:
        return fronts(self.points)

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(pictures(self.shown.fronts))

    @cached_property
    def names(self) -> ShortNames:
        """Of the texts, as pages show them."""
        metrics = [metric for point in self.points for metric in point.metrics]
        return ShortNames.of_metrics(metrics, self.source, *self.calibration_parts[1])

    @cached_property
    def shown(self) -> SweepReport:
        """With short names of the texts, as pages show it."""
        metric = self.names.metric
        points = (
            replace(
                point,
                metrics=tuple(map(metric, point.metrics)),
                baseline=tuple(map(metric, point.baseline)),
                text=self.names.shorten(point.text),
            )
            for point in self.points
        )
        return replace(self, source=self.names.shorten(self.source), points=tuple(points))

    def size(self, point: SweepPoint) -> str:
        """Parameters of the point's whole model."""
        return cell(_metric(point, "parameters"))


def _grid(
    points: Sequence[SweepPoint],
    titles: Sequence[str],
    cell_text: Callable[[SweepPoint, SweepPoint, str], str],
) -> Grid:
    """`cell_text` gets a point, the dense model's point, and the title of a column."""
    dense = points[0]
    rows = ((p, tuple(cell_text(p, dense, column) for column in titles)) for p in points)
    measured = {
        column: conditions({p.label: m for p in points if (m := _metric(p, column))})
        for column in titles
    }
    return Grid(tuple(titles), tuple(rows), measured)


def _metric(point: SweepPoint, metric_title: str) -> Metric | None:
    return next((metric for metric in point.metrics if title(metric) == metric_title), None)


def _with_spread(point: SweepPoint, _: SweepPoint, metric_title: str) -> str:
    return cell(_metric(point, metric_title))


def _with_ratio(point: SweepPoint, dense: SweepPoint, metric_title: str) -> str:
    metric, base = _metric(point, metric_title), _metric(dense, metric_title)
    if metric is None or base is None:
        return "–"
    if point is dense:
        return f"{metric.value:,.2f}"
    ratio = f"{metric.value / base.value:.3f}" if comparable(base, metric) else "not comparable"
    return f"{metric.value:,.2f} ({ratio})"


def _speed(point: SweepPoint, dense: SweepPoint, name: str) -> str:
    speed = _metric(point, name)
    if speed is None:
        return "–"
    ratio = over_dense(point, dense, name)
    base = next((metric for metric in point.baseline if metric.name == name), None)
    against = "" if base is None else f" against {number(base.value)}"
    return f"{_ratio_text(ratio)}, {number(speed.value)}{against}"


def _ratio_text(ratio: Spread | None) -> str:
    """With the lowest and the highest, where they are known."""
    if ratio is None:
        return "not comparable"
    is_exact = ratio.low is None or ratio.high is None
    return f"{ratio.value:.3g}x" + ("" if is_exact else f" ({ratio.low:.3g}–{ratio.high:.3g})")


def markdown(report: SweepReport) -> str:
    """sweep.md."""
    return render("sweep.md.jinja", escape=False, **_template_values(report))


def html(report: SweepReport) -> str:
    """One self-contained page with the pictures in it, which loads nothing from the network."""
    return render("sweep.html.jinja", escape=True, **_template_values(report))


def _template_values(report: SweepReport) -> dict[str, Any]:
    names, parts = report.names, report.shown.parts
    compared = [names.comparison(comparison) for comparison in report.comparisons]
    folded = {title for grid in parts.values() for title in grid.titles}
    return {
        "report": report.shown,
        "title": names.shorten(report.title),
        "names": names,
        "pictures": report.pictures,
        "comparisons": [c for c in compared if c.metric not in folded],
        "compared_parts": {
            group: [c for c in compared if c.metric in grid.titles] for group, grid in parts.items()
        },
    }


def to_json(report: SweepReport) -> str:
    """sweep.json: everything but the samples of the metrics, which are in the points' files."""
    content = Sweep(
        source=report.source,
        points=report.points,
        comparisons=report.comparisons,
        fronts=report.fronts,
    )
    return metrics_json.to_json(content)


POINT_COLUMNS = ("variant", "keep_ratio", "kept", "seconds", "memory")
METRIC_COLUMNS = ("model", "name", "value", "unit", "higher_is_better", "low", "high")


def to_csv(report: SweepReport) -> str:
    """sweep.csv: one row for each metric of each point, and for the dense speeds beside it.

    Every condition of any metric is a column, which is empty where a metric does not have it.
    """
    rows = list(_csv_rows(report.points))
    names = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_rows(points: Sequence[SweepPoint]) -> Iterator[dict[str, object]]:
    for point in points:
        point_cells = {key: getattr(point, key) for key in POINT_COLUMNS}
        for metric in (*point.metrics, *point.baseline):
            metric_cells = {key: getattr(metric, key) for key in METRIC_COLUMNS}
            yield point_cells | metric_cells | dict(metric.conditions)


# file name -> function that gives its text
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
