"""The nouns that stages exchange, and the interfaces of methods and rank policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


Role = Literal["gate", "up", "gate_up", "down"]
Statistic = Literal["second_moment", "gradient_moment"]
Form = Literal["factored", "pivoted"]


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer that may be factorized: y = W x (+ b), W of shape (out, in).

    Linears of one `ffn` belong together; those of one `input_group` read the same input. Where the
    FFN is one of several experts, each of which reads some of the tokens, `mixture` names all.
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
        """Exact count at `rank`, or dense where that is None; bias included.

        The factored form stores r(m + n) numbers, the pivoted form r(m + n - r).
        """
        if rank is None:
            return self.dense_parameters
        saved = rank * rank if form == "pivoted" else 0
        return rank * (self.in_features + self.out_features) - saved + self.bias_parameters

    def saves(self, rank: int, form: Form) -> bool:
        return self.parameters(rank, form) < self.dense_parameters

    def narrowed(self, width: int) -> LinearSpec:
        """The same linear in an FFN of `width` intermediate channels."""
        if self.role == "down":
            return replace(self, in_features=width)
        return replace(self, out_features=2 * width if self.role == "gate_up" else width)


@dataclass(frozen=True)
class Statistics:
    """What calibration measured about one linear.

    `second_moment` is the mean of x xᵀ over calibration tokens, shape (in, in);
    `gradient_moment` that of g gᵀ, shape (out, out), g being what `drawn_scores` of a whole sample
    are by the chain rule in the linear's output.
    """

    second_moment: Tensor | None = None
    gradient_moment: Tensor | None = None


@dataclass(frozen=True)
class FFN:
    """The linears of one FFN with weights W (out, in), biases and statistics by linear name.

    `whole` says that none of the FFN's linears was left out of the selection.
    """

    name: str
    linears: tuple[LinearSpec, ...]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor | None]
    statistics: Mapping[str, Statistics]
    whole: bool

    @property
    def down(self) -> LinearSpec | None:
        """The linear that reads the intermediate channels, if all that make them are here."""
        found = [linear for linear in self.linears if linear.role == "down"]
        return found[0] if found and self.whole else None

    @property
    def dense_parameters(self) -> int:
        return sum(linear.dense_parameters for linear in self.linears)


@dataclass(frozen=True)
class Factors:
    """W ~ B A with A of shape (rank, in) and B of shape (out, rank).

    `error` and `energy` are ‖W - BA‖² and ‖W‖² in the metric of the method that made them,
    `spectrum` the squared singular values of W there, descending, as many as are known.
    """

    A: Tensor
    B: Tensor
    error: float
    energy: float
    spectrum: Tensor


@dataclass(frozen=True)
class ChannelOrder:
    """Intermediate channels in the order in which they are kept.

    `errors[k]` is the estimated loss with the first k kept and the others reconstructed from
    them; it has one entry more than `channels`.
    """

    channels: Tensor
    errors: Tensor


class Decomposition(Protocol):
    """Of one weight W (out, in) by one method: what factors of many ranks are taken from."""

    def serves(self, rank: int) -> bool:
        """Whether a decomposition for that rank alone would give the same factors, bit for bit."""
        ...

    def factors(self, weight: Tensor, rank: int) -> Factors:
        """The factors of W, which is given again so that nothing of its size has to be kept."""
        ...


class Method(Protocol):
    """A compression method: a frozen dataclass whose fields are its recipe keys.

    `narrows`: it chooses intermediate channels to keep, through `order` and `narrow`.
    `truncates`: it replaces linears by low-rank factors, through `error_curve` and `decompose`.
    `estimates_loss`: its squared errors are twice an estimate of the divergence from dense.
    """

    requires: ClassVar[frozenset[Statistic]]
    narrows: ClassVar[bool]
    truncates: ClassVar[bool]

    @property
    def estimates_loss(self) -> bool: ...

    def error_curve(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Squared error at every rank 0 .. min(out, in) in the method's metric; float64."""
        ...

    def decompose(self, weight: Tensor, statistics: Statistics, rank: int) -> Decomposition:
        """What serves `rank`, and any other rank that it can."""
        ...

    def order(self, ffn: FFN) -> ChannelOrder: ...

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN: ...
