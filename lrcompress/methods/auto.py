"""Narrowing and low rank together: the default method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrcompress.methods.nystrom import Nystrom
from lrcompress.methods.svd import FisherSVD
from lrcompress.methods.types import FFN, ChannelOrder


@dataclass(frozen=True)
class Auto(FisherSVD):
    """Narrowing and two-sided truncation of what is left: the policy chooses per FFN.

    All of their errors estimate the rise of the loss, so that dense, narrowed, low rank, and
    narrowed and low rank compare at one multiplier.
    """

    narrows: ClassVar[bool] = True
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self._nystrom()

    def _nystrom(self) -> Nystrom:
        return Nystrom(
            ridge=self.ridge,
            shrinkage=self.shrinkage,
            output_shrinkage=self.output_shrinkage,
        )

    def order(self, ffn: FFN) -> ChannelOrder:
        return self._nystrom().order(ffn)

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        return self._nystrom().narrow(ffn, channels)
