"""Anchored factorization: fits each linear to the dense model's output from its actual input.

Once a block is compressed, the blocks after it read other hidden states than in the dense model.
Two streams of hidden states go through the model side by side, one dense, one compressed. Before
it is truncated, every linear is fitted to give the dense stream's output from the compressed
stream's input, as in SAES-SVD and AA-SVD. Where a block adds the output of down_proj to the
residual stream unchanged, that linear also corrects the drift that the compressed stream has
accumulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lrcompress.compression.calibration.outliers import OutlierRows, clip_scales, outlier_rows
from lrcompress.compression.hidden_streams import HiddenStreams
from lrcompress.compression.planning import PreparedModel
from lrcompress.compression.replace_layers import (
    LinearResult,
    Replacement,
    replacement_of,
    replacements_of_ffn,
)
from lrcompress.layers.block_runner import BlockOutput
from lrcompress.layers.lowrank import install
from lrcompress.layers.model_state import evaluation_mode
from lrcompress.methods.decomposition_cache import DecompositionCache
from lrcompress.methods.linalg import to_float64
from lrcompress.methods.plan import Plan
from lrcompress.methods.types import FFN, LinearSpec
from lrcompress.runtime.errors import NotFiniteError
from lrcompress.runtime.progress import Progress

# the least energy of an input feature, as a share of the mean: keeps the ridge positive
MIN_RELATIVE_ENERGY = 1e-9


class RidgeFit:
    """Sums over tokens of v vᵀ and t vᵀ: least squares of targets t from inputs v.

    `subject` names the inputs and targets in errors.
    """

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.moment: Tensor | None = None
        self.cross: Tensor | None = None
        self.outliers = OutlierRows()
        self.tokens = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds tokens: `inputs` (..., in) and `targets` (..., out).

        Raises NotFiniteError where one has NaN or infinity.
        """
        v, t = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        moment, cross = to_float64(v.T @ v), to_float64(t.T @ v)
        self.moment = moment if self.moment is None else self.moment + moment
        self.cross = cross if self.cross is None else self.cross + cross
        norms = v.norm(dim=1)
        self.outliers.add(self.subject, outlier_rows(v, 1 - clip_scales(norms).square(), norms))
        self.tokens += len(v)
        if not bool(cross.isfinite().all() and moment.isfinite().all()):
            raise NotFiniteError(f"{self.subject} is not finite: factorize with --dtype float32")

    def second_moment(self) -> Tensor:
        """The mean of v vᵀ (in, in), with outliers scaled down."""
        return self._bulk / self.tokens

    @cached_property
    def _bulk(self) -> Tensor:
        """The sum of v vᵀ without what outliers add to it; read after the last `add`."""
        assert self.moment is not None
        outliers = self.outliers.product(self.subject)
        return self.moment if outliers is None else self.moment - outliers.to(self.moment.device)

    def weight(self, prior: Tensor, damping: float) -> Tensor:
        """argmin over W (out, in) of E‖t - W v‖² + Σ_j ridge_j ‖W_j - prior_j‖².

        W_j is column j, and ridge_j = `damping` E v_j², outliers scaled down: sinks would freeze
        every weight that reads them.
        """
        assert self.moment is not None
        assert self.cross is not None
        energies = self._bulk.diagonal().clamp_min(0)
        if bool(energies.any()):
            least = MIN_RELATIVE_ENERGY * energies.mean()
        else:
            least = torch.ones_like(energies[0])
        ridge = damping * energies.clamp_min(least)
        right_side = self.cross + to_float64(prior) * ridge
        solution: Tensor = torch.linalg.solve(self.moment + torch.diag(ridge), right_side.T)
        return solution.T


@torch.no_grad()
def apply_plan_anchored(
    model: Any,
    prepared: PreparedModel,
    plan: Plan,
    *,
    tokens: Tensor,
    damping: float,
    progress: Progress,
) -> tuple[LinearResult, ...]:
    """`apply_plan` with every linear fitted to the dense model's outputs on `tokens`.

    `tokens` are (samples, length). Layers are installed block by block: after an error some are.
    """
    # fitted weights differ from plan to plan, so no cached decomposition may be reused
    prepared = replace(prepared, decompositions=DecompositionCache(prepared.method))
    with evaluation_mode(model):
        walk = AnchoredWalk(model, prepared, plan, HiddenStreams(model, tokens), damping)
        return tuple(walk.blocks(progress))


