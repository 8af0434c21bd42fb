"""Calibrate, allocate ranks, factorize, swap: in memory, one call from Python."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrcompress import checkpoint
from lrcompress.calibrate import SecondMoments, second_moments
from lrcompress.data import Fingerprint, read_corpus, token_blocks
from lrcompress.ffn import find_ffns, select
from lrcompress.lowrank import LowRankLinear, dense_weight, install
from lrcompress.protocols import (
    InputError,
    LinearSpec,
    Progress,
    RankPlan,
    Statistics,
    silent,
)
from lrcompress.quantizer import record_layout
from lrcompress.recipe import CalibrationSettings, FactorizeSettings, Section, from_flat
from lrcompress.sizes import parameter_count, sequence_length

SECTIONS: dict[str, type[Section]] = {
    "calibration": CalibrationSettings,
    "factorize": FactorizeSettings,
}


@dataclass(frozen=True)
class Counts:
    """Exact numbers of parameters before and after."""

    dense: int
    kept: int

    @property
    def keep_ratio(self) -> float:
        return self.kept / self.dense

    def to_dict(self) -> dict[str, Any]:
        return {"dense": self.dense, "kept": self.kept, "keep_ratio": self.keep_ratio}


@dataclass(frozen=True)
class FactorizedLinear:
    """What became of one linear; `rank` is None where it stayed dense.

    `error` is ‖W - BA‖² / ‖W‖² in the metric of the method.
    """

    spec: LinearSpec
    rank: int | None
    kept: int
    error: float | None

    def to_dict(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "name": spec.name,
            "block": spec.block,
            "role": spec.role,
            "in_features": spec.in_features,
            "out_features": spec.out_features,
            "rank": self.rank,
            "parameters_dense": spec.dense_parameters,
            "parameters_kept": self.kept,
            "relative_error": self.error,
        }


@dataclass(frozen=True)
class Factorization:
    """What `factorize` did. Counts: the selected linears, all FFNs, and the whole model."""

    linears: tuple[FactorizedLinear, ...]
    selected: Counts
    ffn: Counts
    model: Counts
    calibration: Fingerprint | None
    notes: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "counts": {
                "selected": self.selected.to_dict(),
                "ffn": self.ffn.to_dict(),
                "model": self.model.to_dict(),
            },
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
            "linears": [linear.to_dict() for linear in self.linears],
        }


def factorize(
    model: Any, tokenizer: Any = None, *, progress: Progress = silent, **settings: Any
) -> Factorization:
    """Replaces the FFN linears of `model` by low-rank factors, in place.

    `settings` are the keys of the recipe's `calibration` and `factorize` sections, by the names
    of the flags: rank or keep_ratio, method, ranks, form, calibration, num_samples, seq_len,
    seed, include, exclude, ... `tokenizer` is needed by every method that calibrates.
    Raises InputError where a setting is refused or does not fit the model; the model is then
    as it was.
    """
    sections = from_flat(SECTIONS, settings)
    return apply(model, tokenizer, sections["calibration"], sections["factorize"], progress)


def apply(
    model: Any,
    tokenizer: Any,
    calibration: CalibrationSettings,
    settings: FactorizeSettings,
    progress: Progress = silent,
) -> Factorization:
    """`factorize` with checked settings."""
    started = time.perf_counter()
    linears = select(model, settings.include, settings.exclude, settings.dense_first)
    _check_weights(model, linears)
    before = parameter_count(model)
    finding = find_ffns(model)
    ffns = finding.linears or linears  # an unknown family's FFNs are what --include named
    plan = settings.allocator().allocate(linears, settings.budget())
    moments, fingerprint = None, None
    if settings.factorizer().requires and plan.ranks:
        chosen = [spec for spec in linears if spec.name in plan.ranks]
        tokens, fingerprint = calibration_tokens(model, tokenizer, calibration)
        moments = second_moments(model, chosen, tokens, progress)
    done = tuple(
        _replace(model, spec, plan, settings, moments)
        for spec in progress(linears, "Factorizing", len(linears))
    )
    record_layout(model)
    return Factorization(
        done,
        Counts(sum(s.dense_parameters for s in linears), sum(linear.kept for linear in done)),
        Counts(
            sum(s.dense_parameters for s in ffns),
            sum(plan.parameters(s) for s in ffns),
        ),
        Counts(before, parameter_count(model)),
        fingerprint,
        tuple(_notes(done, finding.experts)),
        time.perf_counter() - started,
    )


def calibration_tokens(
    model: Any, tokenizer: Any, settings: CalibrationSettings
) -> tuple[Tensor, Fingerprint]:
    """Calibration tokens for `model`, shape (num_samples, seq_len), and their fingerprint."""
    if tokenizer is None:
        raise InputError(
            "the method calibrates on text and the model has no tokenizer: add the tokenizer's "
            "files to its folder (in Python: pass tokenizer=), or use --method svd"
        )
    length = sequence_length(model, settings.seq_len)
    corpus = read_corpus(settings.data, "calibration")
    return token_blocks(corpus, tokenizer, settings.num_samples, length, settings.seed)


def _check_weights(model: nn.Module, linears: Iterable[LinearSpec]) -> None:
    for spec in linears:
        weight = dense_weight(model.get_submodule(spec.name))
        if weight.is_meta:
            raise InputError(
                f"the weights of {spec.name} are offloaded: load the model on --device cpu"
            )
        if not bool(weight.isfinite().all()):
            raise InputError(f"the weight of {spec.name} is not finite: get an intact copy")


def _replace(
    model: nn.Module,
    spec: LinearSpec,
    plan: RankPlan,
    settings: FactorizeSettings,
    moments: SecondMoments | None,
) -> FactorizedLinear:
    rank = plan.ranks.get(spec.name)
    if rank is None:
        return FactorizedLinear(spec, None, spec.dense_parameters, None)
    dense = model.get_submodule(spec.name)
    statistics = moments.statistics(spec) if moments else Statistics()
    factors = settings.factorizer().factorize(dense_weight(dense), statistics, rank)
    install(model, spec.name, LowRankLinear.from_factors(dense, factors.A, factors.B))
    error = factors.error / factors.energy if factors.energy > 0 else 0.0
    return FactorizedLinear(spec, rank, plan.parameters(spec), error)


def _notes(done: tuple[FactorizedLinear, ...], experts: tuple[str, ...]) -> Iterable[str]:
    dense = [linear.spec for linear in done if linear.rank is None]
    if dense:
        yield (
            f"{len(dense)} of {len(done)} linears stay dense, because at the rank asked for two "
            f"factors would not be smaller: {dense[0].name} breaks even at rank "
            f"{dense[0].break_even_rank:.0f}"
        )
    if experts:
        yield (
            f"{len(experts)} mixture-of-experts tensors stay dense, such as {experts[0]}: "
            "only linear layers are factorized"
        )


def save(model: Any, out: str | Path, tokenizer: Any = None, **record: Any) -> dict[str, Any]:
    """Writes a factorized model to the new folder `out`, atomically, with its model card.

    `record` goes into lrcompress.json; pass `**factorization.to_dict()`.
    Raises InputError if `out` exists, MachineError if it cannot be written.
    """
    return checkpoint.save(model, tokenizer, Path(out), record)
