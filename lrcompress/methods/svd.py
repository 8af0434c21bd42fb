"""Truncated SVD in three metrics of the input: none, diagonal, and the full second moment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lrcompress.methods.linalg import (
    TruncatedSVD,
    WeightedNorm,
    damped,
    decompose,
    shrunk,
    spectrum,
    to_float64,
)
from lrcompress.methods.types import FFN, ChannelOrder, Statistic, Statistics
from lrcompress.runtime.errors import InputError

# of the moments of inputs and of output gradients; chosen on text apart from all that is reported
SHRINKAGE, OUTPUT_SHRINKAGE = 0.1, 0.6


@dataclass(frozen=True)
class ScaledSVD:
    """min over rank-r matrices of ‖G^1/2 (W - BA) X^1/2‖²; subclasses say what X and G are."""

    requires: ClassVar[frozenset[Statistic]] = frozenset()
    narrows: ClassVar[bool] = False
    truncates: ClassVar[bool] = True
    estimates_loss: ClassVar[bool] = False

    def metric(self, statistics: Statistics) -> WeightedNorm | None:
        """X of shape (in, in), or its diagonal (in,); None for the identity."""
        return None

    def output_metric(self, statistics: Statistics) -> WeightedNorm | None:
        """G of shape (out, out); None for the identity."""
        return None

    def order(self, ffn: FFN) -> ChannelOrder:
        raise TypeError(f"{type(self).__name__} keeps all channels")

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        raise TypeError(f"{type(self).__name__} keeps all channels")

    def error_curve(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Squared error in the metrics at every rank 0 .. min(out, in)."""
        energies = spectrum(weight, self.metric(statistics), self.output_metric(statistics))
        tails = energies.flip(0).cumsum(0).flip(0)
        return torch.cat([tails, tails.new_zeros(1)])

    def decompose(self, weight: Tensor, statistics: Statistics, rank: int) -> TruncatedSVD:
        """The terms of W (out, in) in the metrics: its factors are the best ones of their rank.

        Raises InputError where rank is not in 1 .. min(out, in).
        """
        if not 1 <= rank <= min(weight.shape):
            raise InputError(f"rank {rank} is not in 1..{min(weight.shape)}")
        return decompose(weight, self.metric(statistics), self.output_metric(statistics), rank)


@dataclass(frozen=True)
class PlainSVD(ScaledSVD):
    """X = I: the nearest low-rank matrix, whatever the layer's input looks like."""


@dataclass(frozen=True)
class DiagonalSVD(ScaledSVD):
    """X = diag(E x²)^alpha: input channels weighted by their size (ASVD, arXiv 2312.05821).

    ASVD scales W by (mean |x|)^alpha; here the root mean square stands for the mean size.
    """

    requires: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    alpha: float = 0.5
    damping: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 2:
            raise InputError(f"alpha {self.alpha} is not in 0..2")
        _check_damping(self.damping)

    def metric(self, statistics: Statistics) -> WeightedNorm:
        squares = to_float64(_second_moment(statistics)).diagonal()
        mean = squares.mean()
        if mean == 0:
            return WeightedNorm(torch.ones_like(squares))
        return WeightedNorm((squares + self.damping * mean) ** self.alpha)


@dataclass(frozen=True)
class WhitenedSVD(ScaledSVD):
    """X = E x xᵀ: least squared error of the layer's output (SVD-LLM, arXiv 2403.07378).

    Damping is added to the diagonal of X relative to its mean, which keeps the square root
    defined for a rank-deficient X; no Cholesky factorization is involved.
    """

    requires: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    damping: float = 1e-6

    def __post_init__(self) -> None:
        _check_damping(self.damping)

    @cached_property
    def _metrics(self) -> WeakIdKeyDictionary:
        """By moment: the same one comes again for gate, up and every width."""
        return WeakIdKeyDictionary()

    def _metric(self, moment: Tensor, damping: float, shrinkage: float = 0.0) -> WeightedNorm:
        known: dict[tuple[float, float], WeightedNorm]
        known = self._metrics.setdefault(moment, {})  # type: ignore[no-untyped-call]
        if (key := (damping, shrinkage)) not in known:
            known[key] = WeightedNorm(damped(shrunk(to_float64(moment), shrinkage), damping))
        return known[key]

    def metric(self, statistics: Statistics) -> WeightedNorm:
        return self._metric(_second_moment(statistics), self.damping)


@dataclass(frozen=True)
class FisherSVD(WhitenedSVD):
    """X = E x xᵀ and G = E g gᵀ: least estimated rise of the loss itself.

    g is what `drawn_scores` of the logits are by the chain rule in the layer's output, so G
    Kronecker X is the layer's Fisher matrix in K-FAC's factorization (arXiv 1503.05671), and the
    squared error is twice the second-order estimate of the divergence from the dense model's
    predictions: comparable from one linear to another. `whitened` is the one-sided case G = I.

    Both moments are shrunk towards their diagonals (as Ledoit and Wolf 2004 do with covariances):
    correlations of other text than the calibration's are weaker.
    """

    requires: ClassVar[frozenset[Statistic]] = frozenset({"second_moment", "gradient_moment"})
    estimates_loss: ClassVar[bool] = True
    damping: float = 1e-3
    output_damping: float = 1e-2
    shrinkage: float = SHRINKAGE
    output_shrinkage: float = OUTPUT_SHRINKAGE

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_damping(self.output_damping)
        check_shrinkage(self.shrinkage)
        check_shrinkage(self.output_shrinkage)

    def metric(self, statistics: Statistics) -> WeightedNorm:
        return self._metric(_second_moment(statistics), self.damping, self.shrinkage)

    def output_metric(self, statistics: Statistics) -> WeightedNorm:
        if statistics.gradient_moment is None:
            raise InputError("this method needs the gradients of the output: calibrate first")
        gradient = statistics.gradient_moment
        return self._metric(gradient, self.output_damping, self.output_shrinkage)


def _second_moment(statistics: Statistics) -> Tensor:
    if statistics.second_moment is None:
        raise InputError(
            "this method needs the second moment of the layer's input: calibrate first"
        )
    return statistics.second_moment


def _check_damping(damping: float) -> None:
    if not 0 < damping <= 1:
        raise InputError(f"damping {damping} is not in (0, 1]")


def check_shrinkage(shrinkage: float) -> None:
    if not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage {shrinkage} is not in [0, 1]")
