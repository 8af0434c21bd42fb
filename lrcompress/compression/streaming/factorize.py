"""`factorize` for a model larger than memory: one block at a time, from folder to folder.

The weights of one block, its moments and the activations of one sample are in memory. Hidden
states, gradients, candidates and finished blocks are kept in a folder, from which an interrupted
run resumes. Several processes share the samples and the blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from lrcompress.compression.planning import (
    Planning,
    PreparedModel,
    check_weights,
    plan_model,
    selected_keep_ratio,
)
from lrcompress.compression.refined_block import RefinedBlock
from lrcompress.compression.replace_layers import LinearResult
from lrcompress.compression.result import DenseModel, Factorization, factorization_of
from lrcompress.compression.serving import Serving, check_target
from lrcompress.compression.streaming.block_compressor import BlockCompressor
from lrcompress.compression.streaming.block_store import BlockFiles
from lrcompress.compression.streaming.source import StreamingSource
from lrcompress.config.recipe import Recipe
from lrcompress.layers.experts import fused_experts
from lrcompress.layers.ffn_layouts import select
from lrcompress.layers.lowrank import rebuild, tied_modules
from lrcompress.layers.token_ids import notice_missing_rows
from lrcompress.methods.plan import Plan
from lrcompress.methods.types import LinearSpec
from lrcompress.models.offload import OffloadedModel
from lrcompress.runtime.distributed import is_main, run_on_all, shard_of
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, ShowMessage
from lrcompress.runtime.stage_costs import stage


class StreamingCompressor:
    """Takes one model through the stages: plan, compress block by block, count.

    `work` is a folder for this model and these settings alone; `say` receives a sentence on the
    memory and disk that will be needed.
    """

    def __init__(
        self,
        recipe: Recipe,
        offloaded: OffloadedModel,
        work: Path,
        progress: Progress,
        say: ShowMessage,
    ) -> None:
        self.recipe, self.offloaded, self.work, self.progress = recipe, offloaded, work, progress
        self.started = time.perf_counter()
        model, settings = offloaded.model, recipe.factorize
        _refuse_experts(model, settings.include)
        self.linears = select(model, settings.include, settings.exclude, settings.dense_first)
        _refuse_used_elsewhere(model, self.linears)
        check_target(model, self.linears, settings)
        keep_ratio = selected_keep_ratio(model, self.linears, settings)
        serving = Serving.of(model, self.linears, settings, progress)
        self.planning = Planning.of(settings, keep_ratio, serving)
        if not self.planning.method.requires:  # other methods read text, which is checked
            notice_missing_rows(model, offloaded.tokenizer)
        self.files = BlockFiles(work)
        self.source = StreamingSource(
            recipe=recipe,
            offloaded=offloaded,
            linears=self.linears,
            planning=self.planning,
            work=work,
            progress=progress,
            say=say,
        )

    def run(self) -> Factorization:
        """Leaves the finished blocks in the work folder, and the model with empty layers."""
        prepared = plan_model(self.offloaded.model, self.linears, self.planning, self.source)
        plan = prepared.plan
        assert plan is not None
        run_on_all(lambda: self._compress(prepared, plan))
        return run_on_all(lambda: self._result(prepared))

    @property
    def shards(self) -> list[Path]:
        """The weight files of all blocks, in order."""
        return [self.files.weights(index) for index in range(self.offloaded.count)]

    @torch.no_grad()
    def _compress(self, prepared: PreparedModel, plan: Plan) -> None:
        """Compresses every block that is not finished.

        Where a block depends on those before it, the main process compresses all.
        """
        with self.offloaded.resident(0):
            blocks = BlockCompressor(self.source.session, self.recipe, prepared, plan, self.work)
        indices: Sequence[int] = range(self.offloaded.count)
        if not blocks.is_sequential:
            indices = shard_of(indices)
        elif not is_main():
            indices = ()
        missing = [index for index in indices if not self.files.has(index)]
        if missing:
            blocks.go_to(missing[0])
        for index in self.progress(missing, "Factorizing", len(missing)):
            self._compress_block(index, prepared, blocks)
            blocks.finish(index)
            self.source.drop(index)

    def _compress_block(self, index: int, prepared: PreparedModel, blocks: BlockCompressor) -> None:
        specs = self.source.linears_of(index)
        if specs:
            self.source.reach(index)
        with self.offloaded.resident(index) as block:
            check_weights(self.offloaded.model, specs)
            moments = self.source.moments(index) if specs else None
            linears, refined = blocks.block(
                index, replace(prepared, linears=specs, moments=moments)
            )
            record = {
                "linears": [linear.to_dict() for linear in linears],
                "refined": [] if refined is None else [asdict(refined)],
            }
            with stage("saving"):
                self.files.write(index, self.offloaded.stored(index, block), record)

    def _result(self, prepared: PreparedModel) -> Factorization:
        """Reads the records of all blocks, and gives the model its layers, which stay empty."""
        model = self.offloaded.model
        records = [self.files.record(index) for index in range(self.offloaded.count)]
        specs = {spec.name: spec for spec in self.linears}
        linears = tuple(
            LinearResult.from_dict(content, specs[content["name"]])
            for record in records
            for content in record["linears"]
        )
        refined = tuple(
            RefinedBlock(**content) for record in records for content in record["refined"]
        )
        before = DenseModel.of(model, self.started)
        rebuild(
            model,
            {linear.spec.name: linear.layout for linear in linears if linear.form is not None},
        )
        return factorization_of(
            model, before, prepared, linears, refined, self.source.session.fingerprint
        )


def _refuse_experts(model: nn.Module, include: Sequence[str]) -> None:
    if not include and any(fused_experts(model)):
        raise InputError(
            "streaming does not factorize mixtures of experts: leave --streaming out, or name "
            "other linears with --include, such as --include '*.shared_expert.*'"
        )


def _refuse_used_elsewhere(model: nn.Module, linears: Iterable[LinearSpec]) -> None:
    """Raises InputError where the block alone does not tell what a linear reads."""
    for spec in linears:
        if spec.mixture or tied_modules(model, spec.name):
            owner = "an expert of a mixture" if spec.mixture else "shared with other blocks"
            raise InputError(
                f"streaming does not factorize {spec.name}, which is {owner}: leave --streaming "
                "out, or exclude it by name"
            )
