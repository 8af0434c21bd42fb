"""Factorizes a model in memory: calibrates, plans, replaces layers and refines them."""

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
from lrcompress.compression.planning import (
    PreparedModel,
    check_weights,
    prepare,
    selected_keep_ratio,
)
from lrcompress.compression.refine import refine
from lrcompress.compression.refined_block import RefinedBlock
from lrcompress.compression.replace_layers import LinearResult, apply_plan
from lrcompress.compression.result import DenseModel, Factorization, factorization_of
from lrcompress.compression.serving import check_target
from lrcompress.config import CalibrationSettings, FactorizeSettings, RefineSettings
from lrcompress.config.recipe import sections, sections_from_flat
from lrcompress.layers.experts import EXPERT_LIST
from lrcompress.layers.ffn_layouts import select
from lrcompress.layers.lowrank import compressed_layers, install, is_linear
from lrcompress.layers.model_info import plain_model
from lrcompress.layers.model_state import in_float32
from lrcompress.layers.moe import unpacked
from lrcompress.layers.nonfinite import nonfinite_weights
from lrcompress.layers.token_ids import notice_missing_rows
from lrcompress.methods.types import LinearSpec
from lrcompress.models.hf_quantizer import record_layout
from lrcompress.runtime import distributed
from lrcompress.runtime.distributed import run_on_main
from lrcompress.runtime.errors import InputError, NotFiniteError
from lrcompress.runtime.progress import Progress, silent
from lrcompress.runtime.stage_costs import recording, stage

OVERFLOWS = "activations overflow float16, so the model was run in float32 to calibrate"
NOT_ANCHORED = (
    "mixtures of experts cannot be anchored, so in spite of effort best this model was factorized "
    "with sequential independent"
)


def factorize(
    model: Any, tokenizer: Any = None, *, progress: Progress = silent, **settings: Any
) -> Factorization:
    """Replaces the FFN linears of `model` by low-rank factors, in place.

    `settings` are the keys of the recipe's `calibration`, `factorize` and `refine` sections, by
    the names of the flags: rank or keep_ratio, method, ranks, form, calibration, num_samples,
    seq_len, seed, include, exclude, refine, effort, ... `tokenizer` is needed by every method that
    calibrates.
    Raises InputError where a setting is refused or does not fit the model; the model is then
    as it was.
    """
    checked = sections_from_flat(sections("calibration", "factorize", "refine"), settings)
    return factorize_model(plain_model(model), tokenizer, **checked, progress=progress)


def factorize_model(
    model: Any,
    tokenizer: Any,
    calibration: CalibrationSettings,
    factorize: FactorizeSettings,
    refine: RefineSettings,
    progress: Progress = silent,
    work: Path | None = None,
) -> Factorization:
    """`factorize` with checked settings; refined blocks are kept in the folder `work`, if given.

    A later call with the same settings and `work` resumes from them.
    """
    return Compressor(model, tokenizer, calibration, factorize, refine, progress, work).run()


