"""Moments of one block at a time, from hidden states and gradients that are kept on disk.

All samples run through a block before the next is read. Where gradients are wanted, a pass
forwards keeps what every block reads, and a pass backwards the gradient with respect
to what it gives: from the two any block's moments follow without the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lrcompress.compression.calibration.moments import MomentCollector, MomentStatistics
from lrcompress.compression.calibration.probes import Probe, ProbeErrors, held_out
from lrcompress.compression.streaming.block_store import Activations
from lrcompress.layers.block_runner import BlockRunner
from lrcompress.methods.types import LinearSpec
from lrcompress.models.offload import OffloadedModel
from lrcompress.runtime.distributed import run_on_all, shard_of, world_size
from lrcompress.runtime.progress import Progress


class BlockMoments:
    """Moments of the `linears` of one block, from tokens (samples, length).

    The first `gradient_samples` get a backward pass, and so do those held out for probes. What
    `work` holds is not computed again. Several processes share the samples.
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
        count = len(tokens)
        self.held = held_out(count) if gradient_samples else range(count, count)
        self.gradient_samples = min(gradient_samples, self.held.start)
        self.hidden, self.gradients = Activations(work / "hidden"), Activations(work / "gradient")
        with source.resident(0):
            self.blocks = BlockRunner(source.model, tokens)
        used = [spec.block for spec in linears]
        self.first, self.last = min(used), max(used)

    def run(self, progress: Progress) -> None:
        """Both passes, where a backward pass or another process needs them."""
        if self.gradient_samples or world_size() > 1:
            run_on_all(lambda: self._forward(progress))
        if self.gradient_samples:
            run_on_all(lambda: self._backward(progress))

    def reach(self, index: int) -> None:
        """Has the hidden states in front of block number `index` made, if they are not there."""
        every = range(len(self.tokens))
        start = next(i for i in range(index, -1, -1) if i == 0 or self._is_reached(i))
        if start == 0:
            self._embed(every)
        for block in range(start, index):
            self._advance(block, every)

    def _is_reached(self, index: int) -> bool:
        return all(self.hidden.has(index, sample) for sample in range(len(self.tokens)))

    def drop(self, index: int) -> None:
        """What block number `index` reads is needed no more."""
        self.hidden.drop(index)

    @torch.no_grad()
    def _embed(self, samples: Sequence[int]) -> None:
        for sample in samples:
            if not self.hidden.has(0, sample):
                self.hidden.write(0, sample, self.blocks.embedded(self.tokens[sample]))

    @torch.no_grad()
    def _advance(self, index: int, samples: Sequence[int]) -> None:
        missing = [sample for sample in samples if not self.hidden.has(index + 1, sample)]
        with self._resident(index, missing):
            for sample in missing:
                output = self.blocks.run(index, self._states(index, sample)).output
                self.hidden.write(index + 1, sample, output)

    def _forward(self, progress: Progress) -> None:
        own = shard_of(range(len(self.tokens)))
        self._embed(own)
        end = self.source.count if self.gradient_samples else self.last
        for index in progress(range(end), "Running blocks", end):
            self._advance(index, own if index < self.last else self._with_gradients(own))

    def _with_gradients(self, samples: Sequence[int]) -> Sequence[int]:
        return [s for s in samples if s < self.gradient_samples or s in self.held]

    def _backward(self, progress: Progress) -> None:
        own, blocks = self._with_gradients(shard_of(range(len(self.tokens)))), self.source.count
        for sample in own:
            if not self.gradients.has(blocks - 1, sample):
                states, tokens = self._states(blocks, sample), self.tokens[sample]
                gradient = self.blocks.score_gradient(states, tokens, seed=sample)
                self.gradients.write(blocks - 1, sample, gradient)
        steps = range(blocks - 1, self.first, -1)
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

    def moments(self, index: int) -> MomentStatistics:
        """Of the linears of block number `index`, which has to be reached and resident.

        Bit for bit those that `measure_moments` finds in one process. What the block gives is kept
        if the next one has nothing to read yet.
        """
        specs = [spec for spec in self.linears if spec.block == index]
        collector = MomentCollector(specs, self.gradient_samples > 0)
        with collector.hooks(self.source.model):
            for sample in range(self.held.start):
                if sample < self.gradient_samples:
                    self._input_gradient(index, sample)
                else:
                    self._watch(index, sample)
        length = self.tokens.shape[1]
        return collector.statistics(self.held.start * length, self.gradient_samples * length)

    def errors(self, index: int, probes: Sequence[Probe]) -> dict[str, list[float]]:
        """Of probes of block number `index`: bit for bit those of `measure_errors`."""
        errors = ProbeErrors(probes)
        with errors.hooks(self.source.model):
            for sample in self.held:
                errors.start_sample()
                self._input_gradient(index, sample)
        return errors.means(self.tokens.shape[1])

    @torch.no_grad()
    def _watch(self, index: int, sample: int) -> None:
        output = self.blocks.run(index, self._states(index, sample)).output
        if index < self.last and not self.hidden.has(index + 1, sample):
            self.hidden.write(index + 1, sample, output)
