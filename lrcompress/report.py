"""What an evaluation found -> one report, as Markdown, HTML, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lrcompress.details import Details
from lrcompress.files import render, replace_text
from lrcompress.protocols import Metric
from lrcompress.significance import Comparison, comparisons
from lrcompress.tables import TRAININGS, table, texts, training
from lrcompress.tables import title as title_of


@dataclass(frozen=True)
class Report:
    """Of one evaluation. `record` is the lrcompress.json of the compressed model, if there is one,
    whose texts, training, ranks and errors are listed."""

    title: str
    metrics: tuple[Metric, ...]
    details: Details = field(default_factory=Details)
    record: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        return comparisons(self.metrics)


def markdown(report: Report) -> str:
    return render("report.md.jinja", escape=False, **_shown(report))


def html(report: Report) -> str:
    """One self-contained page: no network."""
    return render("report.html.jinja", escape=True, **_shown(report))


def _shown(report: Report) -> dict[str, Any]:
    known = {"title": report.title, "record": report.record, "details": report.details}
    shown = {"table": table(report.metrics), "texts": texts(report.metrics, report.record)}
    return (
        known
        | shown
        | {
            "training": training(report.record),
            "comparisons": report.comparisons,
        }
    )


def to_json(report: Report) -> str:
    """`factorization` and `training` are the record's, less what stands elsewhere or is no news."""
    known: dict[str, Any] = _without_sketches(report.record)
    content = {
        "title": report.title,
        "metrics": [metric.summary() for metric in report.metrics],
        "comparisons": [asdict(one) for one in report.comparisons],
        "details": asdict(report.details),
        "texts": [asdict(text) for text in texts(report.metrics, report.record)],
        "training": next((found for key in TRAININGS if (found := known.pop(key, None))), None),
        "factorization": {k: v for k, v in known.items() if k not in NOT_FACTORIZATION} or None,
    }
    content["samples"] = [
        {"model": metric.model, "metric": title_of(metric), "values": metric.samples}
        for metric in report.metrics
        if metric.samples
    ]
    return json.dumps(content, indent=2, default=str) + "\n"


# parts of a record that a report has elsewhere
NOT_FACTORIZATION = ("metrics", "comparisons")


def _without_sketches(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: _without_sketches(v) for k, v in value.items() if k != "sketch"}


def to_csv(report: Report) -> str:
    """One row for each metric of each model; its conditions as JSON."""
    out = io.StringIO()
    names = ("model", "metric", "value", "unit", "low", "high", "higher_is_better", "conditions")
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(names)
    for m in report.metrics:
        conditions = json.dumps(dict(m.conditions), default=str)
        better = str(m.higher_is_better).lower()
        rows.writerow([m.model, m.name, m.value, m.unit, m.low, m.high, better, conditions])
    return out.getvalue()


# file name -> what writes it: a new format is one function and one row
FORMATS = {
    "metrics.json": to_json,
    "metrics.csv": to_csv,
    "report.md": markdown,
    "report.html": html,
}


def write(folder: Path, report: Report) -> None:
    """Writes the report in every format into `folder`, each file in one rename."""
    for name, formatted in FORMATS.items():
        replace_text(folder / name, formatted(report))
