"""What `lrcompress inspect` shows: the FFN linears of a model and what their ranks would save."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lrcompress.layers.ffn_layouts import find_ffns
from lrcompress.layers.lowrank import LowRankLinear, dense_weight
from lrcompress.layers.model_info import parameter_count
from lrcompress.layers.moe import unpacked
from lrcompress.methods.linalg import decompose
from lrcompress.methods.types import LinearSpec
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.progress import Progress, silent

ENERGY_SHARES = (0.9, 0.99)


@dataclass(frozen=True)
class Row:
    """One linear. `rank` is None while it is dense; `energy_ranks` holds the ranks that keep
    90 % and 99 % of the squared singular values, where they were asked for."""

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
    model_type: str
    parameters: int
    ffn_parameters: int
    rows: tuple[Row, ...]
    experts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(model: Any, energy: bool = False, progress: Progress = silent) -> Inspection:
    """Lists the FFN linears of `model`, which may be on the meta device unless `energy`."""
    with unpacked(model):
        return _inspected(model, energy, progress)


def _inspected(model: Any, energy: bool, progress: Progress) -> Inspection:
    finding = find_ffns(model)
    if not finding.linears and not finding.experts:
        raise InputError(
            f"unsupported model: no feed-forward linears known for {model.config.model_type!r}"
        )
    total = parameter_count(model)
    rows = tuple(
        _row(model, spec, total, energy)
        for spec in progress(finding.linears, "Inspecting", len(finding.linears))
    )
    held = sum(row.parameters for row in rows)
    return Inspection(model.config.model_type, total, held, rows, finding.experts)


def _row(model: Any, spec: LinearSpec, total: int, energy: bool) -> Row:
    module = model.get_submodule(spec.name)
    rank = module.rank if isinstance(module, LowRankLinear) else None
    parameters = parameter_count(module)
    return Row(
        spec.name,
        spec.block,
        spec.role,
        (spec.out_features, spec.in_features),
        parameters,
        parameters / total,
        spec.break_even_rank,
        rank,
        _energy_ranks(module) if energy else None,
    )


def _energy_ranks(module: Any) -> tuple[int, ...]:
    dense = module.to_dense() if isinstance(module, LowRankLinear) else module
    energies = decompose(dense_weight(dense)).energies
    kept = energies.cumsum(0) / energies.sum()
    return tuple(int((kept < share).sum()) + 1 for share in ENERGY_SHARES)
