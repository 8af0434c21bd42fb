"""The error of a compressed block's output, weighed by what it costs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompress.compression.hidden_streams import HiddenStreams


@dataclass(frozen=True)
class BlockError:
    """Squared error of a block's output, averaged over the tokens of a sample.

    `targets` are the outputs (1, length, width) of the dense block for each sample. `metric`
    (width, width), if given, multiplies the error before it is squared. A token whose target is
    larger than the median counts less, in proportion: the norm in front of the next layer divides
    its error by its size.
    """

    streams: HiddenStreams
    index: int
    targets: Sequence[Tensor]
    metric: Tensor | None

    def of_sample(self, sample: int) -> Tensor:
        """The error for the compressed stream of one sample; a scalar with a graph."""
        hidden = self.streams.compressed[sample]
        return self._weighed(self.streams.run(self.index, hidden).output, self.targets[sample])

    def energy(self, samples: Sequence[int]) -> float:
        """The error of a block that passes on its input: the size of what the block adds."""
        dense = self.streams.dense
        return sum(float(self._weighed(dense[i], self.targets[i])) for i in samples) / len(samples)

    def _weighed(self, output: Tensor, target: Tensor) -> Tensor:
        difference = output.to(target.device) - target
        if self.metric is not None:
            difference = difference @ self.metric.to(difference.device)
        size = target.square().sum(-1)
        weight = (size.median() / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(1.0)
        return (difference.square().sum(-1) * weight).mean()

    def mean(self, samples: Sequence[int]) -> float:
        """The mean error over `samples`."""
        return sum(float(self.of_sample(sample)) for sample in samples) / len(samples)