@dataclass(frozen=True)
class Compressor:
    """Takes one model in memory through the stages: calibrate, plan, replace layers, refine."""

    model: Any
    tokenizer: Any
    calibration_settings: CalibrationSettings
    settings: FactorizeSettings
    refine_settings: RefineSettings
    progress: Progress
    work: Path | None
    started: float = field(default_factory=time.perf_counter)

    def run(self) -> Factorization:
        """All stages, in the model's own precision; in float32 where its float16 overflows."""
        with recording():
            return self._run()

    def _run(self) -> Factorization:
        session = self.calibration()
        # float32 would change the bytes that a target size is compared with
        keep_ratio = selected_keep_ratio(self.model, session.linears, self.settings)
        try:
            return self._prepare_and_compress(session, keep_ratio)
        except NotFiniteError:
            if distributed.world_size() > 1 or self.model.dtype != torch.float16:
                raise
            with _compressed_in_float32(self.model):
                result = self._prepare_and_compress(self.calibration(), keep_ratio)
            return replace(result, notes=(*result.notes, OVERFLOWS))

    def _prepare_and_compress(
        self, session: CalibrationSession, keep_ratio: float | None
    ) -> Factorization:
        prepared = prepare(
            self.model, session.linears, self.settings, keep_ratio, session, self.progress
        )
        return self.compress(prepared, session)

    def calibration(self) -> CalibrationSession:
        """The calibration of this model, which measures nothing before a stage needs it.

        Raises InputError where the settings do not fit the model, or weights are not finite.
        """
        settings = self.settings
        if settings.streaming:
            raise InputError(
                "streaming reads the model's folder block by block and this model is in memory: "
                "use `lrcompress factorize` or `lrcompress run`, or leave streaming out"
            )
        with unpacked(self.model):
            linears = select(self.model, settings.include, settings.exclude, settings.dense_first)
            check_weights(self.model, linears)
            check_target(self.model, linears, settings)
            _join_tied(self.model, linears)
        if (weight := next(nonfinite_weights(self.model), None)) is not None:
            raise InputError(f"{weight} is not finite: use another copy or an earlier checkpoint")
        if settings.sequential == "anchored" and not _falls_back(settings, linears):
            _refuse_experts(linears)
        if not settings.build_method().requires:  # other methods read text, which is checked
            notice_missing_rows(self.model, self.tokenizer)
        return CalibrationSession(
            self.model, self.tokenizer, linears, self.calibration_settings, self.progress
        )

    def compress(self, prepared: PreparedModel, session: CalibrationSession) -> Factorization:
        """Replaces and refines layers as planned, in place; after an error the model is as it was.

        Without a plan, the smallest model within the perplexity limit is searched for.
        """
        with unpacked(self.model), recording() as costs:
            trials: tuple[dict[str, float], ...] = ()
            if prepared.plan is None:
                with stage("search"):
                    plan, trials = smallest_within(
                        self.model, self.tokenizer, prepared, self.settings, self.progress
                    )
                prepared = replace(prepared, plan=plan)
            before = DenseModel.of(self.model, self.started)
            linears, refined = self._replace_and_refine(prepared, session)
            record_layout(self.model)
            result = factorization_of(
                self.model, before, prepared, linears, refined, session.fingerprint, trials
            )
            result = replace(result, stages=costs.to_dict())
            if _falls_back(self.settings, prepared.linears):
                return replace(result, notes=(*result.notes, NOT_ANCHORED))
            return result

    def _replace_and_refine(
        self, prepared: PreparedModel, session: CalibrationSession
    ) -> tuple[tuple[LinearResult, ...], tuple[RefinedBlock, ...]]:
        originals = {spec.name: self.model.get_submodule(spec.name) for spec in prepared.linears}
        try:
            linears = self._replace_layers(prepared, session)
            return linears, self._refine(originals, prepared, session)
        except BaseException:
            for name, layer in originals.items():
                install(self.model, name, layer)
            raise

    def _replace_layers(
        self, prepared: PreparedModel, session: CalibrationSession
    ) -> tuple[LinearResult, ...]:
        plan = prepared.plan
        assert plan is not None
        settings = self.settings
        if settings.sequential == "independent" or _falls_back(settings, prepared.linears):
            return apply_plan(self.model, prepared, plan, self.progress)
        tokens, damping = session.tokens, settings.anchor_damping
        with stage("factors"):
            return run_on_main(
                lambda: apply_plan_anchored(
                    self.model,
                    prepared,
                    plan,
                    tokens=tokens,
                    damping=damping,
                    progress=self.progress,
                )
            )

    def _refine(
        self,
        originals: Mapping[str, nn.Module],
        prepared: PreparedModel,
        session: CalibrationSession,
    ) -> tuple[RefinedBlock, ...]:
        if not self.refine_settings.enabled:
            return ()
        work = None
        if self.work is not None:
            work = self.work / self._refinement_key(originals, prepared, session)
        tokens = session.tokens
        with stage("refinement"):
            return run_on_main(
                lambda: refine(
                    self.model,
                    originals,
                    prepared,
                    tokens=tokens,
                    settings=self.refine_settings,
                    work=work,
                    progress=self.progress,
                )
            )

    def _refinement_key(
        self,
        originals: Mapping[str, nn.Module],
        prepared: PreparedModel,
        session: CalibrationSession,
    ) -> str:
        """A hash of all that refined blocks depend on, so that no other work is resumed."""
        plan = prepared.plan
        assert plan is not None
        sections = (self.calibration_settings, self.settings, self.refine_settings)
        settings = [section.model_dump(mode="json") for section in sections]
        inputs = [settings, dict(plan.ranks), dict(plan.widths)]
        digest = hashlib.sha256(fingerprints.digest(inputs, "factorize").encode())
        digest.update(session.tokens.numpy().tobytes())
        fingerprints.add_tensors(digest, self.model.state_dict().items())
        for linear_name, layer in originals.items():
            tensors = (
                (f"{linear_name} {name}", tensor) for name, tensor in layer.state_dict().items()
            )
            fingerprints.add_tensors(digest, tensors)
        return digest.hexdigest()[:16]


@contextmanager
def _compressed_in_float32(model: nn.Module) -> Iterator[None]:
    """The model is in float32 inside; after it every layer, new ones too, has its dtype again."""
    # fused experts are linears only while they are unpacked, so their dtype is not in `dtypes`
    model_dtype = next(model.parameters()).dtype
    dtypes = {name: m.weight.dtype for name, m in model.named_modules() if is_linear(m)}
    with in_float32(model):
        yield
    for name, layer in compressed_layers(model):
        layer.to(dtypes.get(name, model_dtype))


def _join_tied(model: nn.Module, linears: Iterable[LinearSpec]) -> None:
    """Makes each of `linears` one module with those tied to it, so that hooks see every use."""
    for spec in linears:
        install(model, spec.name, model.get_submodule(spec.name))


def _falls_back(settings: FactorizeSettings, linears: Iterable[LinearSpec]) -> bool:
    """Whether anchored fits, which effort best stands for, give way to experts among `linears`."""
    is_wanted = settings.effort == "best" and settings.sequential == "anchored"
    return is_wanted and any(spec.mixture for spec in linears)


def _refuse_experts(linears: Iterable[LinearSpec]) -> None:
    """Raises InputError for experts, which cannot be anchored.

    After a change in earlier blocks the router sends an expert other tokens, so there are no dense
    outputs to fit it to.
    """
    if any(spec.mixture for spec in linears):
        raise InputError(
            "--sequential anchored cannot fit mixtures of experts, which read other tokens once "
            "the blocks before them are compressed: use --sequential independent, or leave them "
            f"out with --exclude '*.{EXPERT_LIST}.*'"
        )


def save(model: Any, out: str | Path, tokenizer: Any = None, **record: Any) -> dict[str, Any]:
    """Writes a factorized model to the new folder `out`, atomically, with its model card.

    `record` goes into lrcompress.json; pass `**factorization.to_dict()`.
    Raises InputError if `out` exists, MachineError if it cannot be written.
    """
    return save_checkpoint(model, tokenizer, Path(out), record)
