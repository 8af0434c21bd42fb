"""Upper bounds on the memory and disk of a streaming run, computed before it starts."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompress.compression.calibration.probes import held_out
from lrcompress.compression.footprint import ALLOWANCE, FLOAT32, WorkSpace
from lrcompress.compression.planning import Planning
from lrcompress.layers.bfloat16_linears import copied_bytes
from lrcompress.layers.model_info import weight_bytes
from lrcompress.runtime.memory import resident


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
    """What a footprint depends on; `steps` have no samples where no text is read.

    `writes_text` tells whether the model writes text, for which all of it is in memory.
    """

    steps: WorkSpace
    planning: Planning
    gradient_samples: int
    writes_text: bool = False

    def footprint(self) -> Footprint:
        return Footprint(self.memory(resident()), self.disk())

    def memory(self, libraries: int) -> int:
        """`libraries` are the bytes that the process holds before the start."""
        writing = self.steps.writing_model() if self.writes_text else 0
        return libraries + ALLOWANCE + max(writing, self._streaming())

    def _streaming(self) -> int:
        """The weights outside the blocks, two blocks and their moments, and one sample."""
        steps = self.steps
        outside = weight_bytes(steps.model) - sum(map(weight_bytes, steps.blocks))
        activations = max(steps.activations(), steps.logits())
        return (
            outside
            + 2 * steps.largest_block
            + self._bfloat16_copies()
            + 2 * max(steps.moments_by_block())  # sums, and means of them
            + max(activations, steps.algebra(), steps.training())
        )

    def _bfloat16_copies(self) -> int:
        """Copies of the linears outside the blocks and of those in one."""
        if not self.steps.needs_gradients:
            return 0
        model = self.steps.model
        by_block = [copied_bytes(model, block) for block in self.steps.blocks]
        return copied_bytes(model) - sum(by_block) + max(by_block)

    def disk(self) -> int:
        return self._activations_on_disk() + sum(map(weight_bytes, self.steps.blocks))

    def _activations_on_disk(self) -> int:
        """Hidden states in front of blocks, gradients, and the streams of sequential stages."""
        steps, gradients = self.steps, self.planning.needs_gradients
        all_blocks = self.planning.needs_measurement or gradients
        blocks = len(steps.blocks) + 1 if all_blocks else 2
        gradient_samples = self.gradient_samples if gradients else 0
        if gradient_samples:
            gradient_samples += len(held_out(steps.samples))
        tensors = blocks * (steps.samples + min(gradient_samples, steps.samples))
        streams = 4 * (steps.settings.sequential == "anchored")
        streams += 8 * FLOAT32 // int(steps.model.dtype.itemsize) * steps.refined
        return steps.sample_states * (tensors + streams * steps.samples)
