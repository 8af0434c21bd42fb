"""How much memory a factorization takes, from shapes alone, before anything is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, Self

from torch import nn

from lrcompress.compression.calibration.activations import block_activations, kept_blocks
from lrcompress.config import FactorizeSettings
from lrcompress.config.recipe import Recipe
from lrcompress.data.corpora import SELF
from lrcompress.data.generated import DOCUMENTS_PER_BATCH, MAX_DOCUMENT_LENGTH
from lrcompress.layers.bfloat16_linears import copied_bytes
from lrcompress.layers.block_runner import TOKENS_PER_CHUNK
from lrcompress.layers.ffn_layouts import find_blocks, select
from lrcompress.layers.model_info import (
    config_number,
    hidden_size,
    sequence_length,
    weight_bytes,
)
from lrcompress.layers.moe import unpacked
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.memory import gibibytes

# bytes of a number
FLOAT32, FLOAT64 = 4, 8
# bytes for memory that the allocator does not return
ALLOWANCE = 256 * 2**20
# bytes of Python, torch and transformers after a model was loaded, or of the context of a GPU
LIBRARIES = 512 * 2**20
# copies of logits that are in memory at a time: gradients of them, their softmax, random numbers
LOGITS_COPIES = 4


@dataclass(frozen=True)
class WorkSpace:
    """Bytes of the steps of a factorization, beside the weights of the model.

    `model` may be on the meta device. `samples` of text have `length` tokens each, both 0 where
    no text is read.
    """

    model: Any
    linears: Sequence[LinearSpec]
    settings: FactorizeSettings
    refined: bool
    samples: int
    length: int

    @property
    def needs_gradients(self) -> bool:
        return "gradient_moment" in self.settings.build_method().requires

    @property
    def blocks(self) -> nn.ModuleList:
        return find_blocks(self.model)[1]

    @property
    def largest_block(self) -> int:
        return max(map(weight_bytes, self.blocks))

    @property
    def sample_states(self) -> int:
        """The hidden states of one sample in front of one block."""
        return self.length * hidden_size(self.model) * int(self.model.dtype.itemsize)

    @property
    def stream(self) -> int:
        """The hidden states of all samples in front of one block."""
        return self.samples * self.sample_states

    def activations(self, blocks: int = 1) -> int:
        """Activations of one sample in `blocks` blocks, kept for a backward pass."""
        return blocks * block_activations(self.model, self.length)

    def logits(self) -> int:
        """Logits of some tokens of a sample, with their gradients."""
        tokens = min(self.length, TOKENS_PER_CHUNK)
        return self._logits(tokens) if self.needs_gradients else 0

    def _logits(self, tokens: int) -> int:
        vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        return tokens * vocabulary * LOGITS_COPIES * FLOAT32

    def writing(self) -> int:
        """Keys and values, and logits, of the documents that the model writes at a time."""
        length = min(self.length, MAX_DOCUMENT_LENGTH)
        documents = min(DOCUMENTS_PER_BATCH, self.samples * -(-self.length // length))
        states = documents * length
        heads = config_number(self.model, "num_attention_heads") or 1
        head = config_number(self.model, "head_dim") or hidden_size(self.model) // heads
        width = head * (config_number(self.model, "num_key_value_heads") or heads)
        cache = 2 * len(self.blocks) * states * width * int(self.model.dtype.itemsize)
        return cache + self._logits(documents)

    def writing_model(self) -> int:
        """The whole model while it writes."""
        if not self.length:
            return 0
        return weight_bytes(self.model) + copied_bytes(self.model) + self.writing()

    def moments_by_block(self) -> list[int]:
        """The sums of x xᵀ, and of g gᵀ where gradients are measured."""
        method = self.settings.build_method()
        if not method.requires:
            return [0]
        sizes: Counter[int] = Counter()
        for block, group in groupby(self.linears, lambda spec: spec.block):
            specs = list(group)
            inputs = {spec.input_group: spec.in_features for spec in specs}
            sizes[block] += sum(FLOAT64 * size**2 for size in inputs.values())
            if self.needs_gradients:
                sizes[block] += sum(FLOAT32 * spec.out_features**2 for spec in specs)
        return list(sizes.values())

    def algebra(self) -> int:
        """Work space of a decomposition of the largest linear, and of narrowing."""
        sides = [sorted((s.in_features, s.out_features)) for s in self.linears]
        numbers = max(4 * m * n + 10 * m * m + 4 * n * n for m, n in sides)
        if self.settings.build_method().narrows:
            numbers += 8 * max(spec.in_features for spec in self.linears) ** 2
        return numbers * FLOAT64

    def training(self) -> int:
        """Streams and, with refinement, the optimizer and copies of the weights of one block."""
        ratio: int = FLOAT32 // self.model.dtype.itemsize
        size: int = 6 * self.stream * (self.settings.sequential == "anchored")
        if self.refined:
            size += 4 * ratio * self.stream + 8 * ratio * self.largest_block
        return size


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory at the peak of a factorization in memory, by what takes them."""

    weights: int
    moments: int
    activations: int
    algebra: int
    libraries: int = LIBRARIES

    @classmethod
    def of(cls, model: Any, recipe: Recipe) -> Self:
        """The estimate for `model`, which may be on the meta device, from `recipe`.

        Raises InputError where the settings do not fit the model.
        """
        settings = recipe.factorize
        with unpacked(model):
            linears = select(model, settings.include, settings.exclude, settings.dense_first)
            return cls._of_steps(work_space(model, linears, recipe), recipe)

    @classmethod
    def _of_steps(cls, steps: WorkSpace, recipe: Recipe) -> Self:
        sums = steps.moments_by_block()
        multiplies = steps.needs_gradients or (steps.length and SELF in recipe.calibration.data)
        copies = copied_bytes(steps.model) if multiplies else 0
        passes = cls._passes(steps, recipe) + copies
        parameters = sum(linear.dense_parameters for linear in steps.linears)
        new_layers = parameters * int(steps.model.dtype.itemsize)
        # of the moments of one block, means are made
        algebra = max(sums) + new_layers + max(steps.algebra(), steps.training())
        # passes come first; what they free is used again
        beyond_passes = max(algebra - passes, 0)
        return cls(weight_bytes(steps.model), sum(sums), passes + ALLOWANCE, beyond_passes)

    @staticmethod
    def _passes(steps: WorkSpace, recipe: Recipe) -> int:
        """Activations and logits of the calibration, and the inputs of all blocks."""
        if not steps.length:
            return 0
        passes = steps.activations() + steps.logits()
        if steps.needs_gradients:
            kept = kept_blocks(steps.model, steps.length)
            # a block that is computed again has its own activations then
            passes += steps.activations(kept) + 2 * len(steps.blocks) * steps.sample_states
        return max(passes, steps.writing()) if SELF in recipe.calibration.data else passes

    @property
    def least(self) -> int:
        """What is certainly needed: the weights and all moments."""
        return self.weights + self.moments

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "moments": self.moments,
            "activations and logits": self.activations,
            "what linear algebra and new layers take beyond that": self.algebra,
            "libraries": self.libraries,
        }
        listed = ", ".join(f"{gibibytes(size)} for {name}" for name, size in parts.items())
        return f"about {gibibytes(self.total)} of memory: {listed}"


def work_space(model: Any, linears: Sequence[LinearSpec], recipe: Recipe) -> WorkSpace:
    """The steps that `recipe` asks for; without a number of samples, those of the default."""
    settings, calibration = recipe.factorize, recipe.calibration
    requires = settings.build_method().requires
    reads_text = requires or settings.sequential == "anchored" or recipe.refine.enabled
    only_self = set(calibration.data) == {SELF}
    most = calibration.max_generated_samples if only_self else calibration.max_samples
    return WorkSpace(
        model=model,
        linears=linears,
        settings=settings,
        refined=recipe.refine.enabled,
        samples=(calibration.num_samples or most) if reads_text else 0,
        length=sequence_length(model, calibration.seq_len) if reads_text else 0,
    )
