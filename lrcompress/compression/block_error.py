"""How far a compressed block is from the dense one, in what that costs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.compression.hidden_streams import HiddenStreams


@dataclass(frozen=True)
class BlockError:
    """Squared error of a block's output in the metric, averaged over the tokens of a sample.

    Tokens whose hidden state is larger than the median's count less, in proportion: the norm
    in front of the next layer divides their error by their size.
    """

    streams: HiddenStreams
    index: int
    targets: Sequence[Tensor]
    metric: Tensor | None

    def __call__(self, sample: int) -> Tensor:
        hidden = self.streams.compressed[sample]
        return self._of(self.streams.run(self.index, hidden).output, self.targets[sample])

    def energy(self, samples: Sequence[int]) -> float:
        """The error of doing nothing: what the block adds to the residual stream."""
        dense = self.streams.dense
        return sum(float(self._of(dense[i], self.targets[i])) for i in samples) / len(samples)

    def _of(self, output: Tensor, target: Tensor) -> Tensor:
        difference = output.to(target.device) - target
        if self.metric is not None:
            difference = difference @ self.metric.to(difference.device)
        size = target.square().sum(-1)
        weight = (size.median() / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(1.0)
        return (difference.square().sum(-1) * weight).mean()

    def mean(self, samples: Sequence[int]) -> float:
        return sum(float(self(sample)) for sample in samples) / len(samples)
