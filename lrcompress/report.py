"""Metrics of several models -> one report, as Markdown, HTML and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lrcompress.files import render, replace_text
from lrcompress.protocols import Metric
from lrcompress.significance import comparisons
from lrcompress.tables import table, texts, training
from lrcompress.tables import title as title_of


def markdown(title: str, metrics: Sequence[Metric], record: Mapping[str, Any] | None) -> str:
    return render("report.md.jinja", escape=False, **_shown(title, metrics, record))


def html(title: str, metrics: Sequence[Metric], record: Mapping[str, Any] | None) -> str:
    """One self-contained page: no scripts, no network."""
    return render("report.html.jinja", escape=True, **_shown(title, metrics, record))


def _shown(
    title: str, metrics: Sequence[Metric], record: Mapping[str, Any] | None
) -> dict[str, Any]:
    known = record or {}
    shown = {"table": table(metrics), "texts": texts(metrics, record)}
    shown |= {"title": title, "record": known, "training": training(known)}
    return shown | {"comparisons": comparisons(metrics)}


def to_json(title: str, metrics: Sequence[Metric], record: Mapping[str, Any] | None) -> str:
    """`factorization` and `training` are the record's, less what stands elsewhere or is no news."""
    known: dict[str, Any] = _without_sketches(record or {})
    content = {
        "title": title,
        "metrics": [metric.summary() for metric in metrics],
        "comparisons": [asdict(one) for one in comparisons(metrics)],
        "texts": [asdict(text) for text in texts(metrics, record)],
        "training": known.pop("finetuned", None),
        "factorization": {k: v for k, v in known.items() if k != "metrics"} or None,
    }
    content["samples"] = [
        {"model": metric.model, "metric": title_of(metric), "values": metric.samples}
        for metric in metrics
        if metric.samples
    ]
    return json.dumps(content, indent=2, default=str) + "\n"


def _without_sketches(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {k: _without_sketches(v) for k, v in value.items() if k != "sketch"}


# file name -> what writes it: a new format is one function and one row
FORMATS = {"metrics.json": to_json, "report.md": markdown, "report.html": html}


def write(
    folder: Path, title: str, metrics: Sequence[Metric], record: Mapping[str, Any] | None
) -> None:
    """Writes the report in every format into `folder`, each file in one rename.

    `record` is the compressed model's lrcompress.json, whose texts, training, ranks and errors are
    listed.
    """
    for name, formatted in FORMATS.items():
        replace_text(folder / name, formatted(title, metrics, record))
