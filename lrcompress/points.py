"""The points of a sweep, and their table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrcompress.files import render
from lrcompress.protocols import Metric
from lrcompress.tables import title

DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """One variant at one keep_ratio.

    `seconds` of calibration, choices and factorization, as if it had been made alone but for
    gradients that another variant needed; `memory`, the peak in bytes of resident memory; `text`
    says what it was calibrated on, if anything.
    """

    variant: str
    keep_ratio: float
    kept: float
    seconds: float
    memory: int | None
    text: str
    metrics: tuple[Metric, ...]

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Point:
        metrics = tuple(Metric(**metric) for metric in found["metrics"])
        return cls(**{**found, "metrics": metrics})


def markdown(source: str, points: Sequence[Point]) -> str:
    """One row a point; quality beside its ratio to the dense model's."""
    dense = {title(metric): metric for metric in points[0].metrics}
    texts = [key for key in dense if "perplexity" in key]
    rows = [
        {
            "name": point.variant,
            "kept": f"{point.kept:.4f}",
            "cells": [_cell(point, dense, key) for key in texts],
            "seconds": f"{point.seconds:.0f}" if point.seconds else "",
            "memory": f"{point.memory / 2**30:.2f} GiB" if point.memory else "",
        }
        for point in points
    ]
    values = {"source": source, "texts": texts, "rows": rows}
    values["calibration"] = next((point.text for point in points if point.text), "no text")
    return render("sweep.md.jinja", escape=False, **values)


def _cell(point: Point, dense: Mapping[str, Metric], key: str) -> str:
    found = next((metric for metric in point.metrics if title(metric) == key), None)
    if found is None:
        return ""
    ratio = "" if point.variant == DENSE else f" ({found.value / dense[key].value:.3f})"
    return f"{found.value:,.2f}{ratio}"
