"""What streaming measures on one block at a time: candidates to plan from, and moments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lrcompress.compression.calibration.moments import MomentStatistics
from lrcompress.compression.footprint import work_space
from lrcompress.compression.planning import ModelCandidates, Planning, check_weights, ffns_of
from lrcompress.compression.streaming.block_moments import BlockMoments
from lrcompress.compression.streaming.block_store import BlockFiles
from lrcompress.compression.streaming.footprint import Footprint, FootprintInputs
from lrcompress.compression.streaming.streamed_calibration import StreamedCalibration
from lrcompress.config.recipe import Recipe
from lrcompress.data.corpora import SELF
from lrcompress.methods.types import LinearSpec
from lrcompress.models.offload import OffloadedModel
from lrcompress.runtime.distributed import run_on_all, shard_of, world_size
from lrcompress.runtime.progress import Progress, ShowMessage
from lrcompress.runtime.stage_costs import expect_memory


@dataclass
class StreamingSource:
    """The PlanningSource of a model of which one block at a time is in memory.

    Candidates are kept in the folder `work`. Moments are measured again for each block, since
    those of all blocks do not fit in memory. `say` receives a sentence on memory and disk.
    """

    recipe: Recipe
    offloaded: OffloadedModel
    linears: tuple[LinearSpec, ...]
    planning: Planning
    work: Path
    progress: Progress
    say: ShowMessage

    def __post_init__(self) -> None:
        self.files = BlockFiles(self.work)
        self.steps = work_space(self.offloaded.model, self.linears, self.recipe)
        self.session = StreamedCalibration(
            self.recipe,
            self.offloaded,
            self.linears,
            self.steps.writing_model(),
            self.work,
            self.progress,
        )
        self._block_moments: BlockMoments | None = None

    def linears_of(self, index: int) -> tuple[LinearSpec, ...]:
        """The selected linears of block number `index`."""
        return tuple(spec for spec in self.linears if spec.block == index)

    def calibrate(self, needs_moments: bool) -> None:
        """Says the footprint, then runs the passes from which moments of any block follow."""
        is_sequential = self.recipe.factorize.sequential == "anchored" or self.recipe.refine.enabled
        footprint = self._footprint(needs_moments or is_sequential)
        self.say(f"Streaming needs {footprint}.")
        expect_memory(footprint.memory)
        if needs_moments:
            calibration = self.recipe.calibration
            samples = calibration.gradient_samples if self.planning.needs_gradients else 0
            self._block_moments = BlockMoments(
                self.offloaded,
                self.linears,
                self.session.tokens,
                samples,
                self.work,
                self.session.labels,
            )
            self._block_moments.run(self.progress)

    def _footprint(self, reads_text: bool) -> Footprint:
        """Reads the calibration text, if any stage will, to know its size.

        Text that the model writes has the size that was asked for.
        """
        writes_text = reads_text and SELF in self.recipe.calibration.data
        steps = self.steps
        if not writes_text:
            samples, length = self.session.tokens.shape if reads_text else (0, 0)
            steps = replace(steps, samples=samples, length=length)
        gradient_samples = self.recipe.calibration.gradient_samples
        return FootprintInputs(steps, self.planning, gradient_samples, writes_text).footprint()

    def candidates(self, moments: MomentStatistics | None) -> ModelCandidates:
        """The candidates of all blocks; `moments` are ignored, each block's are measured here."""
        blocks = sorted({spec.block for spec in self.linears})
        run_on_all(lambda: self._measure_candidates(shard_of(blocks)))
        return ModelCandidates.joined(
            self.files.candidates(index, self.linears) for index in blocks
        )

    def _measure_candidates(self, blocks: Iterable[int]) -> None:
        missing = [index for index in blocks if not self.files.has_candidates(index)]
        for index in self.progress(missing, "Measuring choices", len(missing)):
            specs = self.linears_of(index)
            self.reach(index)
            with self.offloaded.resident(index):
                check_weights(self.offloaded.model, specs)
                self.files.write_candidates(index, self._block_candidates(index, specs))

    def _block_candidates(self, index: int, specs: Sequence[LinearSpec]) -> ModelCandidates:
        model, moments = self.offloaded.model, self.moments(index)
        candidates = self.planning.candidates(ffns_of(model, specs, moments))
        if self._block_moments is None:
            return candidates
        measure = partial(self._block_moments.errors, index)
        return self.planning.corrected(ffns_of(model, specs, moments), candidates, measure)

    def reach(self, index: int) -> None:
        """Computes what block number `index` reads, where its moments will be measured."""
        if self._block_moments is not None:
            self._block_moments.reach(index)

    def moments(self, index: int) -> MomentStatistics | None:
        """Those of block number `index`, reached and resident; None where none are needed."""
        return None if self._block_moments is None else self._block_moments.moments(index)

    def drop(self, index: int) -> None:
        """Drops what block number `index` reads, unless it may be read once more."""
        read_once = not self.planning.needs_measurement and not self.planning.needs_gradients
        if self._block_moments is not None and read_once and world_size() == 1:
            self._block_moments.drop(index)
