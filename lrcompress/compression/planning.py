"""From a model and settings to what could be done to each FFN, and the plan of what will be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol, Self

from torch import Tensor, nn

from lrcompress.compression.calibration.moments import MomentStatistics
from lrcompress.compression.calibration.probes import Probe, corrected, probe_of
from lrcompress.config import FactorizeSettings
from lrcompress.layers.ffn_layouts import linears_of
from lrcompress.layers.lowrank import dense_weight
from lrcompress.layers.model_info import parameter_count, weight_bytes
from lrcompress.layers.moe import unpacked
from lrcompress.methods.candidates import CandidateGrid, list_candidates
from lrcompress.methods.decomposition_cache import DecompositionCache
from lrcompress.methods.plan import Allocator, Budget, Candidates, Plan
from lrcompress.methods.types import FFN, LinearSpec, Method, Statistics
from lrcompress.runtime.distributed import map_sharded
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress


@dataclass(frozen=True)
class PreparedModel:
    """The selected FFNs with all that was measured; `plan` is None until a search finds it.

    `keep_ratio` is the budget asked for, as a share, where it is one.
    """

    linears: tuple[LinearSpec, ...]
    method: Method
    allocator: Allocator
    moments: MomentStatistics | None
    choices: tuple[Candidates, ...]
    channels: dict[str, Tensor]
    keep_ratio: float | None
    plan: Plan | None
    decompositions: DecompositionCache

    def for_many_plans(self) -> PreparedModel:
        """The same, with decompositions that are kept: each then serves all plans."""
        return replace(self, decompositions=DecompositionCache(self.method, keep=True))

    def ffns(self, model: Any) -> Iterator[FFN]:
        """The FFNs of `model`, block by block, with weights and statistics."""
        return ffns_of(model, self.linears, self.moments)


@dataclass(frozen=True)
class Planning:
    """The method, the policy and the budget of a run: from FFNs to choices to a plan."""

    method: Method
    allocator: Allocator
    grid: CandidateGrid
    budget: Budget

    @classmethod
    def of(cls, settings: FactorizeSettings, keep_ratio: float | None) -> Self:
        grid = CandidateGrid(settings.form, settings.rank_multiple, settings.rank)
        budget = Budget(settings.rank, keep_ratio)
        return cls(settings.compressor(), settings.allocator(), grid, budget)

    @property
    def is_early(self) -> bool:
        """Whether a plan takes neither errors nor narrowing, so that nothing has to be measured."""
        return not (self.allocator.needs_errors or self.method.narrows)

    def reads_text(self, plan: Plan | None) -> bool:
        """Whether moments are needed for `plan`, or to find one."""
        return bool(self.method.requires) and not (plan is not None and not plan.ranks)

    @property
    def gradients(self) -> bool:
        return "gradient_moment" in self.method.requires

    @property
    def is_probed(self) -> bool:
        """Whether estimates are of the loss, and compared from block to block."""
        return self.gradients and self.method.estimates_loss and self.allocator.needs_errors

    def choices(self, ffns: Iterable[FFN]) -> tuple[tuple[Candidates, ...], dict[str, Tensor]]:
        """Of each FFN, and the order of its channels where the method narrows."""
        found, channels = [], {}
        for ffn in ffns:
            choices, order = list_candidates(
                ffn, self.method, self.grid, self.allocator.needs_errors
            )
            found.append(choices)
            if order is not None:
                channels[ffn.name] = order.cpu()
        return tuple(found), channels

    def probes(
        self, ffns: Iterable[FFN], choices: Iterable[Candidates], channels: Mapping[str, Tensor]
    ) -> list[Probe]:
        """One of each FFN, as far as there is something to change."""
        pairs = zip(ffns, choices, strict=True)
        found = [probe_of(ffn, self.method, one, channels.get(ffn.name)) for ffn, one in pairs]
        return [one for one in found if one is not None]

    def corrected(
        self,
        ffns: Iterable[FFN],
        choices: tuple[Candidates, ...],
        channels: Mapping[str, Tensor],
        measure: Callable[[list[Probe]], Mapping[str, Sequence[float]]],
    ) -> tuple[Candidates, ...]:
        """`choices` with the factors of probes, where there are to be any."""
        if not self.is_probed:
            return choices
        made = self.probes(ffns, choices, channels)
        return corrected(choices, made, measure(made))

    def plan(self, choices: Sequence[Candidates]) -> Plan | None:
        if self.budget.rank is None and self.budget.keep_ratio is None:
            return None
        return self.allocator.allocate(choices, self.budget)


class CalibrationSource(Protocol):
    """What can be measured on the calibration text."""

    def moments(self, gradients: bool) -> MomentStatistics: ...

    def errors(self, probes: Sequence[Probe]) -> dict[str, list[float]]: ...


def prepare(
    model: Any,
    linears: tuple[LinearSpec, ...],
    settings: FactorizeSettings,
    keep_ratio: float | None,
    text: CalibrationSource | None,
    progress: Progress,
) -> PreparedModel:
    """Calibrates if the method needs it, and plans if the budget is known.

    A plan that takes neither errors nor narrowing comes first, so that a rank that does not fit
    is refused before anything is measured.
    """
    planning, moments, plan = Planning.of(settings, keep_ratio), None, None
    with unpacked(model):
        if planning.is_early:
            choices, channels = planning.choices(ffns_of(model, linears, None))
            plan = planning.plan(choices)
        if planning.reads_text(plan):
            assert text is not None
            moments = text.moments(planning.gradients)
        if not planning.is_early:
            groups = by_ffn(linears)
            found = map_sharded(
                groups,
                lambda specs: planning.choices(ffns_of(model, specs, moments)),
                progress,
                "Measuring choices",
            )
            choices = tuple(one for part, _ in found for one in part)
            channels = {name: order for _, orders in found for name, order in orders.items()}
            if text is not None:
                ffns = ffns_of(model, linears, moments)
                choices = planning.corrected(ffns, choices, channels, text.errors)
            plan = planning.plan(choices)
    method, shared = planning.method, (moments, choices, channels)
    return PreparedModel(
        linears, method, planning.allocator, *shared, keep_ratio, plan, DecompositionCache(method)
    )


def selected_share(
    model: Any, linears: Sequence[LinearSpec], settings: FactorizeSettings
) -> float | None:
    """The budget as a share of the selected parameters; None for a rank or a search.

    Raises InputError for a target that the rest of the model alone exceeds.
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
    """Raises InputError where a weight is not here or not finite."""
    for spec in linears:
        weight = dense_weight(model.get_submodule(spec.name))
        if weight.is_meta:
            raise InputError(
                f"the weights of {spec.name} are offloaded: load the model on --device cpu"
            )
        if not bool(weight.isfinite().all()):
            raise InputError(f"the weight of {spec.name} is not finite: get an intact copy")


