"""Data that calibration, methods and compression exchange, and the interface of methods."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


Role = Literal["gate", "up", "gate_up", "down"]
Statistic = Literal["second_moment", "gradient_moment"]
Form = Literal["factored", "pivoted"]
LayerForm = Literal["factored", "pivoted", "narrowed"]


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer that may be factorized: y = W x (+ b), W of shape (out, in).

    `ffn` names the FFN of the linear. Linears of one `input_group` read the same input. If the FFN
    is an expert of a mixture, which reads only some of the tokens, `mixture` names the mixture.
    `channelwise` says that all between the linears of the FFN acts on each intermediate channel by
    itself, so that it can be narrowed.
    """

    name: str
    block: int
    role: Role
    in_features: int
    out_features: int
    bias: bool
    input_group: str
    ffn: str
    mixture: str = ""
    channelwise: bool = True

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def dense_parameters(self) -> int:
        return self.in_features * self.out_features + self.bias_parameters

    @property
    def bias_parameters(self) -> int:
        return self.out_features if self.bias else 0

    @property
    def break_even_rank(self) -> float:
        """The rank at which two factors hold as many numbers as W: mn / (m + n)."""
        return self.in_features * self.out_features / (self.in_features + self.out_features)

    def parameters(self, rank: int | None, form: Form) -> int:
        """Exact parameter count at `rank`, or of the dense linear if `rank` is None; with bias.

        The factored form stores r(m + n) numbers, the pivoted form r(m + n - r).
        """
        if rank is None:
            return self.dense_parameters
        saved = rank * rank if form == "pivoted" else 0
        return rank * (self.in_features + self.out_features) - saved + self.bias_parameters

    def saves(self, rank: int, form: Form) -> bool:
        """Whether the low-rank form has fewer parameters than the dense linear."""
        return self.parameters(rank, form) < self.dense_parameters

    def narrowed(self, width: int) -> LinearSpec:
        """The same linear in an FFN of `width` intermediate channels."""
        if self.role == "down":
            return replace(self, in_features=width)
        return replace(self, out_features=2 * width if self.role == "gate_up" else width)


class OutlierShares(NamedTuple):
    """The shares of Σ ‖x‖² and of Σ ‖g‖² that outlier tokens have beyond their limits, in [0, 1].

    None where inputs x or gradients g were not measured.
    """

    inputs: float | None = None
    gradients: float | None = None


NOT_MEASURED = OutlierShares()


@dataclass(frozen=True)
class Statistics:
    """Calibration statistics of one linear.

    `second_moment` (in, in) is the mean of x xᵀ over calibration tokens. `gradient_moment`
    (out, out) is the mean of g gᵀ, where g is the gradient of the linear's output, from
    `sample_score_gradients` of the logits of a whole sample. Both are of most tokens: the few with
    far larger x or g are scaled down. What they lack then is the `outlier_moment` (in, in), a mean
    over all tokens too; it is None where there are no outliers. `outlier_shares` tell how much
    of the energy of x and g scaling down took away.
    """

    second_moment: Tensor | None = None
    gradient_moment: Tensor | None = None
    outlier_moment: Tensor | None = None
    outlier_shares: OutlierShares = NOT_MEASURED


@dataclass(frozen=True)
class FFN:
    """The selected linears of one FFN; weights W (out, in), biases and statistics by linear name.

    `whole` says that all linears of the FFN are selected.
    """

    name: str
    linears: tuple[LinearSpec, ...]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor | None]
    statistics: Mapping[str, Statistics]
    whole: bool

    @property
    def down(self) -> LinearSpec | None:
        """down_proj, which reads the intermediate channels; None if the FFN cannot be narrowed."""
        downs = [linear for linear in self.linears if linear.role == "down" and linear.channelwise]
        return downs[0] if downs and self.whole else None

    @property
    def dense_parameters(self) -> int:
        return sum(linear.dense_parameters for linear in self.linears)


@dataclass(frozen=True)
class Factors:
    """W ~ B A with A of shape (rank, in) and B of shape (out, rank).

    `error` and `energy` are ‖W - BA‖² and ‖W‖² in the metric of the method. `spectrum` (k,) holds
    the k largest squared singular values of W in that metric, descending.
    """

    A: Tensor
    B: Tensor
    error: float
    energy: float
    spectrum: Tensor


@dataclass(frozen=True)
class ChannelOrder:
    """Intermediate channels (width,) in the order in which they are kept.

    `errors` (width + 1,) holds at k the estimated loss when the first k channels are kept and the
    others are reconstructed from them; NaN where the method estimates none. `grams` has, by the
    widths that were asked for, the Gram matrix (out, out) of down_proj with the channels of that
    width: its eigenvalues are the energies of down_proj in the method's metric.
    """

    channels: Tensor
    errors: Tensor
    grams: Mapping[int, Tensor] = field(default_factory=dict)


# width -> name of a linear -> squared errors at every rank 0 .. min(out, in) of the narrowed linear
NarrowedCurves = Mapping[int, Mapping[str, "Tensor"]]


class Decomposition(Protocol):
    """A decomposition of one weight W (out, in), which gives factors of one or more ranks."""

    def serves(self, rank: int) -> bool:
        """Whether factors at `rank` equal those of a decomposition for it alone, bit for bit."""
        ...

    def factors(self, weight: Tensor, rank: int) -> Factors:
        """Factors at `rank`; `weight` is W again, so that the decomposition need not hold it."""
        ...


class Method(Protocol):
    """A compression method: a frozen dataclass whose fields are its recipe keys.

    `requires`: the statistics that it needs.
    `narrows`: it chooses intermediate channels to keep, with `order` and `narrow`.
    `truncates`: it replaces linears by low-rank factors, with `error_curve` and `decompose`.
    `estimates_errors`: it tells the error of every rank and width; otherwise the errors of widths
    are NaN, and policies that need errors are refused.
    `estimates_loss`: its squared errors are twice an estimate of the divergence from the dense
    model.
    """

    requires: ClassVar[frozenset[Statistic]]
    narrows: ClassVar[bool]
    truncates: ClassVar[bool]
    estimates_errors: ClassVar[bool]

    @property
    def estimates_loss(self) -> bool: ...

    def error_curve(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Squared error at every rank 0 .. min(out, in) in the method's metric; float64."""
        ...

    def decompose(self, weight: Tensor, statistics: Statistics, rank: int) -> Decomposition:
        """A decomposition of W (out, in) that serves at least `rank`."""
        ...

    def order(self, ffn: FFN, widths: Collection[int] = ()) -> ChannelOrder:
        """All channels of `ffn`, in the order in which they are kept.

        `widths` are those at which `narrowed_curves` will be asked for.
        """
        ...

    def narrowed_curves(
        self, ffn: FFN, order: ChannelOrder, widths: Collection[int]
    ) -> NarrowedCurves:
        """The error curve of each linear of `ffn` at each of `widths`, which `order` was asked for.

        At the full width there may be those that the others give for nothing. Only methods that
        both narrow and truncate need it.
        """
        ...

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        """`ffn` with only `channels` (width,): its weights, biases and statistics."""
        ...
