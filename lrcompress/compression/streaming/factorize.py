"""`factorize` for a model larger than memory: one block at a time, from folder to folder.

The weights of one block, its moments and the activations of one sample are in memory. Hidden
states, gradients, choices and finished blocks go to a folder, and an interrupted run goes on from
them. Several processes share the samples and the blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lrcompress.compression.calibration.moments import MomentStatistics
from lrcompress.compression.calibration.session import CalibrationSession
from lrcompress.compression.planning import (
    Planning,
    PreparedModel,
    check_weights,
    ffns_of,
    selected_share,
)
from lrcompress.compression.refined_block import RefinedBlock
from lrcompress.compression.replace_layers import LinearResult
from lrcompress.compression.result import Counts, Factorization, counts, probed, warnings_of
from lrcompress.compression.streaming.block_moments import BlockMoments
from lrcompress.compression.streaming.block_steps import BlockCompressor
from lrcompress.compression.streaming.block_store import BlockFiles, Found
from lrcompress.compression.streaming.footprint import Footprint, FootprintInputs
from lrcompress.config.recipe import Recipe
from lrcompress.data.corpora import SELF
from lrcompress.layers.experts import fused_experts
from lrcompress.layers.ffn_layouts import find_ffns, select
from lrcompress.layers.lowrank import rebuild
from lrcompress.layers.model_info import parameter_count
from lrcompress.methods.decomposition_cache import DecompositionCache
from lrcompress.methods.plan import Candidates, Plan
from lrcompress.methods.types import LinearSpec
from lrcompress.models.offload import OffloadedModel
from lrcompress.runtime.distributed import is_main, run_on_all, shard_of, world_size
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, Say


class StreamingCompressor:
    """One model on its way through the stages; `work` is a folder of this run's own."""

    def __init__(
        self,
        recipe: Recipe,
        source: OffloadedModel,
        work: Path,
        progress: Progress,
        say: Say,
    ) -> None:
        self.recipe, self.source, self.work, self.progress = recipe, source, work, progress
        self.settings, self.started = recipe.factorize, time.perf_counter()
        model, settings = source.model, self.settings
        _refuse_experts(model, settings.include)
        self.linears = select(model, settings.include, settings.exclude, settings.dense_first)
        self.share = selected_share(model, self.linears, settings)
        self.planning = Planning.of(settings, self.share)
        self.files = BlockFiles(work)
        calibration = recipe.calibration
        self.text = CalibrationSession(model, source.tokenizer, self.linears, calibration, progress)
        self.measured: BlockMoments | None = None
        self.say = say

    def run(self) -> Factorization:
        """Leaves the finished blocks in the work folder, and the model with empty layers."""
        prepared = self._prepared()
        plan = prepared.plan
        assert plan is not None
        run_on_all(lambda: self._shrink(prepared, plan))
        return run_on_all(lambda: self._finished(prepared, plan))

    @property
    def shards(self) -> list[Path]:
        """The weights of every block."""
        return [self.files.weights(index) for index in range(self.source.count)]

    def _specs(self, index: int) -> tuple[LinearSpec, ...]:
        return tuple(spec for spec in self.linears if spec.block == index)

    def _prepared(self) -> PreparedModel:
        """With a plan and without moments, which are measured again for each block."""
        planning, model, plan = self.planning, self.source.model, None
        choices: tuple[Candidates, ...] = ()
        channels: dict[str, torch.Tensor] = {}
        if planning.is_early:
            choices, channels = planning.choices(ffns_of(model, self.linears, None))
            plan = planning.plan(choices)
        walks = self.settings.sequential == "anchored" or self.recipe.refine.enabled
        reads = planning.reads_text(plan)
        self.say(f"Streaming needs {self._footprint(reads or walks)}.")
        if reads:
            self.measured = self._measure()
        if not planning.is_early:
            used = sorted({spec.block for spec in self.linears})
            run_on_all(lambda: self._find_choices(shard_of(used)))
            for index in used:
                found, orders = self.files.choices(index, self.linears)
                choices, channels = choices + found, channels | orders
            plan = planning.plan(choices)
        method, shared = planning.method, (None, choices, channels, self.share, plan)
        return PreparedModel(
            self.linears, method, planning.allocator, *shared, DecompositionCache(method)
        )

    def _footprint(self, reads_text: bool) -> Footprint:
        """Reads the text, if any stage will."""
        if reads_text and SELF in self.recipe.calibration.data:
            raise InputError(
                "--streaming cannot calibrate on text that the model writes, as every token takes "
                "the whole model: name a text with --calibration, such as pydoc or FILE.txt"
            )
        samples, length = self.text.tokens.shape if reads_text else (0, 0)
        parts = (self.source.model, self.linears, self.planning, self.recipe)
        return FootprintInputs(*parts, samples, length).footprint()

    def _measure(self) -> BlockMoments:
        samples = self.recipe.calibration.gradient_samples if self.planning.gradients else 0
        made = BlockMoments(self.source, self.linears, self.text.tokens, samples, self.work)
        made.run(self.progress)
        return made

    @property
    def _once(self) -> bool:
        """Whether moments are measured once, in the order of the blocks."""
        return self.planning.is_early and not self.planning.gradients and world_size() == 1

    def _reach(self, index: int) -> None:
        if self.measured is not None:
            self.measured.reach(index)

    def _moments(self, index: int) -> MomentStatistics | None:
        return None if self.measured is None else self.measured.moments(index)

    def _find_choices(self, blocks: Iterable[int]) -> None:
        missing = [index for index in blocks if not self.files.has_choices(index)]
        for index in self.progress(missing, "Measuring choices", len(missing)):
            specs = self._specs(index)
            self._reach(index)
            with self.source.resident(index):
                check_weights(self.source.model, specs)
                self.files.write_choices(index, self._choices(index, specs))

    def _choices(self, index: int, specs: Sequence[LinearSpec]) -> Found:
        planning, model, moments = self.planning, self.source.model, self._moments(index)
        choices, channels = planning.choices(ffns_of(model, specs, moments))
        if self.measured is not None:
            ffns, measure = ffns_of(model, specs, moments), partial(self.measured.errors, index)
            choices = planning.corrected(ffns, choices, channels, measure)
        return choices, channels

    @torch.no_grad()
    def _shrink(self, prepared: PreparedModel, plan: Plan) -> None:
        """Every block that is not finished; where one depends on another, in the main process."""
        with self.source.resident(0):
            walk = BlockCompressor(self.text, self.recipe, prepared, plan, self.work)
        every = range(self.source.count)
        alone = every if is_main() else range(0)
        own = alone if walk.is_sequential else shard_of(every)
        missing = [index for index in own if not self.files.has(index)]
        if missing:
            walk.go_to(missing[0])
        for index in self.progress(missing, "Factorizing", len(missing)):
            self._shrink_block(index, prepared, walk)
            walk.finish(index)
            if self.measured is not None and self._once:
                self.measured.drop(index)

    def _shrink_block(self, index: int, prepared: PreparedModel, walk: BlockCompressor) -> None:
        specs = self._specs(index)
        if specs:
            self._reach(index)
        with self.source.resident(index) as block:
            check_weights(self.source.model, specs)
            moments = self._moments(index) if specs else None
            done, refined = walk.block(index, replace(prepared, linears=specs, moments=moments))
            record = {
                "linears": [one.to_dict() for one in done],
                "refined": [asdict(one) for one in refined],
            }
            self.files.write(index, self.source.stored(index, block), record)

    def _finished(self, prepared: PreparedModel, plan: Plan) -> Factorization:
        model, form = self.source.model, self.settings.form
        records = [self.files.record(index) for index in range(self.source.count)]
        specs = {spec.name: spec for spec in self.linears}
        found = [one for record in records for one in record["linears"]]
        done = tuple(LinearResult.from_dict(one, specs[one["name"]]) for one in found)
        before, finding = parameter_count(model), find_ffns(model)
        rebuild(model, {one.spec.name: one.layout for one in done if one.form is not None})
        selected = counts(self.linears, plan, form)
        return Factorization(
            done,
            selected,
            counts(finding.linears, plan, form),
            Counts(before, parameter_count(model)),
            self.text.fingerprint,
            probed(prepared.choices),
            (),
            tuple(RefinedBlock(**one) for record in records for one in record["refined"]),
            tuple(warnings_of(done, finding.experts, (), selected, self.share)),
            time.perf_counter() - self.started,
        )


def _refuse_experts(model: nn.Module, include: Sequence[str]) -> None:
    if not include and any(fused_experts(model)):
        raise InputError(
            "streaming does not factorize mixtures of experts: leave --streaming out, or name "
            "other linears with --include, such as --include '*.shared_expert.*'"
        )