def by_ffn(linears: Iterable[LinearSpec]) -> list[tuple[LinearSpec, ...]]:
    """The linears of each FFN, in order."""
    return [tuple(group) for _, group in groupby(linears, key=lambda linear: linear.ffn)]


def ffns_of(
    model: Any, linears: Sequence[LinearSpec], moments: MomentStatistics | None
) -> Iterator[FFN]:
    """The FFNs of `linears` one by one, with weights and what was measured."""
    blocks = {linear.block for linear in linears}
    sizes = Counter(linear.ffn for linear in linears_of(model, blocks))
    for specs in by_ffn(linears):
        modules = {spec.name: model.get_submodule(spec.name) for spec in specs}
        name = specs[0].ffn
        yield FFN(
            name,
            specs,
            {n: dense_weight(module) for n, module in modules.items()},
            {n: None if m.bias is None else m.bias.detach() for n, m in modules.items()},
            _statistics(specs, moments),
            len(specs) == sizes[name],
        )


def _statistics(
    specs: Sequence[LinearSpec], moments: MomentStatistics | None
) -> dict[str, Statistics]:
    """Linears of one input group share one tensor, so that its roots are taken once."""
    if moments is None:
        return {spec.name: Statistics() for spec in specs}
    first: dict[str, LinearSpec] = {}
    for spec in specs:
        first.setdefault(spec.input_group, spec)
    shared = {group: moments.statistics(spec).second_moment for group, spec in first.items()}
    return {
        spec.name: Statistics(shared[spec.input_group], moments.gradient_moment(spec))
        for spec in specs
    }
