"""The points of a sweep: what was made, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrcompress.protocols import Metric

DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """One variant at one keep_ratio.

    `seconds` of calibration, choices and factorization, as if it had been made alone but for
    gradients that another variant needed; `memory`, the peak in bytes of resident memory; `text`
    says what it was calibrated on, if anything. `baseline` are the speeds of the dense model,
    measured in turn with those among `metrics`; the dense model's own point has none.
    """

    variant: str
    keep_ratio: float
    kept: float
    seconds: float
    memory: int | None
    text: str
    metrics: tuple[Metric, ...]
    baseline: tuple[Metric, ...] = ()

    @property
    def label(self) -> str:
        return label(self.variant, self.keep_ratio)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Point:
        parts = ("metrics", "baseline")
        metrics = {part: tuple(Metric(**metric) for metric in found[part]) for part in parts}
        return cls(**{**found, **metrics})


def label(variant: str, keep_ratio: float) -> str:
    return DENSE if variant == DENSE else f"{variant} at {keep_ratio:g}"
