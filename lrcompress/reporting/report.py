"""The report of one evaluation, written as Markdown, HTML, CSV and JSON, and read from the JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lrcompress.reporting import figures, metrics_json
from lrcompress.reporting.block_calibration import by_block
from lrcompress.reporting.differences import Differences
from lrcompress.reporting.evaluation_figures import pictures
from lrcompress.reporting.figures import Picture
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.metric import title as title_of
from lrcompress.reporting.metrics_json import Evaluation, Samples
from lrcompress.reporting.names import ShortNames, separate
from lrcompress.reporting.provenance import Text, TrainingSummary, texts, training
from lrcompress.reporting.record_schema import validate_record
from lrcompress.reporting.remarks import remarks
from lrcompress.reporting.render import nonfinite_to_text, render
from lrcompress.reporting.served import served_tables
from lrcompress.reporting.significance import Comparison, comparisons
from lrcompress.reporting.stage_table import memory_sentence, stage_rows
from lrcompress.reporting.tables import table
from lrcompress.runtime.atomic_io import replace_text


@dataclass(frozen=True)
class Report:
    """The results of one evaluation."""

    title: str
    metrics: tuple[Metric, ...]
    details: Differences = field(default_factory=Differences)
    record: Mapping[str, Any] = field(default_factory=dict)
    """lrcompress.json of one model, where it has one: its texts, training and ranks."""
    notes: tuple[str, ...] = ()
    """Sentences without a full stop, besides those that follow from `metrics`."""
    listed: tuple[Text, ...] = ()
    """Texts that neither `metrics` nor `record` name, such as those of other records."""
    record_of: str = ""
    """What that model is called in `metrics`; empty for the last one."""

    @property
    def texts(self) -> tuple[Text, ...]:
        own = texts(self.metrics, self.record, self.described)
        # reports of older versions list texts without their models
        named = {replace(text, model=""): text for text in own}
        return tuple(dict.fromkeys((*(named.get(text, text) for text in self.listed), *own)))

    @property
    def described(self) -> str:
        """The model of `record`."""
        return self.record_of or (self.metrics[-1].model if self.metrics else "")

    @property
    def sentences(self) -> tuple[str, ...]:
        """All notes to show: `notes`, and what has to be known about `metrics`."""
        return tuple(dict.fromkeys((*self.notes, *remarks(self.metrics))))

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        return comparisons(self.metrics)

    @cached_property
    def names(self) -> ShortNames:
        """Of models and texts, as pages show them."""
        sources = self.title.rpartition(": ")[0].split(", ")
        data = (data for text in self.texts for data in separate(text.data))
        return ShortNames.of_metrics(self.metrics, *sources, *data)

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        shorten = self.names.shorten
        details = self.details.comparable().renamed(shorten, shorten)
        metrics = [self.names.metric(metric) for metric in self.metrics]
        return tuple(pictures(metrics, details, self.record))


def markdown(report: Report) -> str:
    return render("report.md.jinja", escape=False, **_template_values(report))


def html(report: Report) -> str:
    """One self-contained page: it holds its figures, and loads nothing."""
    values = _template_values(report)
    return render("report.html.jinja", escape=True, **values, pictures=report.pictures)


def _template_values(report: Report) -> dict[str, Any]:
    """What pages show, with short names of models and texts."""
    names = report.names
    notes = (*report.record.get("notes", ()), *report.sentences)
    return {
        "title": names.shorten(report.title),
        "names": names,
        "table": table([names.metric(metric) for metric in report.metrics]),
        "comparisons": [names.comparison(comparison) for comparison in report.comparisons],
        "details": report.details.comparable().renamed(names.shorten, names.shorten),
        "served": served_tables(report.record),
        "texts": [names.text(text) for text in report.texts],
        "separate": separate,
        "described": names.shorten(report.described),
        "training": _training(report),
        "calibration": by_block(report.record),
        "stages": stage_rows(report.record),
        "memory": memory_sentence(report.record),
        "record": {**report.record, "notes": [names.shorten(note) for note in notes]},
    }


def _training(report: Report) -> TrainingSummary | None:
    """The training, with the short names of its texts."""
    summary = training(report.record)
    return summary and replace(summary, text=report.names.shorten(summary.text))


# fields of a record that metrics.json holds elsewhere
HELD_ELSEWHERE = ("metrics", "comparisons")


def to_json(report: Report) -> str:
    """The text of metrics.json.

    `training` and `factorization` come from the record, without fields that metrics.json holds
    elsewhere and without the sketches of texts.
    """
    record: dict[str, Any] = _without_sketches(report.record)
    evaluation = Evaluation(
        title=report.title,
        notes=report.sentences,
        metrics=report.metrics,
        comparisons=report.comparisons,
        details=report.details,
        texts=report.texts,
        record_of=report.described,
        training=record.pop("finetuned", None),
        factorization={k: v for k, v in record.items() if k not in HELD_ELSEWHERE} or None,
        samples=tuple(
            Samples(m.model, title_of(m), m.samples) for m in report.metrics if m.samples
        ),
    )
    return metrics_json.to_json(evaluation)


def read(folder: Path) -> Report:
    """The report in `folder`; raises InputError where its metrics.json cannot be read."""
    file = folder / metrics_json.METRICS
    evaluation = metrics_json.read(Evaluation, file)
    samples = {(s.model, s.metric): s.values for s in evaluation.samples}
    metrics = tuple(
        Metric(**vars(metric), samples=samples.get((metric.model, title_of(metric)), []))
        for metric in evaluation.metrics
    )
    training = {"finetuned": evaluation.training} if evaluation.training else {}
    try:
        record = validate_record({**(evaluation.factorization or {}), **training})
    except ValueError as error:
        raise metrics_json.damaged_file(file, str(error)) from None
    return Report(
        title=evaluation.title,
        metrics=metrics,
        details=evaluation.details,
        record=record,
        record_of=evaluation.record_of,
        notes=tuple(note for note in evaluation.notes if note not in remarks(metrics)),
        listed=evaluation.texts,
    )


def _without_sketches(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: _without_sketches(v) for k, v in value.items() if k != "sketch"}


def to_csv(report: Report) -> str:
    """A row for each metric of each model; its conditions are JSON in one cell."""
    out = io.StringIO()
    names = ("model", "metric", "value", "unit", "low", "high", "higher_is_better", "conditions")
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(names)
    for m in report.metrics:
        conditions = json.dumps(nonfinite_to_text(m.conditions), default=str)
        better = str(m.higher_is_better).lower()
        value, low, high = nonfinite_to_text([m.value, m.low, m.high])
        rows.writerow([m.model, m.name, value, m.unit, low, high, better, conditions])
    return out.getvalue()


# file name -> function that makes its text
FORMATS = {
    metrics_json.METRICS: to_json,
    "metrics.csv": to_csv,
    "report.md": markdown,
    "report.html": html,
}


def write(folder: Path, report: Report) -> None:
    """Writes the report in every format into `folder`, each file atomically, and figures/."""
    for name, to_text in FORMATS.items():
        replace_text(folder / name, to_text(report))
    figures.write(folder, report.pictures)