@dataclass
class AnchoredWalk:
    """Fits the blocks in order: moves `streams` on and installs layers.

    `prepared` has to hold the linears and moments of the model for `blocks`, but not for `block`,
    which is given the FFNs.
    """

    model: Any
    prepared: PreparedModel
    plan: Plan
    streams: HiddenStreams
    damping: float

    def blocks(self, progress: Progress) -> Iterator[LinearResult]:
        """All blocks."""
        count = len(self.streams.blocks)
        ffns_by_block = groupby(self.prepared.ffns(self.model), lambda ffn: ffn.linears[0].block)
        next_block, next_ffns = next(ffns_by_block, (count, iter(())))
        for index in progress(range(count), "Anchoring", count):
            ffns = list(next_ffns) if index == next_block else []
            yield from self.block(index, ffns)
            if ffns:
                next_block, next_ffns = next(ffns_by_block, (count, iter(())))

    def block(self, index: int, ffns: Sequence[FFN]) -> Iterator[LinearResult]:
        """Replaces the linears of the block's `ffns`; then both streams are behind the block."""
        streams = self.streams
        reads = [ffn.linears[0].name for ffn in ffns]
        gives = [spec.name for ffn in ffns for spec in ffn.linears if spec.role == "down"]
        dense = [streams.run(index, hidden, reads, gives) for hidden in streams.dense]
        for ffn in ffns:
            yield from self._fit(index, ffn, dense)
        streams.dense = [target.output for target in dense]
        streams.compressed = [streams.run(index, h).output for h in streams.compressed]

    def _fit(self, index: int, ffn: FFN, dense: list[BlockOutput]) -> Iterator[LinearResult]:
        """Fits the linears that read the hidden state first, then down_proj, which reads theirs.

        Until its turn down_proj is dense, or narrowed.
        """
        first = [spec for spec in ffn.linears if spec.role != "down"]
        ffn = self._refitted(index, ffn, first, dense)
        names = {spec.name for spec in first}
        ranks = {name: rank for name, rank in self.plan.ranks.items() if name in names}
        first_plan = replace(self.plan, ranks=ranks)
        replacements = list(replacements_of_ffn(self.model, ffn, self.prepared, first_plan))
        for replacement in replacements:
            self._install(replacement)
        for replacement in replacements:
            spec = replacement.result.spec
            is_replaced = spec.name in self.plan.ranks or ffn.name in self.plan.widths
            if spec.role == "down" and is_replaced:
                yield self._fit_down(index, ffn, spec, dense)
            else:
                yield replacement.result

    def _install(self, replacement: Replacement) -> None:
        if replacement.layer is not None:
            install(self.model, replacement.result.spec.name, replacement.layer)

    def _refitted(
        self, index: int, ffn: FFN, linears: Sequence[LinearSpec], dense: list[BlockOutput]
    ) -> FFN:
        """`ffn` with weights and second moments of `linears` for the compressed stream's inputs."""
        if not linears:
            return ffn
        name = linears[0].name
        fit = RidgeFit(f"the input of {name}")
        for hidden, target in zip(self.streams.compressed, dense, strict=True):
            fit.add(self.streams.input_of(name, index, hidden), target.inputs[name])
        weights, statistics = dict(ffn.weights), dict(ffn.statistics)
        moment = fit.second_moment()
        identity = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        to_dense = fit.weight(identity, self.damping)  # x_dense ~ to_dense x_compressed
        for spec in linears:
            if spec.input_group == linears[0].input_group:
                weights[spec.name] = to_float64(weights[spec.name]) @ to_dense
                statistics[spec.name] = replace(statistics[spec.name], second_moment=moment)
        return replace(ffn, weights=weights, statistics=statistics)

    def _fit_down(
        self, index: int, ffn: FFN, spec: LinearSpec, dense: list[BlockOutput]
    ) -> LinearResult:
        narrowed = self.prepared.narrowed(ffn, self.plan)
        fit = self._output_fit(index, spec, dense, narrowed.biases[spec.name])
        weights, statistics = dict(narrowed.weights), dict(narrowed.statistics)
        weights[spec.name] = fit.weight(narrowed.weights[spec.name], self.damping)
        statistics[spec.name] = replace(statistics[spec.name], second_moment=fit.second_moment())
        fitted = replace(narrowed, weights=weights, statistics=statistics)
        replacement = replacement_of(self.model, fitted, spec, self.prepared, self.plan)
        self._install(replacement)
        return replacement.result

    def _output_fit(
        self, index: int, spec: LinearSpec, dense: list[BlockOutput], bias: Tensor | None
    ) -> RidgeFit:
        """Sums of down_proj's inputs and of the outputs that it should have, less its bias."""
        fit, streams = RidgeFit(f"the input or output of {spec.name}"), self.streams
        adds_to_residual = streams.adds_to_residual(index, spec.name)
        for hidden, target in zip(streams.compressed, dense, strict=True):
            current = streams.run(index, hidden, (spec.name,), (spec.name,))
            goal = target.outputs[spec.name]
            if adds_to_residual:  # then it can make up for all that the block's output lacks
                goal = target.output - (current.output - current.outputs[spec.name])
            fit.add(current.inputs[spec.name], goal if bias is None else goal - bias)
        return fit
