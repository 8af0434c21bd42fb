"""Candidates for each FFN, the plan chosen among them, and the interface of rank policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from lrcompress.methods.types import Form, LinearSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class RankCurve:
    """Exact parameter count and estimated loss of one linear at each rank; arrays (options,).

    Ranks ascend. The last option, with 0 in `ranks`, is the dense linear, which has no loss.
    `costs` are what the options cost where the model runs, None where that is their parameters.
    """

    name: str
    ranks: np.ndarray
    parameters: np.ndarray
    errors: np.ndarray
    costs: np.ndarray | None = None

    @property
    def prices(self) -> np.ndarray:
        """What the loss of an option is weighed against: its cost."""
        return self.parameters if self.costs is None else self.costs


@dataclass(frozen=True)
class WidthOption:
    """One width of an FFN: the estimated loss of narrowing to it, and the curves of its linears.

    `width` is None where all channels stay. `curves` are in the order of the FFN's linears.
    """

    width: int | None
    error: float
    curves: tuple[RankCurve, ...]


@dataclass(frozen=True)
class Candidates:
    """Every way in which a method could compress one FFN.

    `ffn` is its name, `linears` its linears before compression, and `shapes` its widths.
    `factor` is the measured loss of probes of its block, divided by their estimated loss.
    """

    ffn: str
    linears: tuple[LinearSpec, ...]
    shapes: tuple[WidthOption, ...]
    factor: float = 1.0

    @property
    def dense_parameters(self) -> int:
        return sum(linear.dense_parameters for linear in self.linears)


@dataclass(frozen=True)
class Budget:
    """Exactly one of: a rank for every linear, or the share of the selected parameters to keep."""

    rank: int | None = None
    keep_ratio: float | None = None


@dataclass(frozen=True)
class Plan:
    """Linear name -> rank, and FFN name -> width. Absent linears stay dense, absent FFNs full."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)

    def spec(self, linear: LinearSpec) -> LinearSpec:
        """`linear` with its shape under this plan."""
        width = self.widths.get(linear.ffn)
        return linear if width is None else linear.narrowed(width)

    def parameters(self, linear: LinearSpec, form: Form) -> int:
        """Exact parameter count of `linear` under this plan, bias included."""
        return self.spec(linear).parameters(self.ranks.get(linear.name), form)


class Allocator(Protocol):
    """A rank policy: a frozen dataclass whose fields are its recipe keys.

    It sees only parameter counts and estimated losses. If `needs_errors` is false, the errors of
    ranks are NaN.
    """

    needs_errors: ClassVar[bool]

    def allocate(self, candidates: Sequence[Candidates], budget: Budget) -> Plan:
        """The plan for the FFNs of a model, one of `candidates` for each. Raises InputError where
        the policy cannot meet such a budget."""
        ...
