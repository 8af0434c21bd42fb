"""Metrics of several models -> one table, as Markdown, HTML and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrcompress.files import render, replace_text
from lrcompress.protocols import Metric

# conditions that may differ between two models whose numbers are still worth a ratio
COMPARABLE = {"dtype", "device"}


@dataclass(frozen=True)
class Row:
    """One metric across models: cells of text, and the ratio of each later model to the first."""

    title: str
    better: str
    cells: tuple[str, ...]
    ratios: tuple[str, ...]
    conditions: str


@dataclass(frozen=True)
class Table:
    labels: tuple[str, ...]
    rows: tuple[Row, ...]


def table(metrics: Sequence[Metric]) -> Table:
    """Models as columns in the order in which they were measured, metrics as rows."""
    labels = tuple(dict.fromkeys(m.model for m in metrics))
    groups: dict[tuple[str, object], dict[str, Metric]] = {}
    for metric in metrics:
        groups.setdefault((metric.name, metric.conditions.get("data")), {})[metric.model] = metric
    return Table(labels, tuple(_row(labels, by_model) for by_model in groups.values()))


def _row(labels: Sequence[str], by_model: Mapping[str, Metric]) -> Row:
    first = next(iter(by_model.values()))
    base = by_model.get(labels[0])
    data = first.conditions.get("data")
    unit = f" ({first.unit})" if first.unit else ""
    return Row(
        first.name + (f", {data}" if data else "") + unit,
        "higher is better" if first.higher_is_better else "lower is better",
        tuple(_cell(by_model.get(label)) for label in labels),
        tuple(_ratio(base, by_model.get(label)) for label in labels[1:]),
        _conditions(by_model),
    )


def _conditions(by_model: Mapping[str, Metric]) -> str:
    """The conditions of a row, once if all models share them, else model by model."""
    words = {
        label: ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in metric.conditions.items())
        for label, metric in by_model.items()
    }
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return "; ".join(f"{label}: {text}" for label, text in words.items())


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    spread = ""
    if metric.low is not None and metric.high is not None:
        spread = f" ({_number(metric.low)}–{_number(metric.high)})"
    return _number(metric.value) + spread


def _number(value: float) -> str:
    if value == int(value) and abs(value) >= 1000:
        return f"{int(value):,}"
    if abs(value) >= 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _ratio(base: Metric | None, metric: Metric | None) -> str:
    if base is None or metric is None or base.value == 0:
        return "–"
    both = {*base.conditions.items()} ^ {*metric.conditions.items()}
    if {name for name, _ in both} - COMPARABLE:
        return "not comparable"
    return f"{metric.value / base.value:.3g}x"


def markdown(title: str, metrics: Sequence[Metric], record: Mapping[str, Any] | None) -> str:
    values = {"title": title, "table": table(metrics), "record": record}
    return render("report.md.jinja", escape=False, **values)


def html(title: str, metrics: Sequence[Metric], record: Mapping[str, Any] | None) -> str:
    """One self-contained page: no scripts, no network."""
    values = {"title": title, "table": table(metrics), "record": record}
    return render("report.html.jinja", escape=True, **values)


def to_json(title: str, metrics: Sequence[Metric], record: Mapping[str, Any] | None) -> str:
    factorization = {k: v for k, v in (record or {}).items() if k != "metrics"}
    content = {
        "title": title,
        "metrics": [asdict(metric) for metric in metrics],
        "factorization": factorization or None,
    }
    return json.dumps(content, indent=2, default=str) + "\n"


# file name -> what writes it: a new format is one function and one row
FORMATS = {"metrics.json": to_json, "report.md": markdown, "report.html": html}


def write(
    folder: Path, title: str, metrics: Sequence[Metric], record: Mapping[str, Any] | None
) -> None:
    """Writes the report in every format into `folder`, each file in one rename.

    `record` is the factorization's lrcompress.json, whose ranks and errors are listed.
    """
    for name, formatted in FORMATS.items():
        replace_text(folder / name, formatted(title, metrics, record))
