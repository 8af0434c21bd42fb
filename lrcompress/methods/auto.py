"""Narrowing and low rank combined: the default method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrcompress.methods.nystrom import Nystrom
from lrcompress.methods.svd import FisherSVD
from lrcompress.methods.types import FFN, ChannelOrder


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

    def order(self, ffn: FFN) -> ChannelOrder:
        return self._nystrom().order(ffn)

    def narrow(self, ffn: FFN, channels: Tensor) -> FFN:
        return self._nystrom().narrow(ffn, channels)
