"""The report of `lrcompress inspect`: the FFN linears of a model, their sizes and ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lrcompress.layers.ffn_layouts import find_ffns, no_ffns
from lrcompress.layers.lowrank import LowRankLinear, dense_weight
from lrcompress.layers.model_info import parameter_count
from lrcompress.layers.moe import unpacked
from lrcompress.methods.linalg import decompose
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent

# shares of the squared singular values whose ranks are reported
ENERGY_SHARES = (0.9, 0.99)


@dataclass(frozen=True)
class InspectedLinear:
    """One linear: `shape` is (out, in), `share` that of the model's parameters.

    `rank` is None for a dense linear. `energy_ranks` are the lowest ranks that keep 90 % and 99 %
    of the squared singular values; None unless they were requested.
    """

    name: str
    block: int
    role: str
    shape: tuple[int, int]
    parameters: int
    share: float
    break_even_rank: float
    rank: int | None
    energy_ranks: tuple[int, ...] | None


@dataclass(frozen=True)
class Inspection:
    """The FFN linears of a model, and the names of expert tensors that stay dense."""

    model_type: str
    parameters: int
    ffn_parameters: int
    rows: tuple[InspectedLinear, ...]
    experts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(model: Any, energy: bool = False, progress: Progress = silent) -> Inspection:
    """Lists the FFN linears of `model`; with `energy` it needs weights, else meta tensors do.

    Raises InputError where no FFN linear is found.
    """
    with unpacked(model):
        return _inspect_unpacked(model, energy, progress)


def _inspect_unpacked(model: Any, energy: bool, progress: Progress) -> Inspection:
    finding = find_ffns(model)
    if not finding.linears and not finding.experts:
        raise InputError(no_ffns(model))
    total = parameter_count(model)
    rows = tuple(
        _inspect_linear(model, spec, total, energy)
        for spec in progress(finding.linears, "Inspecting", len(finding.linears))
    )
    return Inspection(
        model_type=model.config.model_type,
        parameters=total,
        ffn_parameters=sum(row.parameters for row in rows),
        rows=rows,
        experts=finding.experts,
    )


def _inspect_linear(model: Any, spec: LinearSpec, total: int, energy: bool) -> InspectedLinear:
    module = model.get_submodule(spec.name)
    rank = module.rank if isinstance(module, LowRankLinear) else None
    parameters = parameter_count(module)
    return InspectedLinear(
        name=spec.name,
        block=spec.block,
        role=spec.role,
        shape=(spec.out_features, spec.in_features),
        parameters=parameters,
        share=parameters / total,
        break_even_rank=spec.break_even_rank,
        rank=rank,
        energy_ranks=_energy_ranks(module) if energy else None,
    )


def _energy_ranks(module: Any) -> tuple[int, ...]:
    dense = module.to_dense() if isinstance(module, LowRankLinear) else module
    energies = decompose(dense_weight(dense)).energies
    cumulative_shares = energies.cumsum(0) / energies.sum()
    return tuple(int((cumulative_shares < share).sum()) + 1 for share in ENERGY_SHARES)
