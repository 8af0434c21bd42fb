"""Moments of one block at a time: hidden states and gradients of all blocks are kept on disk.

A pass forwards keeps what every block reads, a pass backwards the gradient of the loss with
respect to what it gives; each runs all samples through a block before the next is read. From
the two any block's moments follow without the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lrcompress.blockfiles import Activations
from lrcompress.blocks import Blocks
from lrcompress.calibrate import Moments
from lrcompress.offload import OffloadedModel
from lrcompress.processes import agreed, own_part
from lrcompress.protocols import LinearSpec, Progress


class Blockwise:
    """Moments of the `linears` of one block, from tokens (samples, length).

    The first `gradient_samples` get a backward pass. What `work` holds is not computed again.
    Several processes share the samples.
    """

    def __init__(
        self,
        source: OffloadedModel,
        linears: Sequence[LinearSpec],
        tokens: Tensor,
        gradient_samples: int,
        work: Path,
    ) -> None:
        self.source, self.linears, self.tokens = source, linears, tokens
        self.gradient_samples = min(gradient_samples, len(tokens))
        self.hidden, self.gradients = Activations(work / "hidden"), Activations(work / "gradient")
        with source.resident(0):
            self.blocks = Blocks(source.model, tokens)
        used = [spec.block for spec in linears]
        self.first, self.last = min(used), max(used)

    def run(self, progress: Progress) -> None:
        """Both passes; afterwards `moments` knows every block."""
        agreed(lambda: self._forward(progress))
        if self.gradient_samples:
            agreed(lambda: self._backward(progress))

    @torch.no_grad()
    def _forward(self, progress: Progress) -> None:
        own = own_part(range(len(self.tokens)))
        for sample in own:
            if not self.hidden.has(0, sample):
                self.hidden.write(0, sample, self.blocks.embedded(self.tokens[sample]))
        end = self.source.count if self.gradient_samples else self.last
        for index in progress(range(end), "Running blocks", end):
            wanted = own if index < self.last else self._with_gradients(own)
            missing = [sample for sample in wanted if not self.hidden.has(index + 1, sample)]
            with self._resident(index, missing):
                for sample in missing:
                    output = self.blocks.run(index, self._states(index, sample)).output
                    self.hidden.write(index + 1, sample, output)

    def _with_gradients(self, samples: Sequence[int]) -> Sequence[int]:
        return [sample for sample in samples if sample < self.gradient_samples]

    def _backward(self, progress: Progress) -> None:
        own, count = self._with_gradients(own_part(range(len(self.tokens)))), self.source.count
        for sample in own:
            if not self.gradients.has(count - 1, sample):
                states, tokens = self._states(count, sample), self.tokens[sample]
                gradient = self.blocks.loss_gradient(states, tokens)
                self.gradients.write(count - 1, sample, gradient)
        steps = range(count - 1, self.first, -1)
        for index in progress(steps, "Running blocks backwards", len(steps)):
            missing = [sample for sample in own if not self.gradients.has(index - 1, sample)]
            with self._resident(index, missing):
                for sample in missing:
                    self.gradients.write(index - 1, sample, self._input_gradient(index, sample))

    def _states(self, block: int, sample: int) -> Tensor:
        return self.hidden.read(block, sample).to(self.source.model.device)

    def _input_gradient(self, block: int, sample: int) -> Tensor:
        gradient = self.gradients.read(block, sample).to(self.source.model.device)
        return self.blocks.input_gradient(block, self._states(block, sample), gradient)

    @contextmanager
    def _resident(self, index: int, samples: Sequence[int]) -> Iterator[None]:
        """Reads the block's weights only if there is something to do."""
        if not samples:
            yield
            return
        with self.source.resident(index):
            yield

    def moments(self, index: int) -> Moments:
        """Of the linears of block number `index`, which has to be resident.

        Bit for bit those that `measure_moments` finds in one process.
        """
        specs = [spec for spec in self.linears if spec.block == index]
        moments, length = Moments(specs, self.gradient_samples > 0), self.tokens.shape[1]
        with moments.watching(self.source.model):
            for sample in range(len(self.tokens)):
                if sample < self.gradient_samples:
                    self._input_gradient(index, sample)
                    moments.gradient_tokens += length
                else:
                    with torch.no_grad():
                        self.blocks.run(index, self._states(index, sample))
                moments.tokens += length
        return moments
