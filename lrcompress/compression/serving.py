"""What the target and the objective of a run mean for one model: its grid and its rank policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lrcompress.benchmark.form_costs import measure_costs
from lrcompress.checkpoint.export.dense import EXPERT_WIDTH_MULTIPLE, can_name_width
from lrcompress.checkpoint.export.gguf_families import family_of
from lrcompress.config import FactorizeSettings
from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.methods.allocators.one_width import OneWidth
from lrcompress.methods.candidates import CandidateGrid
from lrcompress.methods.costs import FormCosts, LineCost
from lrcompress.methods.plan import Allocator
from lrcompress.methods.targets import TARGETS
from lrcompress.methods.types import LayerForm, LinearSpec
from lrcompress.runtime.distributed import run_on_main
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress


@dataclass(frozen=True)
class Serving:
    """Which ranks and widths are considered, and the policy; `notes` say what was restricted."""

    grid: CandidateGrid
    allocator: Allocator
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: Any,
        linears: Sequence[LinearSpec],
        settings: FactorizeSettings,
        progress: Progress,
    ) -> Self:
        """For `model`, which `check_target` has let through; times its shapes if speed counts."""
        target = TARGETS[settings.target]
        allocator = settings.allocator()
        # in the coarse steps of a target, equal shares are one width
        if not target.low_rank and (
            _needs_one_width(model, settings) or not allocator.needs_errors
        ):
            allocator = OneWidth()
        grid = _grid(settings, linears)
        costs, notes = _costs(model, linears, grid, settings, progress)
        grid = replace(grid, costs=costs)
        if settings.target != "transformers":
            notes = (_target_note(settings, grid, allocator), *notes)
        return cls(grid, allocator, notes)


def check_target(model: Any, linears: Sequence[LinearSpec], settings: FactorizeSettings) -> None:
    """Raises InputError where the FFNs of `model` cannot get what the target takes.

    `linears` are the selected ones; fused experts have to be unpacked.
    """
    if settings.target == "gguf":
        family_of(model)  # refuses what has no form in llama.cpp
    if not _needs_one_width(model, settings):
        return
    selected, name = {spec.name for spec in linears}, settings.target
    downs = [spec for spec in find_ffns(model).linears if spec.role == "down"]
    if not all(spec.name in selected for spec in find_ffns(model).linears):
        raise InputError(
            f"--for {name} gives all FFNs of this model one width: leave out --include, --exclude "
            "and --dense-first"
        )
    widths = sorted({spec.in_features for spec in downs})
    if len(widths) != 1:
        raise InputError(
            f"--for {name} gives all FFNs one width, and those of this {model.config.model_type!r} "
            f"have {' and '.join(map(str, widths))} channels: leave --for out"
        )
    step = _grid(settings, linears).width_step
    if widths[0] <= step:
        raise InputError(
            f"--for {name} narrows in steps of {step} channels, and the FFNs have {widths[0]}: "
            "leave --for out"
        )
    if name == "stock" and not can_name_width(model, linears, widths[0] - step):
        raise InputError(
            f"--for stock needs a config that names the width of FFNs, which that of "
            f"{model.config.model_type!r} does not: leave --for out"
        )


def _needs_one_width(model: Any, settings: FactorizeSettings) -> bool:
    return TARGETS[settings.target].needs_one_width(model.config.model_type)


def _grid(settings: FactorizeSettings, linears: Sequence[LinearSpec]) -> CandidateGrid:
    """What may be chosen for `linears`, as if every form cost its parameters."""
    target = TARGETS[settings.target]
    multiple = target.width_multiple
    if not target.low_rank and any(spec.mixture for spec in linears):
        multiple = math.lcm(multiple, EXPERT_WIDTH_MULTIPLE)
    return CandidateGrid(
        settings.form,
        settings.rank_multiple,
        settings.rank,
        low_rank=target.low_rank,
        width_multiple=multiple,
    )


def _costs(
    model: Any,
    linears: Sequence[LinearSpec],
    grid: CandidateGrid,
    settings: FactorizeSettings,
    progress: Progress,
) -> tuple[FormCosts | None, tuple[str, ...]]:
    """What forms cost, and a note on it; None where they cost their parameters.

    A policy that weighs nothing has no use for costs.
    """
    overheads = TARGETS[settings.target].overheads
    if settings.objective == "speed":
        like = _where_it_runs(model)
        measured = run_on_main(lambda: measure_costs(linears, grid, like, progress))
        return measured.costs, (measured.sentence,)
    if not overheads or not settings.allocator().needs_errors:
        return None, ()
    lines: dict[LayerForm, LineCost] = {form: LineCost(n) for form, n in overheads.items()}
    return FormCosts({spec.name: lines for spec in linears}), ()


def _where_it_runs(model: nn.Module) -> Tensor:
    """An empty tensor with the dtype of `model`, on its device; of a model on disk, on the CPU."""
    parameters = list(model.parameters())
    device = next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))
    return torch.empty(0, dtype=parameters[0].dtype, device=device)


def _target_note(settings: FactorizeSettings, grid: CandidateGrid, allocator: Allocator) -> str:
    """What the target changed, in words."""
    if TARGETS[settings.target].low_rank:
        return f"made for {settings.target}: forms were weighed by what they cost there"
    kind = "one width for all FFNs" if isinstance(allocator, OneWidth) else "narrowed FFNs alone"
    return f"made for {settings.target}: {kind}, in steps of {grid.width_step} channels"
