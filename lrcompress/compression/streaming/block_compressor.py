"""Compresses one block: replaces its layers, anchored or not, and refines them.

With anchored fits or refinement a block depends on the streams of hidden states in front of it,
which the blocks before it made. The streams are kept on disk, so that the work can resume at any
block that was reached.
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
from lrcompress.runtime.stage_costs import stage


class BlockCompressor:
    """Compresses the blocks of the model of `session` in order.

    The first block has to be resident when this is made. The folder `work` keeps both streams of
    hidden states in front of the next block.
    """

    def __init__(
        self,
        session: CalibrationSession,
        recipe: Recipe,
        prepared: PreparedModel,
        plan: Plan,
        work: Path,
    ) -> None:
        self.model, self.plan = session.model, plan
        self.streams: dict[StreamFiles, HiddenStreams] = {}
        self.anchoring: AnchoredWalk | None = None
        self.refinement: Refinement | None = None
        if recipe.factorize.sequential == "anchored":
            streams = HiddenStreams(self.model, session.tokens)
            damping = recipe.factorize.anchor_damping
            self.anchoring = AnchoredWalk(self.model, prepared, plan, streams, damping)
            self.streams[StreamFiles(work / "anchored")] = streams
        if recipe.refine.enabled:
            self.refinement = Refinement(self.model, session.tokens, recipe.refine)
            self.streams[StreamFiles(work / "refined")] = self.refinement.streams

    @property
    def is_sequential(self) -> bool:
        """Whether a block depends on those before it."""
        return bool(self.streams)

    def go_to(self, index: int) -> None:
        """Makes block number `index` the next one; an earlier run has to have reached it."""
        for files, streams in self.streams.items():
            if index:
                streams.dense, streams.compressed = files.read(index, len(streams.dense))

    def block(
        self, index: int, prepared: PreparedModel
    ) -> tuple[list[LinearResult], RefinedBlock | None]:
        """Compresses block number `index`, which is resident; `prepared` has its linears alone."""
        originals = {s.name: self.model.get_submodule(s.name) for s in prepared.linears}
        with stage("factors"):
            if self.anchoring is None:
                linears = list(self._independent(prepared))
            else:
                linears = list(self.anchoring.block(index, list(prepared.ffns(self.model))))
        refined = None
        if self.refinement is not None:
            with stage("refinement"):
                refined = self.refinement.block(index, prepared, originals, file=None)
        for files, streams in self.streams.items():
            files.write(index + 1, (streams.dense, streams.compressed))
        return linears, refined

    def finish(self, index: int) -> None:
        """Drops the streams in front of block number `index`, which is saved."""
        for files in self.streams:
            files.drop(index)

    def _independent(self, prepared: PreparedModel) -> Iterator[LinearResult]:
        for ffn in prepared.ffns(self.model):
            for replacement in list(replacements_of_ffn(self.model, ffn, prepared, self.plan)):
                if replacement.layer is not None:
                    install(self.model, replacement.result.spec.name, replacement.layer)
                yield replacement.result
