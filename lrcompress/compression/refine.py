"""Block refinement: a few gradient steps that bring a compressed block closer to the dense one.

Two streams of hidden states go through the model, one dense, one compressed. The compressed
layers of a block are trained so that its output from the compressed stream matches the dense
block's output from the dense stream; then both streams move on. Gradients never cross a block
boundary, so memory is that of one block and its activations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
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

# share of the samples that are held out to judge an epoch
HELD_OUT_SHARE = 0.125
# damping of the metric of a block's output
METRIC_DAMPING = 1e-2
ADAM_BETAS = (0.9, 0.95)
WARMUP_STEPS = 10


@torch.no_grad()
def refine(
    model: Any,
    originals: Mapping[str, nn.Module],
    prepared: PreparedModel,
    *,
    tokens: Tensor,
    settings: RefineSettings,
    work: Path | None,
    progress: Progress,
) -> tuple[RefinedBlock, ...]:
    """Trains the compressed layers of `model` in place, block by block, on `tokens`.

    `originals` are the linears of `prepared` as they were before compression, by name; `tokens`
    are (samples, length). Finished blocks are kept in the folder `work`, if given, and read from
    it when they are there. Raises InputError for fewer than two samples, where the loss is not
    finite, or where no token reaches a layer.
    """
    if len(tokens) < 2:
        raise InputError(
            "refine holds samples out, but there is only one: give more text and a larger "
            "--num-samples, or a shorter --seq-len"
        )
    with evaluation_mode(model):
        refinement = Refinement(model, tokens, settings)
        count, refined = len(refinement.streams.blocks), list[RefinedBlock]()
        for index in progress(range(count), "Refining", count):
            file = None if work is None else work / f"block-{index:04}.safetensors"
            block = refinement.block(index, prepared, originals, file)
            refined += [] if block is None else [block]
        return tuple(refined)


class Refinement:
    """Refines blocks in order, in at least float32 whatever the precision of the model."""

    def __init__(self, model: Any, tokens: Tensor, settings: RefineSettings) -> None:
        self.model, self.settings = model, settings
        self.held_out = range(max(1, round(HELD_OUT_SHARE * len(tokens))))
        self.model_dtype = model.dtype
        self.streams = HiddenStreams(model, tokens, torch.promote_types(model.dtype, torch.float32))

    def block(
        self,
        index: int,
        prepared: PreparedModel,
        originals: Mapping[str, nn.Module],
        file: Path | None,
    ) -> RefinedBlock | None:
        """Refines block number `index` and moves both streams behind it.

        Of `prepared` and `originals` the linears of this block are read. Returns None where none
        of them was compressed. The refined block is read from `file` or written to it, if given.
        """
        specs = [spec for spec in prepared.linears if spec.block == index]
        layers = {spec.name: self.model.get_submodule(spec.name) for spec in specs}
        layers = {name: m for name, m in layers.items() if m is not originals[name]}
        parameters, refined = _named_parameters(layers), None
        with in_float32(self.streams.blocks[index]):
            targets = self._dense_outputs(index, layers, originals)
            if layers and file is not None:
                refined = read_block(file, parameters)
            if layers and refined is None:
                metric = self._metric(index, specs, prepared)
                error = BlockError(self.streams, index, targets, metric)
                with only_trainable(self.streams.blocks[index], parameters.values()):
                    refined = self._train(error, parameters)
                if file is not None:
                    write_block(file, parameters, refined)
            self.streams.compressed = [
                self.streams.run(index, hidden).output for hidden in self.streams.compressed
            ]
            self.streams.dense = targets
        return refined

    def _dense_outputs(
        self,
        index: int,
        layers: Mapping[str, nn.Module],
        originals: Mapping[str, nn.Module],
    ) -> list[Tensor]:
        """The outputs of the dense block, in which `originals` stand in for the new `layers`."""
        try:
            for name in layers:
                install(self.model, name, originals[name])
            with in_float32(self.streams.blocks[index]):
                return [self.streams.run(index, h).output for h in self.streams.dense]
        finally:
            for name, layer in layers.items():
                install(self.model, name, layer)

    def _metric(
        self, index: int, specs: Sequence[LinearSpec], prepared: PreparedModel
    ) -> Tensor | None:
        """G^1/2 (width, width), by which errors of the block's output are weighed.

        G is the shrunk gradient moment of the output of down_proj, which is that of the block's
        output where the two are added to the residual stream unchanged. None where they are not,
        or where no gradients were measured.
        """
        down = [spec for spec in specs if spec.role == "down"]
        moments, required = prepared.moments, prepared.method.requires
        if moments is None or "gradient_moment" not in required or not down:
            return None
        gradient = moments.gradient_moment(down[-1])
        if gradient is None or not self.streams.adds_to_residual(index, down[-1].name):
            return None
        moment = shrunk(to_float64(gradient), OUTPUT_SHRINKAGE)
        return roots(damped(moment, METRIC_DAMPING))[0].to(self.streams.dtype)

    def _train(self, error: BlockError, named: Mapping[str, nn.Parameter]) -> RefinedBlock:
        """Adam with a cosine schedule; keeps the parameters of the best epoch, or the first ones.

        Epochs are compared on the held-out samples.
        """
        parameters = list(named.values())
        started = time.perf_counter()
        samples = range(self.held_out.stop, len(self.streams.compressed))
        generator = torch.Generator().manual_seed(error.index)
        before = best = error.mean(self.held_out)
        if not math.isfinite(before):
            raise InputError(
                f"the output of block {error.index} is not finite: load with --dtype float32"
            )
        relative_error = math.sqrt(before / max(error.energy(self.held_out), before, 1e-30))
        optimizer, schedule = self._optimizer(parameters, len(samples), relative_error)
        best_values, steps = [p.clone() for p in parameters], 0
        for _ in range(self.settings.epochs):
            for i in torch.randperm(len(samples), generator=generator).tolist():
                _step(error, samples[i], named, optimizer)
                schedule.step()
                steps += 1
            loss, values = self._saved_loss(error, parameters)
            if loss < best:
                best, best_values = loss, values
        _copy(best_values, parameters)
        return RefinedBlock(
            block=error.index,
            before=before,
            after=best,
            estimates_loss=error.metric is not None,
            steps=steps,
            seconds=time.perf_counter() - started,
        )

    def _saved_loss(
        self, error: BlockError, parameters: Sequence[nn.Parameter]
    ) -> tuple[float, list[Tensor]]:
        """The held-out loss of `parameters` as they would be saved, and those values.

        That is rounded to the model's precision; `parameters` keep their exact values.
        """
        exact = [p.clone() for p in parameters]
        rounded = [p.to(self.model_dtype).to(p.dtype) for p in parameters]
        _copy(rounded, parameters)
        loss = error.mean(self.held_out)
        if not math.isfinite(loss):
            raise InputError(
                f"refinement of block {error.index} diverged: use a smaller --refine-learning-rate"
            )
        _copy(exact, parameters)
        return loss, rounded

    def _optimizer(
        self, parameters: list[nn.Parameter], samples: int, relative_error: float
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Learning rates in proportion to each parameter's root mean square and the block's error.

        A block with a small error is near its optimum, and steps as large as those of a block with
        a large error would move it away.
        """
        scales = [float(p.square().mean().sqrt()) for p in parameters]
        groups = [
            {"params": [p], "lr": self.settings.learning_rate * relative_error * scale}
            for p, scale in zip(parameters, scales, strict=True)
        ]
        total = self.settings.epochs * samples

        def factor(step: int) -> float:
            warmup = min(1.0, (step + 1) / WARMUP_STEPS)
            return warmup * (1 + math.cos(math.pi * step / total)) / 2

        optimizer = torch.optim.Adam(groups, betas=ADAM_BETAS, eps=1e-12)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _named_parameters(layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {
        f"{name}.{key}": parameter
        for name, layer in layers.items()
        for key, parameter in layer.named_parameters()
    }


def _step(
    error: BlockError,
    sample: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            error.of_sample(sample), list(parameters.values()), allow_unused=True
        )
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is None:
            raise InputError(f"the text never reaches {name}: exclude its linear by name")
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


def _copy(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
