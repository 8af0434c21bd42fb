"""The nouns that stages exchange, and the interfaces of factorizers and allocators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

Role = Literal["gate", "up", "gate_up", "down"]
Statistic = Literal["second_moment"]


class InputError(ValueError):
    """What the user gave cannot be used: one sentence that names the value and the remedy."""


class MachineError(RuntimeError):
    """The machine failed (disk full, no memory): one sentence that says what and where."""


class Progress(Protocol):
    """Wraps an iterable and reports how far its consumption has come."""

    def __call__(
        self, items: Iterable[T], description: str, total: int | None = None
    ) -> Iterable[T]: ...


def silent(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The `Progress` that reports nothing."""
    return items


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer that may be factorized: y = W x (+ b), W of shape (out, in)."""

    name: str
    block: int
    role: Role
    in_features: int
    out_features: int
    bias: bool
    input_group: str

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

    def parameters(self, rank: int | None) -> int:
        """Exact count at `rank`, or dense where that is None; bias included."""
        if rank is None:
            return self.dense_parameters
        return rank * (self.in_features + self.out_features) + self.bias_parameters


@dataclass(frozen=True)
class Statistics:
    """What calibration measured about one linear; matrices are float64.

    `second_moment` is the mean of x xᵀ over calibration tokens, shape (in, in).
    """

    second_moment: Tensor | None = None


@dataclass(frozen=True)
class Factors:
    """W ~ B A with A of shape (rank, in) and B of shape (out, rank).

    `error` and `energy` are ‖W - BA‖² and ‖W‖² in the metric of the method that made them.
    """

    A: Tensor
    B: Tensor
    error: float
    energy: float


class Factorizer(Protocol):
    """A factorization method: a frozen dataclass whose fields are its recipe keys."""

    requires: ClassVar[frozenset[Statistic]]

    def error_curve(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Squared error at every rank 0 .. min(out, in) in the method's metric; float64."""
        ...

    def factorize(self, weight: Tensor, statistics: Statistics, rank: int) -> Factors: ...


@dataclass(frozen=True)
class Budget:
    """What the user asked for: one rank for every linear, or a share of the parameters."""

    rank: int | None = None
    keep_ratio: float | None = None
    rank_multiple: int = 8


@dataclass(frozen=True)
class RankPlan:
    """Linear name -> rank. A linear that is absent stays dense."""

    ranks: Mapping[str, int]

    def parameters(self, linear: LinearSpec) -> int:
        """Exact parameter count of `linear` under this plan, bias included."""
        return linear.parameters(self.ranks.get(linear.name))


class Allocator(Protocol):
    """A rank policy: a frozen dataclass whose fields are its recipe keys."""

    def allocate(self, linears: Sequence[LinearSpec], budget: Budget) -> RankPlan: ...


@dataclass(frozen=True)
class Metric:
    """One measured number of one model, with everything needed to repeat the measurement."""

    model: str
    name: str
    value: float
    unit: str
    higher_is_better: bool
    conditions: Mapping[str, object] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
