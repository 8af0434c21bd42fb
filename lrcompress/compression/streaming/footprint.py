"""What a streaming run will need at most, said before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import nn

from lrcompress.compression.calibration.probes import held_out
from lrcompress.compression.planning import Planning
from lrcompress.config.recipe import Recipe
from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.layers.model_info import weight_bytes
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.memory import resident

FLOAT32, FLOAT64 = 4, 8
# libraries that are loaded later, and what the allocator keeps
ALLOWANCE = 256 * 2**20


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory of the whole process, and bytes in the folder where it keeps its work."""

    memory: int
    disk: int

    def __str__(self) -> str:
        memory, disk = (f"{size / 2**20:,.1f} MiB" for size in (self.memory, self.disk))
        return f"at most {memory} of memory, and {disk} of disk beside the output"


@dataclass(frozen=True)
class FootprintInputs:
    """On which a footprint depends; `samples` and `length` are 0 where no text is read."""

    model: Any
    linears: Sequence[LinearSpec]
    planning: Planning
    recipe: Recipe
    samples: int
    length: int

    def footprint(self) -> Footprint:
        outside = weight_bytes(self.model) - sum(map(weight_bytes, self._blocks))
        steps = (self._activations(), self._algebra(), self._training())
        memory = resident() + ALLOWANCE + outside + 2 * self._block + self._moments() + max(steps)
        return Footprint(memory, self._states(kept=True) + sum(map(weight_bytes, self._blocks)))

    @property
    def _blocks(self) -> nn.ModuleList:
        return find_blocks(self.model)[1]

    @property
    def _block(self) -> int:
        return max(map(weight_bytes, self._blocks))

    @property
    def _gradients(self) -> bool:
        return self.planning.gradients

    def _states(self, kept: bool) -> int:
        """Of all samples in front of one block; `kept` are those of all blocks, and gradients."""
        config, size = self.model.config, int(self.model.dtype.itemsize)
        one = self.length * int(config.get_text_config(decoder=True).hidden_size) * size
        if not kept:
            return self.samples * one
        asked = self.recipe.calibration.gradient_samples if self._gradients else 0
        blocks = len(self._blocks) + 1 if not self.planning.is_early or self._gradients else 2
        streams = 4 * (self.recipe.factorize.sequential == "anchored")
        streams += 8 * FLOAT32 // size * self.recipe.refine.enabled
        kept_gradients = min(asked + len(held_out(self.samples)), self.samples) if asked else 0
        return one * (blocks * (self.samples + kept_gradients) + streams * self.samples)

    def _activations(self) -> int:
        """Of one sample in a block, with what a backward pass keeps; and its logits."""
        config = self.model.config.get_text_config(decoder=True)
        passed = sum(sum(p.shape) for p in self._blocks[0].parameters() if p.ndim == 2)
        inside: int = self.length * passed * 2 * FLOAT32
        inside += self.length**2 * config.num_attention_heads * FLOAT32
        logits: int = self.length * config.vocab_size * 4 * FLOAT32 * self._gradients
        return max(inside, logits)

    def _moments(self) -> int:
        """Sums and means of one block."""
        if not self.planning.method.requires:
            return 0
        numbers: Counter[int] = Counter()
        for _, group in groupby(self.linears, lambda spec: spec.block):
            specs = list(group)
            inputs = {spec.input_group: spec.in_features for spec in specs}
            numbers[specs[0].block] += sum(2 * FLOAT64 * size**2 for size in inputs.values())
            if self._gradients:
                numbers[specs[0].block] += sum(2 * FLOAT32 * s.out_features**2 for s in specs)
        return max(numbers.values())

    def _algebra(self) -> int:
        """Of the largest linear: products of its size, roots of the smaller side's metric."""
        sides = [sorted((s.in_features, s.out_features)) for s in self.linears]
        numbers = max(4 * m * n + 10 * m * m + 4 * n * n for m, n in sides)
        if self.planning.method.narrows:
            numbers += 8 * max(spec.in_features for spec in self.linears) ** 2
        return numbers * FLOAT64

    def _training(self) -> int:
        """Of the streams and, for a refined block, its optimizer and the copies of its weights."""
        ratio: int = FLOAT32 // self.model.dtype.itemsize
        held: int = 6 * self._states(kept=False) * (self.recipe.factorize.sequential == "anchored")
        if self.recipe.refine.enabled:
            held += 4 * ratio * self._states(kept=False) + 8 * ratio * self._block
        return held
