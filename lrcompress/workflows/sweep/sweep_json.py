"""What sweep.json holds."""

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

    Numbers that are not finite are the texts NaN, Infinity and -Infinity: JSON has no numbers for
    them, and null says that something is unknown or was not measured.
    """

    __pydantic_config__ = PUBLISHED

    version: Literal[1] = VERSION
    """Of this schema. Another one is another layout; fields may be added within one."""
    source: str
    """The dense model, as the recipe names it."""
    points: tuple[PointSummary, ...]
    """The first is the dense model's."""
    comparisons: tuple[Comparison, ...]
    """Of every point with the dense model's."""
    fronts: tuple[Front, ...]
    """Every quality against every cost."""
