"""The points of a sweep: what was compressed, at which cost, and its metrics."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompress.reporting.metric import PUBLISHED, Metric, Summary

DENSE = "dense"


@dataclass(frozen=True)
class PointSummary:
    """One variant at one keep_ratio."""

    __pydantic_config__ = PUBLISHED

    variant: str
    """`dense`, or the name of a method or variant."""
    keep_ratio: float
    """Share of the selected parameters to keep, as the recipe gives it."""
    kept: float
    """Share of the selected parameters that the model kept."""
    seconds: float
    """Time of calibration, planning and factorization, as if the point had been made alone.
    Calibration includes gradients if any variant of the sweep needs them."""
    memory: int | None
    """Peak memory of the process in bytes while it made the point; null where unknown."""
    text: str
    """The calibration text; empty where none was used."""
    metrics: tuple[Summary, ...]
    baseline: tuple[Summary, ...] = ()
    """Speeds of the dense model, measured in alternation with this point's speeds; empty for the
    dense model's own point."""


@dataclass(frozen=True)
class SweepPoint(PointSummary):
    """A point whose metrics have their samples."""

    metrics: tuple[Metric, ...]
    baseline: tuple[Metric, ...] = ()

    @property
    def label(self) -> str:
        """What reports call the point."""
        return label(self.variant, self.keep_ratio)


def label(variant: str, keep_ratio: float) -> str:
    """What reports call a point: `dense`, or the variant and its keep_ratio."""
    return DENSE if variant == DENSE else f"{variant} at {keep_ratio:g}"
