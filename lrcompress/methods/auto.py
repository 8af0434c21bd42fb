"""Narrowing and low rank combined: the default method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrcompress.methods.linalg import energies, error_curve, nested_grams, to_float64
from lrcompress.methods.narrowing import rows_of
from lrcompress.methods.nystrom import Nystrom
from lrcompress.methods.svd import FisherSVD
from lrcompress.methods.types import FFN, ChannelOrder, LinearSpec, NarrowedCurves


@dataclass(frozen=True)
class Auto(FisherSVD):
    """Narrows with `Nystrom`, then truncates what is left with `FisherSVD`.

    All errors estimate the rise of the loss. So the policy can choose for each FFN between dense,
    narrowed, low rank, and both.
    """

    narrows: ClassVar[bool] = True
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._nystrom()  # checks `ridge`

    def _nystrom(self) -> Nystrom:
        return Nystrom(
            ridge=self.ridge,
            shrinkage=self.shrinkage,
            output_shrinkage=self.output_shrinkage,
        )

    def order(self, ffn: FFN, widths: Collection[int] = ()) -> ChannelOrder:
        return self._nystrom().order(ffn, widths if _shares_products(ffn) else ())

    def narrowed_curves(
        self, ffn: FFN, order: ChannelOrder, widths: Collection[int]
    ) -> NarrowedCurves:
        """As `error_curve` of each linear after `narrow`, from products that all widths share.

        Dampings are left out where they would take products of their own: down_proj's, which are
        small beside the shrinkage, and the dependence of the others on the width. Gate and up have
        their curves at the full width too. An FFN narrower than its hidden states has smaller
        matrices at every width, and shares nothing.
        """
        if not _shares_products(ffn):
            return {
                width: self._curves(self.narrow(ffn, order.channels[:width])) for width in widths
            }
        curves = defaultdict[int, dict[str, Tensor]](dict)
        for linear in ffn.linears:
            is_down = linear is ffn.down
            grams = order.grams.items() if is_down else self._grams(ffn, linear, order)
            for width, gram in grams:
                full_rank = linear.narrowed(width).full_rank
                curves[width][linear.name] = error_curve(energies(gram)[:full_rank])
        return curves

    def _curves(self, ffn: FFN) -> dict[str, Tensor]:
        return {
            linear.name: self.error_curve(ffn.weights[linear.name], ffn.statistics[linear.name])
            for linear in ffn.linears
        }

    def _grams(
        self, ffn: FFN, linear: LinearSpec, order: ChannelOrder
    ) -> Iterator[tuple[int, Tensor]]:
        """Lᵀ W_Jᵀ G_JJ W_J L (in, in) of gate or up for the channels J of each width; X = L Lᵀ."""
        statistics = ffn.statistics[linear.name]
        widths = [*sorted(order.grams), len(order.channels)]
        scaled = self.metric(statistics).scale(to_float64(ffn.weights[linear.name]).T).T
        bounds = zip([0, *widths], widths, strict=False)
        groups = [rows_of(linear, order.channels[start:end]) for start, end in bounds]
        metric = self.output_metric(statistics).matrix
        return zip(widths, nested_grams(scaled, metric, groups), strict=True)

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        return self._nystrom().narrow(ffn, channels)


def _shares_products(ffn: FFN) -> bool:
    """Whether the widths of `ffn` share their products: the FFN is wider than its hidden states."""
    down = ffn.down
    return down is not None and down.in_features >= down.out_features
