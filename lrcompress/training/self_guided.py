"""Self-guided training (Wei et al. 2024): dense weights help low-rank layers to start.

While training, a low-rank layer outputs o = s W x + (1 - s) B A x, where W is a dense weight, its
guide. The dense weight's share s falls from 1 to 0 along a cosine; after that only the factors are
left. In the reduced variant, which needs fewer operations, a step mixes in the dense weight only
with probability s. In training from scratch W is trained too, as in the paper. In finetuning W is
the weight of the dense teacher and does not change.
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

# the dense weight's share is 0 after this share of the steps
GUIDED_SHARE_OF_STEPS = 0.5
GUIDE_NAME = "guide"  # of the dense layer, as a submodule of the low-rank one

GuidePairs = Sequence[tuple[LowRankLinear, nn.Module]]  # (low-rank layer, its dense guide)


class Guidance(TrainerCallback):  # type: ignore[misc]
    """The share of the dense weights in each step, which depends on the step and the seed alone.

    `steps` are those of the whole training. With `reduced` the share is 0 in a growing number of
    steps. `guided_layers` is the number of layers with a guide, once `guiding` was entered.
    """

    def __init__(self, steps: int, reduced: bool, seed: int) -> None:
        self.steps = max(1, round(GUIDED_SHARE_OF_STEPS * steps))
        self.reduced, self.seed = reduced, seed
        self.share = 1.0
        self.guided_layers = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.share = self.share_of(state.global_step)

    def share_of(self, step: int) -> float:
        """The dense weights' share of a layer's output in a step; at 0 they are not computed."""
        share = (1 + math.cos(math.pi * min(1.0, step / self.steps))) / 2
        return share if not self.reduced or self._is_drawn(step, share) else 0.0

    def _is_drawn(self, step: int, probability: float) -> bool:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return float(torch.rand((), generator=generator)) < probability

    @property
    def guided_steps(self) -> int:
        """The number of steps in which the dense weights are computed."""
        return sum(self.share_of(step) > 0 for step in range(self.steps))

    @contextmanager
    def guiding(self, pairs: GuidePairs, train_guides: bool = False) -> Iterator[None]:
        """Inside, each low-rank layer mixes in the output of its guide while it trains.

        With `train_guides` the guides are submodules of the layers inside, so that they train with
        the model and are in its checkpoints.
        """
        self.guided_layers = len(pairs)
        with ExitStack() as stack:
            for layer, guide in pairs:
                if train_guides:
                    layer.add_module(GUIDE_NAME, guide)
                    stack.callback(delattr, layer, GUIDE_NAME)
                stack.callback(layer.register_forward_hook(self._mixing_hook(guide)).remove)
            yield

    def _mixing_hook(self, guide: nn.Module) -> Any:
        def mix(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not layer.training or self.share == 0:
                return output
            dense: Tensor = guide(arguments[0].to(next(guide.parameters()).dtype))
            return torch.lerp(output, dense.to(output.dtype), self.share)

        return mix


def guide_pairs(model: nn.Module, dense_modules: Mapping[str, nn.Module]) -> GuidePairs:
    """The low-rank layers of `model`, each with the dense module of the same name and shape.

    Raises InputError where there is none: the layers of a narrowed FFN have other shapes.
    """
    pairs = [
        (layer, dense_modules[name])
        for name, layer in compressed_layers(model)
        if isinstance(layer, LowRankLinear)
        and is_linear(dense_modules.get(name))
        and linear_shape(layer) == linear_shape(dense_modules[name])
    ]
    if not pairs:
        raise InputError(
            "self-guided training needs low-rank layers of the dense shape and every FFN is "
            "narrowed: factorize with --method fisher, or leave --self-guided out"
        )
    return pairs
