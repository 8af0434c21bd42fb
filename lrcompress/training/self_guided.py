"""Self-guided training: the dense weight carries a layer at first, and lets go (Wei et al. 2024).

While training, a low-rank layer gives o = a W x + (1 - a) B A x. The share a falls from 1 to 0
by a cosine; then only the factors are left. In the variant of fewer operations a step does so
with probability a, and runs the factors alone otherwise. In training from scratch W trains too,
as in the paper. Where the dense model was trained already, its W stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lrcompress.layers.lowrank import LowRankLinear, compressed_layers, is_linear, linear_shape
from lrcompress.runtime.errors import InputError

# of all steps, those over which the dense weights let go
SHARE_OF_STEPS = 0.5

Pairs = Sequence[tuple[LowRankLinear, nn.Module]]  # a layer and its dense guide


class Guidance(TrainerCallback):  # type: ignore[misc]
    """The share of the dense weights in each step; a function of step and seed alone."""

    def __init__(self, steps: int, reduced: bool, seed: int) -> None:
        self.steps, self.reduced, self.seed = max(1, round(SHARE_OF_STEPS * steps)), reduced, seed
        self.share = 1.0
        self.layers = 0  # that have a guide

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.share = self.share_of(state.global_step)

    def share_of(self, step: int) -> float:
        """What the dense weights give of a layer's output in a step; 0: they are not computed."""
        share = (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2
        return share if not self.reduced or self._chosen(step, share) else 0.0

    def _chosen(self, step: int, share: float) -> bool:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return float(torch.rand((), generator=generator)) < share

    @property
    def guided_steps(self) -> int:
        """Steps in which the dense weights are computed."""
        return sum(self.share_of(step) > 0 for step in range(self.steps))

    @contextmanager
    def guiding(self, pairs: Pairs, training: bool = False) -> Iterator[None]:
        """Adds to each layer the output of its dense guide.

        With `training` the guides are parts of the model inside, so that they train with it and
        are in its checkpoints.
        """
        self.layers = len(pairs)
        with ExitStack() as stack:
            for layer, dense in pairs:
                if training:
                    layer.add_module(GUIDE, dense)
                    stack.callback(delattr, layer, GUIDE)
                stack.callback(layer.register_forward_hook(self._hook(dense)).remove)
            yield

    def _hook(self, dense: nn.Module) -> Any:
        def mix(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not layer.training or self.share == 0:
                return output
            guide: Tensor = dense(arguments[0].to(next(dense.parameters()).dtype))
            return torch.lerp(output, guide.to(output.dtype), self.share)

        return mix


GUIDE = "guide"


def guides(model: nn.Module, dense: Mapping[str, nn.Module]) -> Pairs:
    """The low-rank layers of `model` with those modules `dense`, by name, of the same shape.

    Raises InputError where there are none: narrowed FFNs have other shapes than the dense.
    """
    pairs = [
        (layer, dense[name])
        for name, layer in compressed_layers(model)
        if isinstance(layer, LowRankLinear)
        and is_linear(dense.get(name))
        and linear_shape(layer) == linear_shape(dense[name])
    ]
    if not pairs:
        raise InputError(
            "self-guided training needs low-rank layers of the dense shape and every FFN is "
            "narrowed: factorize with --method fisher, or leave --self-guided out"
        )
    return pairs
