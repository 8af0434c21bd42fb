"""Truncated SVD in weighted norms: plain, diagonal, whitened, and two-sided (Fisher)."""

from __future__ import annotations

from collections.abc import Collection
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
    error_curve,
    shrunk,
    spectrum,
    to_float64,
    with_outliers,
)
from lrcompress.methods.types import FFN, ChannelOrder, NarrowedCurves, Statistic, Statistics
from lrcompress.runtime.errors import InputError

# defaults for the moments of inputs and of output gradients, tuned on text that no report uses
SHRINKAGE, OUTPUT_SHRINKAGE = 0.2, 0.6


@dataclass(frozen=True)
class ScaledSVD:
    """Minimizes ‖G^1/2 (W - BA) X^1/2‖² over rank-r matrices BA; subclasses define X and G."""

    requires: ClassVar[frozenset[Statistic]] = frozenset()
    narrows: ClassVar[bool] = False
    truncates: ClassVar[bool] = True
    estimates_errors: ClassVar[bool] = True
    estimates_loss: ClassVar[bool] = False

    def metric(self, statistics: Statistics) -> WeightedNorm | None:
        """The input metric X (in, in), or its diagonal (in,); None for the identity."""
        return None

    def output_metric(self, statistics: Statistics) -> WeightedNorm | None:
        """The output metric G (out, out); None for the identity."""
        return None

    def order(self, ffn: FFN, widths: Collection[int] = ()) -> ChannelOrder:
        raise TypeError(f"{type(self).__name__} keeps all channels")

    def narrowed_curves(
        self, ffn: FFN, order: ChannelOrder, widths: Collection[int]
    ) -> NarrowedCurves:
        raise TypeError(f"{type(self).__name__} keeps all channels")

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        raise TypeError(f"{type(self).__name__} keeps all channels")

    def error_curve(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Squared error in the metrics at every rank 0 .. min(out, in); float64."""
        return error_curve(
            spectrum(weight, self.metric(statistics), self.output_metric(statistics))
        )

    def decompose(self, weight: Tensor, statistics: Statistics, rank: int) -> TruncatedSVD:
        """The SVD of W (out, in) in the metrics: its factors are optimal at their rank.

        Raises InputError where rank is not in 1 .. min(out, in).
        """
        if not 1 <= rank <= min(weight.shape):
            raise InputError(f"rank {rank} is not in 1..{min(weight.shape)}")
        return decompose(weight, self.metric(statistics), self.output_metric(statistics), rank)


@dataclass(frozen=True)
class PlainSVD(ScaledSVD):
    """X = G = I: the low-rank matrix nearest to W, without regard to the layer's input."""


@dataclass(frozen=True)
class DiagonalSVD(ScaledSVD):
    """X = diag(E x²)^alpha: input channels weighted by their size (ASVD, arXiv 2312.05821).

    ASVD scales W by (mean |x|)^alpha; here the root mean square replaces the mean of |x|.
    """

    requires: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    alpha: float = 0.5
    damping: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 2:
            raise InputError(f"alpha {self.alpha} is not in 0..2")
        _check_damping(self.damping)

    def metric(self, statistics: Statistics) -> WeightedNorm:
        moment = to_float64(_second_moment(statistics))
        squares = with_outliers(moment, statistics.outlier_moment).diagonal()
        mean = squares.mean()
        if mean == 0:
            return WeightedNorm(torch.ones_like(squares))
        return WeightedNorm((squares + self.damping * mean) ** self.alpha)


@dataclass(frozen=True)
class WhitenedSVD(ScaledSVD):
    """X = E x xᵀ, G = I: least squared error of the layer's output (SVD-LLM, arXiv 2403.07378).

    `damping` times the mean of the diagonal of X is added to the diagonal. So a rank-deficient X
    has a square root as well.
    """

    requires: ClassVar[frozenset[Statistic]] = frozenset({"second_moment"})
    damping: float = 1e-6

    def __post_init__(self) -> None:
        _check_damping(self.damping)

    @cached_property
    def _metrics(self) -> WeakIdKeyDictionary:
        """moment -> its metrics: gate, up and every width use the same moment tensor."""
        return WeakIdKeyDictionary()

    def _metric(
        self,
        moment: Tensor,
        damping: float,
        shrinkage: float = 0.0,
        outliers: Tensor | None = None,
    ) -> WeightedNorm:
        cached: dict[tuple[float, float], WeightedNorm]
        cached = self._metrics.setdefault(moment, {})  # type: ignore[no-untyped-call]
        if (key := (damping, shrinkage)) not in cached:
            bulk = damped(shrunk(to_float64(moment), shrinkage), damping)
            cached[key] = WeightedNorm(with_outliers(bulk, outliers))
        return cached[key]

    def metric(self, statistics: Statistics) -> WeightedNorm:
        moment, outliers = _second_moment(statistics), statistics.outlier_moment
        return self._metric(moment, self.damping, outliers=outliers)


@dataclass(frozen=True)
class FisherSVD(WhitenedSVD):
    """X = E x xᵀ and G = E g gᵀ: least estimated rise of the loss.

    g is the gradient of the layer's output, from `sample_score_gradients` of the logits by the
    chain rule. G ⊗ X is then the layer's Fisher matrix in K-FAC's factorization
    (arXiv 1503.05671). The squared error is twice the second-order estimate of the divergence from
    the dense model's predictions, so errors of different linears compare. `WhitenedSVD` is the
    one-sided case G = I.

    Both moments are shrunk towards their diagonals (as Ledoit and Wolf 2004 do with covariances),
    because correlations on other text are weaker than on the calibration text.
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
        moment, outliers = _second_moment(statistics), statistics.outlier_moment
        return self._metric(moment, self.damping, self.shrinkage, outliers)

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
