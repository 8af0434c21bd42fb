"""What becomes of one block: shrunk by itself or anchored, and refined; streams kept on disk.

With anchored fits or refinement a block depends on the streams in front of it, which the blocks
before it made; a walk through the blocks can go on from any block that it has reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lrcompress.compression.anchored import AnchoredWalk
from lrcompress.compression.calibration.session import CalibrationSession
from lrcompress.compression.hidden_streams import HiddenStreams
from lrcompress.compression.planning import PreparedModel
from lrcompress.compression.refine import Refinement
from lrcompress.compression.refined_block import RefinedBlock
from lrcompress.compression.replace_layers import LinearResult, replacements_of_ffn
from lrcompress.compression.streaming.block_store import StreamFiles
from lrcompress.config.recipe import Recipe
from lrcompress.layers.lowrank import install
from lrcompress.methods.plan import Plan


class BlockCompressor:
    """Through the blocks of the model of `text`; the first one has to hold its weights.

    `work` keeps both streams of hidden states in front of the block that comes next.
    """

    def __init__(
        self,
        text: CalibrationSession,
        recipe: Recipe,
        prepared: PreparedModel,
        plan: Plan,
        work: Path,
    ) -> None:
        self.model, self.plan, self.form = text.model, plan, recipe.factorize.form
        self.streams: dict[StreamFiles, HiddenStreams] = {}
        self.anchoring: AnchoredWalk | None = None
        self.refinement: Refinement | None = None
        if recipe.factorize.sequential == "anchored":
            streams = HiddenStreams(self.model, text.tokens)
            parts = (self.model, prepared, plan, self.form, streams)
            self.anchoring = AnchoredWalk(*parts, recipe.factorize.anchor_damping)
            self.streams[StreamFiles(work / "anchored")] = streams
        if recipe.refine.enabled:
            self.refinement = Refinement(self.model, {}, prepared, text.tokens, recipe.refine)
            self.streams[StreamFiles(work / "refined")] = self.refinement.streams

    @property
    def is_sequential(self) -> bool:
        """Whether a block depends on those before it."""
        return bool(self.streams)

    def go_to(self, index: int) -> None:
        """The next block is number `index`, which an earlier walk had reached."""
        for kept, streams in self.streams.items():
            if index:
                streams.dense, streams.compressed = kept.read(index, len(streams.dense))

    def block(
        self, index: int, prepared: PreparedModel
    ) -> tuple[list[LinearResult], list[RefinedBlock]]:
        """Shrinks block number `index`, which is resident; `prepared` has its linears alone."""
        originals = {s.name: self.model.get_submodule(s.name) for s in prepared.linears}
        if self.anchoring is None:
            done = list(self._independent(prepared))
        else:
            self.anchoring.prepared = prepared
            done = list(self.anchoring.block(index, list(prepared.ffns(self.model))))
        refined: list[RefinedBlock] = []
        if self.refinement is not None:
            self.refinement.originals, self.refinement.prepared = originals, prepared
            refined = list(self.refinement.block(index, None))
        for kept, streams in self.streams.items():
            kept.write(index + 1, (streams.dense, streams.compressed))
        return done, refined

    def finish(self, index: int) -> None:
        """Block number `index` is kept: the streams in front of it are needed no more."""
        for kept in self.streams:
            kept.drop(index)

    def _independent(self, prepared: PreparedModel) -> Iterator[LinearResult]:
        for ffn in prepared.ffns(self.model):
            for what, layer in list(
                replacements_of_ffn(self.model, ffn, prepared, self.plan, self.form)
            ):
                if layer is not None:
                    install(self.model, what.spec.name, layer)
                yield what
