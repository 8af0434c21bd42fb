"""Block by block: each linear aims at the dense model's output, given what it really reads.

Once a block is compressed, the blocks after it read something else than they did in the dense
model. Two streams of hidden states go through the model side by side, one dense, one
compressed, and every linear is fitted to the dense stream's output from the compressed stream's
input before it is truncated (as SAES-SVD and AA-SVD do). The second-stage linear also takes
over the drift that the compressed stream has built up, where the block adds its output to the
residual stream as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lrcompress.compression.hidden_streams import HiddenStreams
from lrcompress.compression.planning import PreparedModel
from lrcompress.compression.replace_layers import LinearResult, replacement_of, replacements_of_ffn
from lrcompress.layers.block_runner import BlockOutput
from lrcompress.layers.lowrank import install
from lrcompress.layers.model_state import evaluation_mode
from lrcompress.methods.decomposition_cache import DecompositionCache
from lrcompress.methods.linalg import to_float64
from lrcompress.methods.plan import Plan
from lrcompress.methods.types import FFN, Form, LinearSpec
from lrcompress.runtime.errors import NotFiniteError
from lrcompress.runtime.progress import Progress

# an input with less than this share of the mean energy counts as having that much
SILENT = 1e-9


class RidgeFit:
    """Sums over tokens of v vᵀ and t vᵀ: least squares of targets t from inputs v."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.moment: Tensor | None = None
        self.cross: Tensor | None = None
        self.tokens = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Raises NotFiniteError where either has a number that is none."""
        v, t = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        moment, cross = to_float64(v.T @ v), to_float64(t.T @ v)
        self.moment = moment if self.moment is None else self.moment + moment
        self.cross = cross if self.cross is None else self.cross + cross
        self.tokens += len(v)
        if not bool(cross.isfinite().all() and moment.isfinite().all()):
            raise NotFiniteError(f"{self.what} is not finite: factorize with --dtype float32")

    def second_moment(self) -> Tensor:
        assert self.moment is not None
        return self.moment / self.tokens

    def weight(self, prior: Tensor, damping: float) -> Tensor:
        """argmin over W of E‖t - W v‖² + Σ_j ridge_j ‖W_j - prior_j‖², ridge_j = damping E v_j²."""
        assert self.moment is not None
        assert self.cross is not None
        sizes = self.moment.diagonal()
        least = SILENT * sizes.mean() if bool(sizes.any()) else torch.ones_like(sizes[0])
        ridge = damping * sizes.clamp_min(least)
        right = self.cross + to_float64(prior) * ridge
        solution: Tensor = torch.linalg.solve(self.moment + torch.diag(ridge), right.T)
        return solution.T


@torch.no_grad()
def apply_plan_anchored(
    model: Any,
    prepared: PreparedModel,
    plan: Plan,
    form: Form,
    tokens: Tensor,
    damping: float,
    progress: Progress,
) -> tuple[LinearResult, ...]:
    """`shrink`, with every linear fitted to the dense model's outputs in the order of blocks.

    Installs as it goes.
    """
    # what is fitted differs from plan to plan, so no decomposition serves two
    prepared = replace(prepared, decompositions=DecompositionCache(prepared.method))
    with evaluation_mode(model):
        anchoring = AnchoredWalk(model, prepared, plan, form, HiddenStreams(model, tokens), damping)
        return tuple(anchoring.blocks(progress))


@dataclass
class AnchoredWalk:
    """The walk through the blocks: `streams` are moved on, layers are installed."""

    model: Any
    prepared: PreparedModel
    plan: Plan
    form: Form
    streams: HiddenStreams
    damping: float

    def blocks(self, progress: Progress) -> Iterator[LinearResult]:
        count = len(self.streams.blocks)
        by_block = groupby(self.prepared.ffns(self.model), lambda ffn: ffn.linears[0].block)
        block, ffns = next(by_block, (count, iter(())))
        for index in progress(range(count), "Anchoring", count):
            here = list(ffns) if index == block else []
            yield from self.block(index, here)
            if here:
                block, ffns = next(by_block, (count, iter(())))

    def block(self, index: int, ffns: Sequence[FFN]) -> Iterator[LinearResult]:
        """What becomes of the linears of one block; then both streams are behind it."""
        streams = self.streams
        reads = [found.linears[0].name for found in ffns]
        gives = [s.name for found in ffns for s in found.linears if s.role == "down"]
        dense = [streams.run(index, hidden, reads, gives) for hidden in streams.dense]
        for found in ffns:
            yield from self._fit(index, found, dense)
        streams.dense = [done.output for done in dense]
        streams.compressed = [streams.run(index, h).output for h in streams.compressed]

    def _fit(self, index: int, ffn: FFN, dense: list[BlockOutput]) -> Iterator[LinearResult]:
        """First the linears that read the block's hidden state, then the one that reads theirs.

        Until its turn that one is dense, or narrowed.
        """
        first = [spec for spec in ffn.linears if spec.role != "down"]
        ffn = self._refitted(index, ffn, first, dense)
        names = {spec.name for spec in first}
        ranks = {name: rank for name, rank in self.plan.ranks.items() if name in names}
        plan = replace(self.plan, ranks=ranks)
        shrunk = replacements_of_ffn(self.model, ffn, self.prepared, plan, self.form)
        found = {what.spec.name: (what, layer) for what, layer in shrunk}
        for name, (_, layer) in found.items():
            if layer is not None:
                install(self.model, name, layer)
        for spec in ffn.linears:
            what = found[spec.name][0]
            changes = spec.name in self.plan.ranks or ffn.name in self.plan.widths
            if spec.role == "down" and changes:
                what = self._fit_down(index, ffn, spec, dense)
            yield what

    def _refitted(
        self, index: int, ffn: FFN, linears: Sequence[LinearSpec], dense: list[BlockOutput]
    ) -> FFN:
        """`ffn` with weights and second moments that fit the compressed stream's inputs."""
        if not linears:
            return ffn
        name = linears[0].name
        fit = RidgeFit(f"the input of {name}")
        for hidden, target in zip(self.streams.compressed, dense, strict=True):
            fit.add(self.streams.input_of(name, index, hidden), target.inputs[name])
        weights, statistics = dict(ffn.weights), dict(ffn.statistics)
        moment = fit.second_moment()
        eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        change = fit.weight(eye, self.damping)  # x_dense ~ change x
        for spec in linears:
            if spec.input_group == linears[0].input_group:
                weights[spec.name] = to_float64(weights[spec.name]) @ change
                statistics[spec.name] = replace(statistics[spec.name], second_moment=moment)
        return replace(ffn, weights=weights, statistics=statistics)

    def _fit_down(
        self, index: int, ffn: FFN, spec: LinearSpec, dense: list[BlockOutput]
    ) -> LinearResult:
        width = self.plan.widths.get(ffn.name)
        left = ffn
        if width is not None:
            left = self.prepared.method.narrow(ffn, self.prepared.channels[ffn.name][:width])
        fit = self._output_fit(index, spec, dense, left.biases[spec.name])
        weights = dict(left.weights) | {
            spec.name: fit.weight(left.weights[spec.name], self.damping)
        }
        moments = dict(left.statistics)
        moments[spec.name] = replace(moments[spec.name], second_moment=fit.second_moment())
        left = replace(left, weights=weights, statistics=moments)
        what, layer = replacement_of(
            self.model, left, spec, self.prepared.decompositions, self.plan, self.form
        )
        assert layer is not None
        install(self.model, spec.name, layer)
        return what

    def _output_fit(
        self, index: int, spec: LinearSpec, dense: list[BlockOutput], bias: Tensor | None
    ) -> RidgeFit:
        fit, streams = RidgeFit(f"the input or output of {spec.name}"), self.streams
        adds = streams.adds_to_residual(index, spec.name)
        for hidden, target in zip(streams.compressed, dense, strict=True):
            now = streams.run(index, hidden, (spec.name,), (spec.name,))
            wanted = target.outputs[spec.name]
            if adds:  # all that the block's output misses, not this linear's share alone
                wanted = target.output - (now.output - now.outputs[spec.name])
            fit.add(now.inputs[spec.name], wanted if bias is None else wanted - bias)
        return fit
