"""Plans a compression: what could be done to each FFN, at what loss, and what will be done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from lrcompress.compression.calibration.moments import MomentStatistics
from lrcompress.compression.calibration.probes import Probe, corrected, probe_of
from lrcompress.compression.serving import Serving
from lrcompress.config import FactorizeSettings
from lrcompress.layers.ffn_layouts import linears_of
from lrcompress.layers.lowrank import dense_weight
from lrcompress.layers.model_info import parameter_count, weight_bytes
from lrcompress.layers.moe import unpacked
from lrcompress.methods.candidates import CandidateGrid, list_candidates
from lrcompress.methods.decomposition_cache import DecompositionCache
from lrcompress.methods.plan import Allocator, Budget, Candidates, Plan
from lrcompress.methods.types import FFN, Form, LinearSpec, Method, Statistics
from lrcompress.runtime.distributed import map_sharded
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress
from lrcompress.runtime.stage_costs import stage


@dataclass(frozen=True)
class ModelCandidates:
    """What a method could do to each FFN, in the order of the FFNs.

    `channels` has, by the name of each FFN that may be narrowed, its channels in the order in
    which they are kept.
    """

    ffns: tuple[Candidates, ...]
    channels: Mapping[str, Tensor]

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """The candidates of all parts of a model."""
        parts = tuple(parts)
        return cls(
            tuple(candidates for part in parts for candidates in part.ffns),
            {name: order for part in parts for name, order in part.channels.items()},
        )


@dataclass(frozen=True)
class PreparedModel:
    """The selected linears with all that was measured; `plan` is None until a search finds it.

    `grid` says which ranks and widths were considered, and `notes` why not others. `keep_ratio` is
    the budget as a share of the selected parameters, None where it is another. `moments` are None
    where none were measured, or where they are measured again block by block.
    """

    linears: tuple[LinearSpec, ...]
    method: Method
    allocator: Allocator
    grid: CandidateGrid
    notes: tuple[str, ...]
    moments: MomentStatistics | None
    candidates: tuple[Candidates, ...]
    channels: Mapping[str, Tensor]
    keep_ratio: float | None
    plan: Plan | None
    decompositions: DecompositionCache

    @property
    def form(self) -> Form:
        return self.grid.form

    def for_many_plans(self) -> PreparedModel:
        """The same with a cache of decompositions, each of which then serves all plans."""
        return replace(self, decompositions=DecompositionCache(self.method, keep=True))

    def ffns(self, model: Any) -> Iterator[FFN]:
        """The FFNs of `model`, block by block, with weights and statistics."""
        return ffns_of(model, self.linears, self.moments)

    def narrowed(self, ffn: FFN, plan: Plan) -> FFN:
        """`ffn` with the channels that `plan` keeps; the same where it keeps all."""
        width = plan.widths.get(ffn.name)
        if width is None:
            return ffn
        return self.method.narrow(ffn, self.channels[ffn.name][:width])


@dataclass(frozen=True)
class Planning:
    """The method, the rank policy and the budget of a run: from FFNs to candidates to a plan.

    `notes` are sentences on the grid.
    """

    method: Method
    allocator: Allocator
    grid: CandidateGrid
    budget: Budget
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: FactorizeSettings, keep_ratio: float | None, serving: Serving) -> Self:
        budget = Budget(settings.rank, keep_ratio)
        return cls(settings.build_method(), serving.allocator, serving.grid, budget, serving.notes)

    @property
    def needs_measurement(self) -> bool:
        """Whether planning takes errors or an order of channels, and not parameter counts alone."""
        return self.allocator.needs_errors or self.method.narrows

    def needs_moments(self, plan: Plan | None) -> bool:
        """Whether moments are needed to carry out `plan`, or to find one where it is None."""
        return bool(self.method.requires) and not (plan is not None and not plan.ranks)

    @property
    def needs_gradients(self) -> bool:
        return "gradient_moment" in self.method.requires

    @property
    def needs_probes(self) -> bool:
        """Whether errors estimate the loss and are compared from block to block."""
        return self.needs_gradients and self.method.estimates_loss and self.allocator.needs_errors

    def candidates(self, ffns: Iterable[FFN]) -> ModelCandidates:
        candidates: list[Candidates] = []
        channels: dict[str, Tensor] = {}
        with stage("choices_of_ranks"):
            for ffn in ffns:
                ffn_candidates, order = list_candidates(
                    ffn, self.method, self.grid, self.allocator.needs_errors
                )
                candidates.append(ffn_candidates)
                if order is not None:
                    channels[ffn.name] = order.cpu()
        return ModelCandidates(tuple(candidates), channels)

    def probes(self, ffns: Iterable[FFN], candidates: ModelCandidates) -> list[Probe]:
        """A probe of each FFN in which there is something to change."""
        probes = [
            probe_of(ffn, self.method, ffn_candidates, candidates.channels.get(ffn.name))
            for ffn, ffn_candidates in zip(ffns, candidates.ffns, strict=True)
        ]
        return [probe for probe in probes if probe is not None]

    def corrected(
        self,
        ffns: Iterable[FFN],
        candidates: ModelCandidates,
        measure: Callable[[list[Probe]], Mapping[str, Sequence[float]]],
    ) -> ModelCandidates:
        """`candidates` with the factors that probes give; unchanged where probes are not needed.

        `measure` returns the costs of probes as `measure_errors` does.
        """
        if not self.needs_probes:
            return candidates
        with stage("probes"):
            probes = self.probes(ffns, candidates)
            return replace(candidates, ffns=corrected(candidates.ffns, probes, measure(probes)))

    def plan(self, candidates: ModelCandidates) -> Plan | None:
        """The plan for the budget; None where the budget is to be searched for."""
        if self.grid.costs is not None and not any(map(_has_options, candidates.ffns)):
            raise InputError(
                "no form is faster than dense at the widths of this model, "
                f"{'; '.join(self.notes)}: use a method that narrows, such as auto, or leave out "
                "--objective and --for"
            )
        if self.budget.rank is None and self.budget.keep_ratio is None:
            return None
        with stage("allocation"):
            return self.allocator.allocate(candidates.ffns, self.budget)


def _has_options(ffn: Candidates) -> bool:
    """Whether the FFN can be anything but dense."""
    return len(ffn.shapes) > 1 or any(len(curve.ranks) > 1 for curve in ffn.shapes[0].curves)


class PlanningSource(Protocol):
    """Measures what planning needs, on a whole model or on one block at a time."""

    def calibrate(self, needs_moments: bool) -> MomentStatistics | None:
        """The moments of the whole model, if they are needed and can be held at once."""
        ...

    def candidates(self, moments: MomentStatistics | None) -> ModelCandidates:
        """The candidates of every FFN, from what `calibrate` measured."""
        ...


def plan_model(
    model: Any, linears: tuple[LinearSpec, ...], planning: Planning, source: PlanningSource
) -> PreparedModel:
    """Calibrates if the method needs it, and plans if the budget is known.

    A plan that needs parameter counts alone is made before anything is measured, so that a rank
    that does not fit is refused at once.
    """
    plan = None
    if not planning.needs_measurement:
        candidates = planning.candidates(ffns_of(model, linears, None))
        plan = planning.plan(candidates)
    moments = source.calibrate(planning.needs_moments(plan))
    if planning.needs_measurement:
        candidates = source.candidates(moments)
        plan = planning.plan(candidates)
    return PreparedModel(
        linears=linears,
        method=planning.method,
        allocator=planning.allocator,
        grid=planning.grid,
        notes=planning.notes,
        moments=moments,
        candidates=candidates.ffns,
        channels=candidates.channels,
        keep_ratio=planning.budget.keep_ratio,
        plan=plan,
        decompositions=DecompositionCache(planning.method),
    )


class CalibrationSource(Protocol):
    """What can be measured on the calibration text; see CalibrationSession."""

    def moments(self, gradients: bool) -> MomentStatistics: ...

    def errors(self, probes: Sequence[Probe]) -> dict[str, list[float]]: ...


@dataclass(frozen=True)
class InMemorySource:
    """Measures on a model in memory. Several processes share the FFNs.

    `calibration` may be None where the method needs no statistics.
    """

    model: Any
    linears: tuple[LinearSpec, ...]
    planning: Planning
    calibration: CalibrationSource | None
    progress: Progress

    def calibrate(self, needs_moments: bool) -> MomentStatistics | None:
        if not needs_moments:
            return None
        assert self.calibration is not None
        return self.calibration.moments(self.planning.needs_gradients)

    def candidates(self, moments: MomentStatistics | None) -> ModelCandidates:
        def measure(specs: tuple[LinearSpec, ...]) -> ModelCandidates:
            return self.planning.candidates(ffns_of(self.model, specs, moments))

        parts = map_sharded(by_ffn(self.linears), measure, self.progress, "Measuring choices")
        candidates = ModelCandidates.joined(parts)
        if self.calibration is None:
            return candidates
        ffns = ffns_of(self.model, self.linears, moments)
        return self.planning.corrected(ffns, candidates, self.calibration.errors)


def prepare(
    model: Any,
    linears: tuple[LinearSpec, ...],
    settings: FactorizeSettings,
    keep_ratio: float | None,
    calibration: CalibrationSource | None,
    progress: Progress,
) -> PreparedModel:
    """`plan_model` for a model in memory, whose experts may be fused.

    `keep_ratio` is the budget as a share of the parameters of `linears`, None for a rank or a
    search. Raises InputError where the budget does not fit.
    """
    serving = Serving.of(model, linears, settings, progress)
    planning = Planning.of(settings, keep_ratio, serving)
    source = InMemorySource(model, linears, planning, calibration, progress)
    with unpacked(model):
        return plan_model(model, linears, planning, source)


def selected_keep_ratio(
    model: Any, linears: Sequence[LinearSpec], settings: FactorizeSettings
) -> float | None:
    """The budget as a share of the selected parameters, in (0, 1]; None for a rank or a search.

    Raises InputError for a target that is smaller than the part of the model that is not selected.
    """
    total, target = parameter_count(model), settings.target_params
    if settings.target_size is not None:
        target = int(settings.target_size * total / weight_bytes(model))
    if target is None:
        return settings.keep_ratio
    selected = sum(linear.dense_parameters for linear in linears)
    if target <= total - selected:
        raise InputError(
            f"a target of {target:,} parameters is out of reach: {total - selected:,} are "
            "outside the selected linears; ask for more"
        )
    return min((target - total + selected) / selected, 1.0)


def check_weights(model: nn.Module, linears: Iterable[LinearSpec]) -> None:
    """Raises InputError where a weight is offloaded, or has NaN or infinity.

    And where the linears of one FFN are on several devices.
    """
    devices: dict[str, torch.device] = {}
    for spec in linears:
        weight = dense_weight(model.get_submodule(spec.name))
        if weight.is_meta:
            raise InputError(
                f"the weights of {spec.name} are offloaded: load the model on --device cpu"
            )
        if (device := devices.setdefault(spec.ffn, weight.device)) != weight.device:
            raise InputError(
                f"{spec.ffn} is spread over {device} and {weight.device}: load the model with a "
                "device_map that keeps each block on one device"
            )
        if not bool(weight.isfinite().all()):
            raise InputError(
                f"the weight of {spec.name} is not finite: use another copy or an earlier "
                "checkpoint"
            )


def by_ffn(linears: Iterable[LinearSpec]) -> list[tuple[LinearSpec, ...]]:
    """The linears of each FFN, in order."""
    return [tuple(group) for _, group in groupby(linears, key=lambda linear: linear.ffn)]


def ffns_of(
    model: Any, linears: Sequence[LinearSpec], moments: MomentStatistics | None
) -> Iterator[FFN]:
    """The FFNs of `linears` one by one, with weights and, unless None, with `moments`."""
    blocks = {linear.block for linear in linears}
    sizes = Counter(linear.ffn for linear in linears_of(model, blocks))
    for specs in by_ffn(linears):
        name = specs[0].ffn
        modules = {spec.name: model.get_submodule(spec.name) for spec in specs}
        yield FFN(
            name=name,
            linears=specs,
            weights={key: dense_weight(m) for key, m in modules.items()},
            biases={key: None if m.bias is None else m.bias.detach() for key, m in modules.items()},
            statistics=_statistics(specs, moments),
            whole=len(specs) == sizes[name],
        )


def _statistics(
    specs: Sequence[LinearSpec], moments: MomentStatistics | None
) -> dict[str, Statistics]:
    """Linears of one input group share their moments, so that roots are taken once."""
    if moments is None:
        return {spec.name: Statistics() for spec in specs}
    readers: dict[str, LinearSpec] = {}
    for spec in specs:
        readers.setdefault(spec.input_group, spec)
    shared = {
        group: (moments.second_moment(spec), moments.outlier_moment(spec))
        for group, spec in readers.items()
    }
    return {
        spec.name: Statistics(
            second_moment=shared[spec.input_group][0],
            outlier_moment=shared[spec.input_group][1],
            gradient_moment=moments.gradient_moment(spec),
            outlier_shares=moments.outlier_shares(spec),
        )
        for spec in specs
    }
