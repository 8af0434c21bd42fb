"""The points of a sweep: what was made, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrcompress.reporting.metric import PUBLISHED, Metric, Summary

DENSE = "dense"


@dataclass(frozen=True)
class PointSummary:
    """One variant at one keep_ratio."""

    __pydantic_config__ = PUBLISHED

    variant: str
    """`dense`, or the name of a method or variant."""
    keep_ratio: float
    """As it was asked for."""
    kept: float
    """Share of the selected parameters that was kept."""
    seconds: float
    """Of calibration, choices and factorization, as if the point had been made alone but for
    gradients that another variant needed."""
    memory: int | None
    """Peak of the process in bytes while it made the point; null where unknown."""
    text: str
    """What it was calibrated on; empty where that was nothing."""
    metrics: tuple[Summary, ...]
    baseline: tuple[Summary, ...] = ()
    """Speeds of the dense model, measured in turn with those among the metrics; none for the dense
    model's own point."""


@dataclass(frozen=True)
class SweepPoint(PointSummary):
    """A point whose metrics have their samples."""

    metrics: tuple[Metric, ...]
    baseline: tuple[Metric, ...] = ()

    @property
    def label(self) -> str:
        return label(self.variant, self.keep_ratio)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> SweepPoint:
        parts = ("metrics", "baseline")
        metrics = {part: tuple(Metric(**metric) for metric in found[part]) for part in parts}
        return cls(**{**found, **metrics})


def label(variant: str, keep_ratio: float) -> str:
    return DENSE if variant == DENSE else f"{variant} at {keep_ratio:g}"
