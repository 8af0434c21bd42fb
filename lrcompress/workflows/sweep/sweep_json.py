"""The layout of sweep.json."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lrcompress.reporting.metric import PUBLISHED
from lrcompress.reporting.metrics_json import VERSION
from lrcompress.reporting.significance import Comparison
from lrcompress.workflows.sweep.pareto import Front
from lrcompress.workflows.sweep.point import PointSummary

SWEEP = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """sweep.json of lrcompress: one model at several keep ratios by several methods.

    A number that is not finite is the text NaN, Infinity or -Infinity, because JSON has no number
    for it. null means that a value is unknown or was not measured.
    """

    __pydantic_config__ = PUBLISHED

    version: Literal[1] = VERSION
    """Version of this layout. Fields may be added without a new version."""
    source: str
    """The dense model, as the recipe names it."""
    points: tuple[PointSummary, ...]
    """The points of the sweep; the first is the dense model's."""
    comparisons: tuple[Comparison, ...]
    """Every point against the dense model's."""
    fronts: tuple[Front, ...]
    """Every quality against every cost, with the Pareto front."""
