"""Upper bounds on the memory and disk of a streaming run, computed before it starts."""

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
from lrcompress.layers.block_runner import TOKENS_PER_CHUNK
from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.layers.model_info import weight_bytes
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.memory import resident

# bytes of a number
FLOAT32, FLOAT64 = 4, 8
# bytes for libraries that are loaded later, and for memory that the allocator does not return
ALLOWANCE = 256 * 2**20


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory of the whole process, and bytes of disk in its work folder."""

    memory: int
    disk: int

    def __str__(self) -> str:
        memory, disk = (f"{size / 2**20:,.1f} MiB" for size in (self.memory, self.disk))
        return f"at most {memory} of memory, and {disk} of disk beside the output"


@dataclass(frozen=True)
class FootprintInputs:
    """What a footprint depends on; `samples` and `length` are 0 where no text is read."""

    model: Any
    linears: Sequence[LinearSpec]
    planning: Planning
    recipe: Recipe
    samples: int
    length: int

    def footprint(self) -> Footprint:
        outside = weight_bytes(self.model) - sum(map(weight_bytes, self._blocks))
        steps = (self._activations(), self._algebra(), self._training())
        memory = (
            resident()
            + ALLOWANCE
            + outside
            + 2 * self._largest_block
            + self._moments()
            + max(steps)
        )
        return Footprint(memory, self._activations_on_disk() + sum(map(weight_bytes, self._blocks)))

    @property
    def _blocks(self) -> nn.ModuleList:
        return find_blocks(self.model)[1]

    @property
    def _largest_block(self) -> int:
        return max(map(weight_bytes, self._blocks))

    @property
    def _sample_states(self) -> int:
        """The hidden states of one sample in front of one block."""
        hidden_size = int(self.model.config.get_text_config(decoder=True).hidden_size)
        return self.length * hidden_size * int(self.model.dtype.itemsize)

    @property
    def _stream(self) -> int:
        """The hidden states of all samples in front of one block."""
        return self.samples * self._sample_states

    def _activations_on_disk(self) -> int:
        """Hidden states in front of blocks, gradients, and the streams of sequential stages."""
        gradients = self.planning.needs_gradients
        all_blocks = self.planning.needs_measurement or gradients
        blocks = len(self._blocks) + 1 if all_blocks else 2
        gradient_samples = self.recipe.calibration.gradient_samples if gradients else 0
        if gradient_samples:
            gradient_samples += len(held_out(self.samples))
        tensors = blocks * (self.samples + min(gradient_samples, self.samples))
        streams = 4 * (self.recipe.factorize.sequential == "anchored")
        streams += 8 * FLOAT32 // int(self.model.dtype.itemsize) * self.recipe.refine.enabled
        return self._sample_states * (tensors + streams * self.samples)

    def _activations(self) -> int:
        """Activations of one sample in a block, kept for a backward pass, or some of its logits."""
        config = self.model.config.get_text_config(decoder=True)
        widths = sum(sum(p.shape) for p in self._blocks[0].parameters() if p.ndim == 2)
        inside: int = self.length * widths * 2 * FLOAT32
        inside += self.length**2 * config.num_attention_heads * FLOAT32
        tokens = min(self.length, TOKENS_PER_CHUNK)
        logits: int = tokens * config.vocab_size * 4 * FLOAT32 * self.planning.needs_gradients
        return max(inside, logits)

    def _moments(self) -> int:
        """Sums and means of the block that needs most."""
        if not self.planning.method.requires:
            return 0
        numbers: Counter[int] = Counter()
        for _, group in groupby(self.linears, lambda spec: spec.block):
            specs = list(group)
            inputs = {spec.input_group: spec.in_features for spec in specs}
            numbers[specs[0].block] += sum(2 * FLOAT64 * size**2 for size in inputs.values())
            if self.planning.needs_gradients:
                numbers[specs[0].block] += sum(2 * FLOAT32 * s.out_features**2 for s in specs)
        return max(numbers.values())

    def _algebra(self) -> int:
        """Work space of a decomposition of the largest linear, and of narrowing."""
        sides = [sorted((s.in_features, s.out_features)) for s in self.linears]
        numbers = max(4 * m * n + 10 * m * m + 4 * n * n for m, n in sides)
        if self.planning.method.narrows:
            numbers += 8 * max(spec.in_features for spec in self.linears) ** 2
        return numbers * FLOAT64

    def _training(self) -> int:
        """Streams and, with refinement, the optimizer and copies of the weights of one block."""
        ratio: int = FLOAT32 // self.model.dtype.itemsize
        held: int = 6 * self._stream * (self.recipe.factorize.sequential == "anchored")
        if self.recipe.refine.enabled:
            held += 4 * ratio * self._stream + 8 * ratio * self._largest_block
        return held
