"""Block refinement: a few gradient steps that pull one compressed block towards the dense one.

Two streams of hidden states go through the model, one dense, one compressed. The compressed
layers of a block are trained to give, from the compressed stream, the output that the dense
block gives from the dense stream; then both streams move on. Nothing flows back through more
than one block, so memory stays that of one block and its text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.compression.block_error import BlockError
from lrcompress.compression.hidden_streams import HiddenStreams
from lrcompress.compression.planning import PreparedModel
from lrcompress.compression.refined_block import RefinedBlock, read_block, write_block
from lrcompress.config import RefineSettings
from lrcompress.layers.lowrank import install
from lrcompress.layers.model_state import evaluation_mode, in_float32, only_trainable
from lrcompress.methods.linalg import damped, roots, shrunk, to_float64
from lrcompress.methods.svd import OUTPUT_SHRINKAGE
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress

# of the samples, those that are held out, and the damping of the metric of the block's output
HELD_OUT = 0.125
METRIC_DAMPING = 1e-2
BETAS = (0.9, 0.95)
WARM_UP = 10


@torch.no_grad()
def refine(
    model: Any,
    originals: Mapping[str, nn.Module],
    prepared: PreparedModel,
    tokens: Tensor,
    settings: RefineSettings,
    work: Path | None,
    progress: Progress,
) -> tuple[RefinedBlock, ...]:
    """Trains the compressed layers of `model` in place, block by block.

    `originals` are the dense layers that they replaced; tokens (samples, length). With `work`,
    a folder, finished blocks are kept there and found again. Raises InputError for fewer than
    two samples, where the loss is not finite, or where a layer is never reached.
    """
    if len(tokens) < 2:
        raise InputError(
            "refine holds samples out and there is one: give more text and --num-samples, or a "
            "shorter --seq-len"
        )
    with evaluation_mode(model):
        refinement = Refinement(model, originals, prepared, tokens, settings)
        return tuple(refinement.blocks(work, progress))


class Refinement:
    """The walk through the blocks, in float32 or better whatever the precision of the model."""

    def __init__(
        self,
        model: Any,
        originals: Mapping[str, nn.Module],
        prepared: PreparedModel,
        tokens: Tensor,
        settings: RefineSettings,
    ) -> None:
        self.model, self.originals, self.prepared = model, originals, prepared
        self.settings = settings
        self.held = max(1, round(HELD_OUT * len(tokens)))
        self.stored = model.dtype
        self.streams = HiddenStreams(model, tokens, torch.promote_types(model.dtype, torch.float32))

    def blocks(self, work: Path | None, progress: Progress) -> Iterator[RefinedBlock]:
        count = len(self.streams.blocks)
        for index in progress(range(count), "Refining", count):
            yield from self.block(index, work)

    def block(self, index: int, work: Path | None) -> Iterator[RefinedBlock]:
        """What was done to one block, if it was compressed; then both streams are behind it."""
        specs = [spec for spec in self.prepared.linears if spec.block == index]
        with in_float32(self.streams.blocks[index]):
            targets = self._dense_outputs(index, specs)
            layers = self._compressed(specs)
            if layers:
                yield self._refined(index, specs, layers, targets, work)
            self.streams.compressed = [
                self.streams.run(index, hidden).output for hidden in self.streams.compressed
            ]
            self.streams.dense = targets

    def _compressed(self, specs: Sequence[LinearSpec]) -> dict[str, nn.Module]:
        found = {spec.name: self.model.get_submodule(spec.name) for spec in specs}
        return {name: m for name, m in found.items() if m is not self.originals[name]}

    def _dense_outputs(self, index: int, specs: Sequence[LinearSpec]) -> list[Tensor]:
        layers = self._compressed(specs)
        try:
            for name in layers:
                install(self.model, name, self.originals[name])
            with in_float32(self.streams.blocks[index]):
                return [self.streams.run(index, h).output for h in self.streams.dense]
        finally:
            for name, layer in layers.items():
                install(self.model, name, layer)

    def _refined(
        self,
        index: int,
        specs: Sequence[LinearSpec],
        layers: Mapping[str, nn.Module],
        targets: list[Tensor],
        work: Path | None,
    ) -> RefinedBlock:
        parameters = {
            f"{name}.{key}": parameter
            for name, layer in layers.items()
            for key, parameter in layer.named_parameters()
        }
        file = None if work is None else work / f"block-{index:04}.safetensors"
        done = None if file is None else read_block(file, parameters)
        if done is None:
            error = BlockError(self.streams, index, targets, self._metric(index, specs))
            with only_trainable(self.streams.blocks[index], parameters.values()):
                done = self._train(error, parameters)
            if file is not None:
                write_block(file, parameters, done)
        return done

    def _metric(self, index: int, specs: Sequence[LinearSpec]) -> Tensor | None:
        """G^1/2 of the block's output, shrunk: what an error there costs, where that was measured.

        A linear whose output is added to the residual stream has the block's own gradient.
        """
        down = [spec for spec in specs if spec.role == "down"]
        moments, needs = self.prepared.moments, self.prepared.method.requires
        if moments is None or "gradient_moment" not in needs or not down:
            return None
        gradient = moments.gradient_moment(down[-1])
        if gradient is None or not self.streams.adds_to_residual(index, down[-1].name):
            return None
        moment = shrunk(to_float64(gradient), OUTPUT_SHRINKAGE)
        return roots(damped(moment, METRIC_DAMPING))[0].to(self.streams.dtype)

    def _train(self, error: BlockError, named: Mapping[str, nn.Parameter]) -> RefinedBlock:
        """Adam with a cosine schedule; the parameters of the best epoch stay, or the first ones.

        An epoch is judged by what would be saved: parameters rounded to the model's precision.
        """
        parameters = list(named.values())
        started, samples = time.perf_counter(), range(self.held, len(self.streams.compressed))
        order = torch.Generator().manual_seed(error.index)
        before = best = error.mean(range(self.held))
        if not math.isfinite(before):
            raise InputError(
                f"the output of block {error.index} is not finite: load with --dtype float32"
            )
        relative = math.sqrt(before / max(error.energy(range(self.held)), before, 1e-30))
        optimizer, schedule = self._optimizer(parameters, len(samples), relative)
        state, steps = [p.clone() for p in parameters], 0
        for _ in range(self.settings.epochs):
            for i in torch.randperm(len(samples), generator=order).tolist():
                _step(error, samples[i], named, optimizer)
                schedule.step()
                steps += 1
            exact = [p.clone() for p in parameters]
            rounded = [p.to(self.stored).to(p.dtype) for p in parameters]
            _copy(rounded, parameters)
            now = error.mean(range(self.held))
            if not math.isfinite(now):
                raise InputError(
                    f"refinement of block {error.index} diverged: use a smaller "
                    "--refine-learning-rate"
                )
            if now < best:
                best, state = now, rounded
            _copy(exact, parameters)
        _copy(state, parameters)
        seconds = time.perf_counter() - started
        return RefinedBlock(error.index, before, best, error.metric is not None, steps, seconds)

    def _optimizer(
        self, parameters: list[nn.Parameter], samples: int, relative: float
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The rate of every parameter is relative to its root mean square and the block's error.

        A block that lost little is near its optimum: the steps of one that lost much would throw
        it farther off than it was.
        """
        scales = [float(p.square().mean().sqrt()) for p in parameters]
        groups = [
            {"params": [p], "lr": self.settings.learning_rate * relative * scale}
            for p, scale in zip(parameters, scales, strict=True)
        ]
        total = self.settings.epochs * samples

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / total)) / 2

        optimizer = torch.optim.Adam(groups, betas=BETAS, eps=1e-12)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _step(
    error: BlockError,
    sample: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    with torch.enable_grad():
        found = torch.autograd.grad(error(sample), list(parameters.values()), allow_unused=True)
    for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
        if gradient is None:
            raise InputError(f"the text never reaches {name}: exclude its linear by name")
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def _copy(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
