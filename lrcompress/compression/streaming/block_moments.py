"""Moments of one block at a time, from hidden states and gradients that are kept on disk.

All samples run through a block before the next block is read. Where gradients are needed, a
forward pass keeps the input of every block and a backward pass the gradient of its output. From
the two the moments of any block follow without the other blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lrcompress.compression.calibration.moments import (
    MomentCollector,
    MomentStatistics,
    of_counted,
)
from lrcompress.compression.calibration.probes import Probe, ProbeErrors, held_out
from lrcompress.compression.streaming.block_store import Activations
from lrcompress.layers.bfloat16_linears import bfloat16_linears
from lrcompress.layers.block_runner import BlockRunner
from lrcompress.methods.types import LinearSpec
from lrcompress.models.offload import OffloadedModel
from lrcompress.runtime.distributed import run_on_all, shard_of, world_size
from lrcompress.runtime.progress import Progress
from lrcompress.runtime.stage_costs import stage


class BlockMoments:
    """Measures the moments of the `linears` of any one block, on tokens (samples, length).

    The first `gradient_samples` get a backward pass, and so do those held out for probes. Hidden
    states and gradients are kept in the folder `work`, and not computed again if they are there.
    `labels` are as in `measure_moments`.
    Several processes share the samples.
    """

    def __init__(
        self,
        source: OffloadedModel,
        linears: Sequence[LinearSpec],
        tokens: Tensor,
        gradient_samples: int,
        work: Path,
        labels: Tensor | None = None,
    ) -> None:
        self.source, self.linears, self.tokens, self.labels = source, linears, tokens, labels
        count = len(tokens)
        self.held_out = held_out(count) if gradient_samples else range(count, count)
        self.gradient_samples = min(gradient_samples, self.held_out.start)
        self.hidden, self.gradients = Activations(work / "hidden"), Activations(work / "gradient")
        with source.resident(0), self._products():
            self.blocks = BlockRunner(source.model, tokens)
        self.first_block = min(spec.block for spec in linears)
        self.last_block = max(spec.block for spec in linears)

    def _products(self) -> AbstractContextManager[None]:
        """The precision of passes, as `measure_moments` chooses it."""
        return bfloat16_linears(self.source.model, self.gradient_samples > 0)

    def run(self, progress: Progress) -> None:
        """Runs the forward pass, if a backward pass or another process needs it, then the other."""
        if self.gradient_samples or world_size() > 1:
            with stage("second_moments"):
                run_on_all(lambda: self._forward(progress))
        if self.gradient_samples:
            with stage("gradients"):
                run_on_all(lambda: self._backward(progress))

    def reach(self, index: int) -> None:
        """Computes the hidden states in front of block number `index`, if they are not there."""
        samples = range(len(self.tokens))
        start = next(i for i in range(index, -1, -1) if i == 0 or self._is_reached(i))
        with stage("second_moments"):
            if start == 0:
                self._embed(samples)
            for block in range(start, index):
                self._advance(block, samples)

    def _is_reached(self, index: int) -> bool:
        return all(self.hidden.has(index, sample) for sample in range(len(self.tokens)))

    def drop(self, index: int) -> None:
        """Drops the hidden states in front of block number `index`."""
        self.hidden.drop(index)

    @torch.no_grad()
    def _embed(self, samples: Sequence[int]) -> None:
        for sample in samples:
            if not self.hidden.has(0, sample):
                with self._products():
                    states = self.blocks.embedded(self.tokens[sample])
                self.hidden.write(0, sample, states)

    @torch.no_grad()
    def _advance(self, index: int, samples: Sequence[int]) -> None:
        missing = [sample for sample in samples if not self.hidden.has(index + 1, sample)]
        with self._resident(index, missing):
            for sample in missing:
                output = self.blocks.run(index, self._states(index, sample)).output
                self.hidden.write(index + 1, sample, output)

    def _forward(self, progress: Progress) -> None:
        samples = shard_of(range(len(self.tokens)))
        self._embed(samples)
        end = self.source.count if self.gradient_samples else self.last_block
        for index in progress(range(end), "Running blocks", end):
            # behind the last block with linears, only backward passes read hidden states
            is_read = index < self.last_block
            self._advance(index, samples if is_read else self._with_gradients(samples))

    def _with_gradients(self, samples: Sequence[int]) -> Sequence[int]:
        return [s for s in samples if s < self.gradient_samples or s in self.held_out]

    def _backward(self, progress: Progress) -> None:
        samples = self._with_gradients(shard_of(range(len(self.tokens))))
        blocks = self.source.count
        with self._products():
            for sample in samples:
                if not self.gradients.has(blocks - 1, sample):
                    states, tokens = self._states(blocks, sample), self.tokens[sample]
                    gradient = self.blocks.score_gradient(states, tokens, seed=sample)
                    counted = of_counted(gradient, self.labels, sample)
                    self.gradients.write(blocks - 1, sample, counted)
        steps = range(blocks - 1, self.first_block, -1)
        for index in progress(steps, "Running blocks backwards", len(steps)):
            missing = [sample for sample in samples if not self.gradients.has(index - 1, sample)]
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
        """Reads the block's weights for passes of `samples`, unless there are none."""
        if not samples:
            yield
            return
        with self.source.resident(index), self._products():
            yield

    def moments(self, index: int) -> MomentStatistics:
        """The moments of block number `index`, which has to be reached and resident.

        They are bit for bit those of `measure_moments` in one process. The block's output is kept
        where the next block has no input yet.
        """
        specs = [spec for spec in self.linears if spec.block == index]
        collector = MomentCollector(specs, self.gradient_samples > 0)
        with collector.hooks(self.source.model), self._products():
            for sample in range(self.held_out.start):
                with stage("gradients" if sample < self.gradient_samples else "second_moments"):
                    if sample < self.gradient_samples:
                        self._input_gradient(index, sample)
                    else:
                        self._run_forward(index, sample)
        length = self.tokens.shape[1]
        return collector.statistics(self.held_out.start * length, self.gradient_samples * length)

    def errors(self, index: int, probes: Sequence[Probe]) -> dict[str, list[float]]:
        """The costs of probes of block number `index`, bit for bit those of `measure_errors`."""
        errors = ProbeErrors(probes)
        with errors.hooks(self.source.model), self._products():
            for sample in self.held_out:
                errors.start_sample()
                self._input_gradient(index, sample)
        return errors.means(self.tokens.shape[1])

    @torch.no_grad()
    def _run_forward(self, index: int, sample: int) -> None:
        output = self.blocks.run(index, self._states(index, sample)).output
        if index < self.last_block and not self.hidden.has(index + 1, sample):
            self.hidden.write(index + 1, sample, output)
