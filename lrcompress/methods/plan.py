"""What could be done to every FFN, what is to be, and the interface of rank policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from lrcompress.methods.types import Form, LinearSpec

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class RankCurve:
    """The options of one linear: exact parameter count and estimated loss at each rank.

    Ranks ascend; the last option, rank 0 in the array, is to stay dense at no loss.
    """

    name: str
    ranks: np.ndarray
    parameters: np.ndarray
    errors: np.ndarray


@dataclass(frozen=True)
class WidthOption:
    """One width of an FFN: what narrowing to it costs, and the options of its linears then.

    `width` is None where all channels stay.
    """

    width: int | None
    error: float
    curves: tuple[RankCurve, ...]


@dataclass(frozen=True)
class Candidates:
    """Every way in which a method could shrink one FFN.

    `factor` is what probes of its block cost over their estimates.
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
    """What may be kept: one rank for every linear, or a share of the selected parameters."""

    rank: int | None = None
    keep_ratio: float | None = None


@dataclass(frozen=True)
class Plan:
    """Linear name -> rank, FFN name -> width. What is absent stays dense, or wide."""

    ranks: Mapping[str, int] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)

    def spec(self, linear: LinearSpec) -> LinearSpec:
        """`linear` with the shape that it has under this plan."""
        width = self.widths.get(linear.ffn)
        return linear if width is None else linear.narrowed(width)

    def parameters(self, linear: LinearSpec, form: Form) -> int:
        """Exact parameter count of `linear` under this plan, bias included."""
        return self.spec(linear).parameters(self.ranks.get(linear.name), form)


class Allocator(Protocol):
    """A rank policy: a frozen dataclass whose fields are its recipe keys.

    It sees parameter counts and estimated losses only. Where `needs_errors` is false the
    errors may be missing (NaN) for methods that would have to compute them.
    """

    needs_errors: ClassVar[bool]

    def allocate(self, choices: Sequence[Candidates], budget: Budget) -> Plan: ...
