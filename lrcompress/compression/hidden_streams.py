"""Hidden states of a text in front of one block, in the dense and in the compressed model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrcompress.layers.block_runner import BlockRunner


class HiddenStreams(BlockRunner):
    """The hidden states (1, length, width) of every sample in front of one block, in two streams.

    `dense` and `compressed` both start at the embedding of `tokens` (samples, length); the caller
    replaces them as it moves from block to block. States have the dtype `dtype`, by default the
    model's own.
    """

    def __init__(self, model: Any, tokens: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__(model, tokens, dtype)
        self.dense = [self.embedded(sample) for sample in tokens]
        self.compressed = list(self.dense)

    def adds_to_residual(self, block: int, name: str) -> bool:
        """Whether the linear's output is added to the block's output unchanged.

        Tested by shifting the linear's output: the block's output has to move by the same. The
        shift is as large as the outputs, so that rounding in low precision does not hide it.
        """
        module = self.model.get_submodule(name)
        plain = self.run(block, self.compressed[0], outputs_of=(name,))
        shift = torch.maximum(plain.outputs[name].abs().mean(), plain.output.abs().mean())
        hook = module.register_forward_hook(lambda _, __, output: output + shift)
        try:
            moved = self.run(block, self.compressed[0]).output
        finally:
            hook.remove()
        difference = (moved - plain.output) / shift - 1
        return float(difference.abs().mean()) < 1e-2
