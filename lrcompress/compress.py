"""Calibrate, plan, shrink, swap: in memory, one call from Python."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lrcompress import checkpoint
from lrcompress.anchor import shrink_anchored
from lrcompress.data import Fingerprint, read_corpus, token_blocks
from lrcompress.ffn import find_ffns, select
from lrcompress.lowrank import dense_weight
from lrcompress.prepare import prepare
from lrcompress.protocols import InputError, LinearSpec, Plan, Progress, silent
from lrcompress.quantizer import record_layout
from lrcompress.recipe import from_flat
from lrcompress.search import smallest_within
from lrcompress.settings import CalibrationSettings, FactorizeSettings, Section
from lrcompress.shrink import ShrunkLinear, shrink
from lrcompress.sizes import parameter_count, sequence_length

# a budget that is missed by more is worth a word
BUDGET_TOLERANCE = 0.005
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
        return self.kept / self.dense if self.dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        return {"dense": self.dense, "kept": self.kept, "keep_ratio": self.keep_ratio}


@dataclass(frozen=True)
class Factorization:
    """What `factorize` did. Counts: the selected linears, all FFNs, and the whole model.

    `trials` lists what a search for a perplexity tried.
    """

    linears: tuple[ShrunkLinear, ...]
    selected: Counts
    ffn: Counts
    model: Counts
    calibration: Fingerprint | None
    trials: tuple[dict[str, float], ...]
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
            "trials": list(self.trials),
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
    before, finding = parameter_count(model), find_ffns(model)
    ratio = _keep_ratio(model, linears, settings)
    get_tokens = cache(partial(calibration_tokens, model, tokenizer, calibration))
    prepared = prepare(model, linears, settings, ratio, get_tokens, progress)
    plan = prepared.plan
    trials: tuple[dict[str, float], ...] = ()
    if plan is None:
        plan, trials = smallest_within(model, tokenizer, prepared, settings, progress)
    fingerprint = prepared.calibration
    if settings.sequential == "anchored":
        tokens, fingerprint = get_tokens()
        damping = settings.anchor_damping
        done = shrink_anchored(model, prepared, plan, settings.form, tokens, damping, progress)
    else:
        done = shrink(model, prepared, plan, settings.form, progress)
    record_layout(model)
    selected = _counts(linears, plan, settings)
    return Factorization(
        done,
        selected,
        _counts(finding.linears, plan, settings),
        Counts(before, parameter_count(model)),
        fingerprint,
        trials,
        tuple(_notes(done, finding.experts, selected, ratio)),
        time.perf_counter() - started,
    )


def _counts(linears: Sequence[LinearSpec], plan: Plan, settings: FactorizeSettings) -> Counts:
    return Counts(
        sum(linear.dense_parameters for linear in linears),
        sum(plan.parameters(linear, settings.form) for linear in linears),
    )


def _keep_ratio(
    model: Any, linears: Sequence[LinearSpec], settings: FactorizeSettings
) -> float | None:
    """The budget as a share of the selected parameters; None for a rank or a search."""
    total, target = parameter_count(model), settings.target_params
    if settings.target_size is not None:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        target = int(settings.target_size * total / size)
    if target is None:
        return settings.keep_ratio
    selected = sum(linear.dense_parameters for linear in linears)
    if target <= total - selected:
        raise InputError(
            f"a target of {target:,} parameters is out of reach: {total - selected:,} are "
            "outside the selected linears; ask for more"
        )
    return min((target - total + selected) / selected, 1.0)


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


def _notes(
    done: tuple[ShrunkLinear, ...], experts: tuple[str, ...], kept: Counts, wanted: float | None
) -> Iterable[str]:
    if all(linear.form is None for linear in done):
        spec = done[0].spec
        yield (
            f"all {len(done)} linears stay dense, because at the budget asked for factors would "
            f"not be smaller: {spec.name} breaks even at rank {spec.break_even_rank:.0f}"
        )
    elif wanted is not None and abs(kept.keep_ratio - wanted) > BUDGET_TOLERANCE:
        yield (
            f"{kept.keep_ratio:.1%} of the selected parameters are kept, not the {wanted:.1%} "
            "asked for: ranks come in steps of --rank-multiple"
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
