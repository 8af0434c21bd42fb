"""Calibrate, plan, shrink, swap: in memory, one call from Python."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.folder import save_checkpoint
from lrcompress.compression.anchored import apply_plan_anchored
from lrcompress.compression.calibration.session import CalibrationSession
from lrcompress.compression.perplexity_search import smallest_within
from lrcompress.compression.planning import PreparedModel, check_weights, prepare, selected_share
from lrcompress.compression.refine import refine
from lrcompress.compression.refined_block import RefinedBlock
from lrcompress.compression.replace_layers import LinearResult, apply_plan
from lrcompress.compression.result import Counts, Factorization, counts, probed, warnings_of
from lrcompress.config import CalibrationSettings, FactorizeSettings, RefineSettings
from lrcompress.config.recipe import sections, sections_from_flat
from lrcompress.layers.experts import LIST
from lrcompress.layers.ffn_layouts import find_ffns, select
from lrcompress.layers.lowrank import compressed_layers, install, is_linear
from lrcompress.layers.model_info import parameter_count
from lrcompress.layers.model_state import in_float32
from lrcompress.layers.moe import unpacked
from lrcompress.layers.nonfinite import unsound
from lrcompress.methods.plan import Plan
from lrcompress.methods.types import LinearSpec
from lrcompress.models.hf_quantizer import record_layout
from lrcompress.runtime import distributed
from lrcompress.runtime.distributed import run_on_main
from lrcompress.runtime.errors import InputError, NotFiniteError
from lrcompress.runtime.progress import Progress, silent

OVERFLOWS = "activations overflow float16, so the model was run in float32 to calibrate"


def factorize(
    model: Any, tokenizer: Any = None, *, progress: Progress = silent, **settings: Any
) -> Factorization:
    """Replaces the FFN linears of `model` by low-rank factors, in place.

    `settings` are the keys of the recipe's `calibration`, `factorize` and `refine` sections, by
    the names of the flags: rank or keep_ratio, method, ranks, form, calibration, num_samples,
    seq_len, seed, include, exclude, refine, ... `tokenizer` is needed by every method that
    calibrates.
    Raises InputError where a setting is refused or does not fit the model; the model is then
    as it was.
    """
    checked = sections_from_flat(sections("calibration", "factorize", "refine"), settings)
    return apply(model, tokenizer, **checked, progress=progress)


def apply(
    model: Any,
    tokenizer: Any,
    calibration: CalibrationSettings,
    factorize: FactorizeSettings,
    refine: RefineSettings,
    progress: Progress = silent,
    work: Path | None = None,
) -> Factorization:
    """`factorize` with checked settings; what an interrupted run finished is kept in `work`."""
    return Compressor(model, tokenizer, calibration, factorize, refine, progress, work).run()


@dataclass(frozen=True)
class Compressor:
    """One model on its way through the stages."""

    model: Any
    tokenizer: Any
    calibration: CalibrationSettings
    settings: FactorizeSettings
    refinement: RefineSettings
    progress: Progress
    work: Path | None
    started: float = field(default_factory=time.perf_counter)

    def run(self) -> Factorization:
        """In the model's own precision; a float16 model that overflows there, in float32."""
        text = self.text()
        share = selected_share(self.model, text.linears, self.settings)  # of the bytes it has now
        try:
            return self._run(text, share)
        except NotFiniteError:
            if distributed.world_size() > 1 or self.model.dtype != torch.float16:
                raise
            with _widened(self.model):
                done = self._run(self.text(), share)
            return replace(done, notes=(*done.notes, OVERFLOWS))

    def _run(self, text: CalibrationSession, share: float | None) -> Factorization:
        parts = (self.settings, share, text, self.progress)
        return self.carry_out(prepare(self.model, text.linears, *parts), text)

    def text(self) -> CalibrationSession:
        """What may be measured; nothing is before it is needed."""
        settings = self.settings
        if settings.streaming:
            raise InputError(
                "streaming reads the model's folder block by block and this model is in memory: "
                "use `lrcompress factorize` or `lrcompress run`, or leave streaming out"
            )
        with unpacked(self.model):
            linears = select(self.model, settings.include, settings.exclude, settings.dense_first)
            check_weights(self.model, linears)
        if (weight := next(unsound(self.model), None)) is not None:
            raise InputError(f"{weight} is not finite: get an intact copy")
        if settings.sequential == "anchored":
            _refuse_experts(linears)
        return CalibrationSession(
            self.model, self.tokenizer, linears, self.calibration, self.progress
        )

    def carry_out(self, prepared: PreparedModel, text: CalibrationSession) -> Factorization:
        """Shrinks the model as planned, in place; whatever fails, it is as it was."""
        with unpacked(self.model):
            return self._carried_out(prepared, text)

    def _carried_out(self, prepared: PreparedModel, text: CalibrationSession) -> Factorization:
        model, settings, linears = self.model, self.settings, prepared.linears
        before, finding = parameter_count(model), find_ffns(model)
        plan = prepared.plan
        trials: tuple[dict[str, float], ...] = ()
        if plan is None:
            plan, trials = smallest_within(model, self.tokenizer, prepared, settings, self.progress)
        originals = {spec.name: model.get_submodule(spec.name) for spec in linears}
        try:
            done = self._shrink(prepared, plan, text)
            refined = self._refine(originals, prepared, plan, text)
        except BaseException:
            for name, layer in originals.items():
                install(model, name, layer)
            raise
        scarce = [] if prepared.moments is None else prepared.moments.undersampled_experts()
        record_layout(model)
        selected = counts(linears, plan, settings.form)
        return Factorization(
            done,
            selected,
            counts(finding.linears, plan, settings.form),
            Counts(before, parameter_count(model)),
            text.fingerprint,
            probed(prepared.choices),
            trials,
            refined,
            tuple(warnings_of(done, finding.experts, scarce, selected, prepared.keep_ratio)),
            time.perf_counter() - self.started,
        )

    def _shrink(
        self, prepared: PreparedModel, plan: Plan, text: CalibrationSession
    ) -> tuple[LinearResult, ...]:
        form, settings = self.settings.form, self.settings
        if settings.sequential == "independent":
            return apply_plan(self.model, prepared, plan, form, self.progress)
        tokens, damping = text.tokens, settings.anchor_damping
        parts = (self.model, prepared, plan, form, tokens, damping, self.progress)
        return run_on_main(lambda: apply_plan_anchored(*parts))

    def _refine(
        self,
        originals: Mapping[str, nn.Module],
        prepared: PreparedModel,
        plan: Plan,
        text: CalibrationSession,
    ) -> tuple[RefinedBlock, ...]:
        if not self.refinement.enabled:
            return ()
        work = None
        if self.work is not None:
            work = self.work / self._identity(originals, text, plan)
        settings, progress = self.refinement, self.progress
        parts = (self.model, originals, prepared, text.tokens, settings, work, progress)
        return run_on_main(lambda: refine(*parts))

    def _identity(
        self, originals: Mapping[str, nn.Module], text: CalibrationSession, plan: Plan
    ) -> str:
        """Names what refined blocks depend on; work of another model or setting is not used."""
        parts = (self.calibration, self.settings, self.refinement)
        settings = [part.model_dump(mode="json") for part in parts]
        inputs = [settings, dict(plan.ranks), dict(plan.widths)]
        digest = hashlib.sha256(fingerprints.digest(inputs, "factorize").encode())
        digest.update(text.tokens.numpy().tobytes())
        fingerprints.add_tensors(digest, self.model.state_dict().items())
        for owner, layer in originals.items():
            named = ((f"{owner} {name}", tensor) for name, tensor in layer.state_dict().items())
            fingerprints.add_tensors(digest, named)
        return digest.hexdigest()[:16]


@contextmanager
def _widened(model: nn.Module) -> Iterator[None]:
    """In float32; at the end every linear has its own precision again, also one that was put in."""
    own = next(model.parameters()).dtype  # of experts, which are no linears before and after
    stored = {n: m.weight.dtype for n, m in model.named_modules() if is_linear(m)}
    with in_float32(model):
        yield
    for name, layer in compressed_layers(model):
        layer.to(stored.get(name, own))


def _refuse_experts(linears: Iterable[LinearSpec]) -> None:
    """An expert reads other tokens when what is in front of it changes: there is nothing to fit."""
    if any(spec.mixture for spec in linears):
        raise InputError(
            "--sequential anchored cannot fit mixtures of experts, which read other tokens once "
            "the blocks before them are compressed: use --sequential independent, or leave them "
            f"out with --exclude '*.{LIST}.*'"
        )


def save(model: Any, out: str | Path, tokenizer: Any = None, **record: Any) -> dict[str, Any]:
    """Writes a factorized model to the new folder `out`, atomically, with its model card.

    `record` goes into lrcompress.json; pass `**factorization.to_dict()`.
    Raises InputError if `out` exists, MachineError if it cannot be written.
    """
    return save_checkpoint(model, tokenizer, Path(out), record)
