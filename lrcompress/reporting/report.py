"""What an evaluation found <-> one report: Markdown, HTML, CSV, and JSON, which is read again."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lrcompress.reporting import figures, metrics_json
from lrcompress.reporting.differences import Differences
from lrcompress.reporting.evaluation_figures import pictures
from lrcompress.reporting.figures import Picture
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.metrics_json import Evaluation, Samples
from lrcompress.reporting.provenance import Text, texts, training
from lrcompress.reporting.record_schema import checked_record
from lrcompress.reporting.render import finite, render
from lrcompress.reporting.significance import Comparison, comparisons
from lrcompress.reporting.tables import table
from lrcompress.reporting.tables import title as title_of
from lrcompress.runtime.atomic_io import replace_text


@dataclass(frozen=True)
class Report:
    """Of one evaluation. `record` is the lrcompress.json of the compressed model, if there is one,
    whose texts, training, ranks and errors are listed; `notes` are sentences without a full stop,
    `listed` texts that are known besides, such as those of other records."""

    title: str
    metrics: tuple[Metric, ...]
    details: Differences = field(default_factory=Differences)
    record: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    listed: tuple[Text, ...] = ()

    @property
    def texts(self) -> tuple[Text, ...]:
        return tuple(dict.fromkeys((*self.listed, *texts(self.metrics, self.record))))

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        return comparisons(self.metrics)

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        return tuple(pictures(self.metrics, self.details.alike(), self.record))


def markdown(report: Report) -> str:
    return render("report.md.jinja", escape=False, **_shown(report))


def html(report: Report) -> str:
    """One self-contained page, with the pictures in it: no network."""
    return render("report.html.jinja", escape=True, **_shown(report), pictures=report.pictures)


def _shown(report: Report) -> dict[str, Any]:
    record = {**report.record, "notes": [*report.record.get("notes", ()), *report.notes]}
    known = {"title": report.title, "record": record, "details": report.details.alike()}
    shown = {"table": table(report.metrics), "texts": report.texts}
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
    found = Evaluation(
        title=report.title,
        notes=report.notes,
        metrics=report.metrics,
        comparisons=report.comparisons,
        details=report.details,
        texts=report.texts,
        training=known.pop("finetuned", None),
        factorization={k: v for k, v in known.items() if k not in NOT_FACTORIZATION} or None,
        samples=tuple(
            Samples(m.model, title_of(m), m.samples) for m in report.metrics if m.samples
        ),
    )
    return metrics_json.to_json(found)


def read(folder: Path) -> Report:
    """The report whose metrics.json is in `folder`; raises InputError where that cannot be read."""
    found = metrics_json.read(Evaluation, folder / metrics_json.METRICS)
    samples = {(one.model, one.metric): one.values for one in found.samples}
    metrics = tuple(
        Metric(**vars(metric), samples=samples.get((metric.model, title_of(metric)), []))
        for metric in found.metrics
    )
    training = {"finetuned": found.training} if found.training else {}
    try:
        record = checked_record({**(found.factorization or {}), **training})
    except ValueError as error:
        raise metrics_json.damaged(folder / metrics_json.METRICS, str(error)) from None
    return Report(found.title, metrics, found.details, record, found.notes, found.texts)


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
        conditions = json.dumps(finite(m.conditions), default=str)
        better = str(m.higher_is_better).lower()
        rows.writerow([m.model, m.name, m.value, m.unit, m.low, m.high, better, conditions])
    return out.getvalue()


# file name -> what writes it: a new format is one function and one row
FORMATS = {
    metrics_json.METRICS: to_json,
    "metrics.csv": to_csv,
    "report.md": markdown,
    "report.html": html,
}


def write(folder: Path, report: Report) -> None:
    """Writes the report in every format into `folder`, each file in one rename, and figures/."""
    for name, formatted in FORMATS.items():
        replace_text(folder / name, formatted(report))
    figures.write(folder, report.pictures)
