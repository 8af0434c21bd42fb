"""Self-guided training: the dense weight carries a layer at first, and lets go (Wei et al. 2024).

While training, a low-rank layer gives o = a W x + (1 - a) B A x. The share a falls from 1 to 0
by a cosine; then only the factors are left. In the variant of fewer operations a step does so
with probability a, and runs the factors alone otherwise. W is the dense model's and stays as it
is: it was trained already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrcompress.lowrank import LowRankLinear, compressed_layers, is_linear, linear_shape
from lrcompress.protocols import InputError

# of all steps, those over which the dense weights let go
SHARE_OF_STEPS = 0.5


class Guidance(TrainerCallback):  # type: ignore[misc]
    """The share of the dense weights in each step; a function of step and seed alone."""

    def __init__(self, steps: int, reduced: bool, seed: int) -> None:
        self.steps, self.reduced, self.seed = max(1, round(SHARE_OF_STEPS * steps)), reduced, seed
        self.share = 1.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        done = min(1.0, state.global_step / self.steps)
        self.share = (1 + math.cos(math.pi * done)) / 2
        if self.reduced and not self._chosen(state.global_step):
            self.share = 0.0

    def _chosen(self, step: int) -> bool:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return float(torch.rand((), generator=generator)) < self.share

    @contextmanager
    def guiding(self, model: nn.Module, teacher: nn.Module) -> Iterator[None]:
        """Adds the teacher's dense layers to the low-rank ones of the same shape.

        Raises InputError where there are none: narrowed FFNs have other shapes than the dense.
        """
        taught = dict(teacher.named_modules())
        pairs = [
            (layer, taught[name])
            for name, layer in compressed_layers(model)
            if isinstance(layer, LowRankLinear)
            and is_linear(taught.get(name))
            and linear_shape(layer) == linear_shape(taught[name])
        ]
        if not pairs:
            raise InputError(
                "self-guided training needs low-rank layers of the dense shape and every FFN is "
                "narrowed: factorize with --method fisher, or leave --self-guided out"
            )
        with ExitStack() as stack:
            for layer, dense in pairs:
                stack.callback(layer.register_forward_hook(self._hook(dense)).remove)
            yield

    def _hook(self, dense: nn.Module) -> Any:
        def mix(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not layer.training or self.share == 0:
                return output
            guide: Tensor = dense(arguments[0].to(next(dense.parameters()).dtype))
            return torch.lerp(output, guide.to(output.dtype), self.share)

        return mix
