"""Measures every variant of a recipe at every keep_ratio, in memory; resumes.

The calibration, the dense model's metrics, and each variant's candidates and decompositions are
made once and shared by the points.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lrcompress.checkpoint import fingerprints
from lrcompress.compression.calibration.session import CalibrationSession
from lrcompress.compression.factorize import Compressor
from lrcompress.compression.planning import PreparedModel, prepare
from lrcompress.config import BUDGETS
from lrcompress.config.recipe import Recipe
from lrcompress.data.corpora import read_corpus
from lrcompress.evaluation import evaluate
from lrcompress.evaluation.contamination import check_recipe, reads_text
from lrcompress.evaluation.tasks.cache import definitions_hash
from lrcompress.evaluation.tasks.registry import Tasks
from lrcompress.layers.model_info import sequence_length
from lrcompress.methods.plan import Budget
from lrcompress.models.loading import Loaded, load_model
from lrcompress.models.torchao import quantize
from lrcompress.runtime import locks
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.memory import peak_memory
from lrcompress.runtime.packages import require_extra
from lrcompress.runtime.progress import Progress, silent
from lrcompress.workflows.sweep.costs import CostLedger
from lrcompress.workflows.sweep.folder import SweepFolder
from lrcompress.workflows.sweep.point import DENSE, SweepPoint, label
from lrcompress.workflows.sweep.report import SweepReport
from lrcompress.workflows.sweep.variants import Variant, variants


def sweep(recipe: Recipe, out: Path, progress: Progress = silent) -> list[SweepPoint]:
    """Measures every point of `recipe.sweep`, writes the report to `out`, and returns the points.

    Points that `out` already has from the same inputs are not made again. The first point is the
    dense model's. Raises InputError where `out` holds something else, where a name or text does
    not fit, and where a text of the evaluation is also calibrated on.
    """
    return list(SweepRunner(recipe, out, progress).all().points)


@dataclass(frozen=True)
class SharedCalibration:
    """The calibration of all variants, and the peak memory in bytes of measuring its moments."""

    session: CalibrationSession
    memory: int | None


@dataclass(frozen=True)
class SharedPreparation:
    """The candidates of one variant for all its keep ratios, and the seconds that they took."""

    model: PreparedModel
    seconds: float


@dataclass(frozen=True)
class PointSpec:
    """A compressed point: `weights` is the format of quantized weights (int8, int4), if any."""

    variant: Variant
    keep_ratio: float
    weights: str | None

    @property
    def name(self) -> str:
        return _name(self.variant.name, self.weights)


class SweepRunner:
    """One recipe's points over one folder."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress) -> None:
        self.recipe, self.progress = recipe, progress
        self.folder = SweepFolder(recipe, out)
        self.variants = list(variants(recipe))
        self._check_quantize()

    def _check_quantize(self) -> None:
        """Raises InputError without torchao, or where two points would have one name."""
        if self.recipe.sweep.quantize:
            require_extra("torchao", "quantize")
        names = {DENSE, *(variant.name for variant in self.variants)}
        quantized = {_name(name, weights) for name in names for weights in self._weights[1:]}
        if clashes := quantized & names:
            raise InputError(
                f"sweep.variants.{clashes.pop()}: a quantized variant has this name too; choose "
                "another name"
            )

    def all(self) -> SweepReport:
        """Makes every point that the folder does not have, and returns the report."""
        self.folder.refuse_foreign()
        with locks.inside(self.folder.out):
            self.folder.claim()
            for spec in self.recipe.evaluate.perplexity:
                read_corpus(spec, "test")  # refuses a missing text before hours of work
            points = list(self._dense_points())
            for variant in self.variants:
                points += self._variant_points(variant)
                report = self.folder.write(points)
            return report

    @property
    def _weights(self) -> tuple[str | None, ...]:
        """The formats of weights of every point: None for not quantized, then int8 or int4."""
        return (None, *self.recipe.sweep.quantize)

    def _dense_points(self) -> Iterator[SweepPoint]:
        inputs = self._dense_inputs()
        for weights in self._weights:
            make = partial(self._make_dense_point, weights)
            all_inputs = inputs + _quantize_inputs(weights)
            yield self.folder.dense_point(_name(DENSE, weights), all_inputs, make)

    def _variant_points(self, variant: Variant) -> Iterator[SweepPoint]:
        prepare_once = cache(partial(self._prepare, variant))
        inputs = self._variant_inputs(variant)
        for keep_ratio in self.recipe.sweep.keep_ratios:
            for weights in self._weights:
                point = PointSpec(variant, keep_ratio, weights)
                make = partial(self._make_point, point, prepare_once)
                all_inputs = inputs + _quantize_inputs(weights)
                yield self.folder.point(point.name, keep_ratio, all_inputs, make)

    def _dense_inputs(self) -> list[Any]:
        """Everything that the dense model's point depends on."""
        recipe, evaluate = self.recipe, self.recipe.evaluate
        texts = fingerprints.evaluation_inputs(evaluate)
        measuring = evaluate.cache_key(include_baseline=False)
        return [
            recipe.model.model_dump(),
            fingerprints.model_state(recipe.model),
            measuring,
            texts,
            self._task_state,
        ]

    def _variant_inputs(self, variant: Variant) -> list[Any]:
        """Everything that the points of a variant depend on, apart from their keep_ratio."""
        calibration = self.recipe.calibration
        texts = [
            fingerprints.data_state(spec) for spec in (*calibration.data, calibration.chat_template)
        ]
        return [
            *self._dense_inputs(),
            variant.factorize.model_dump(mode="json", exclude={*BUDGETS}),
            variant.refine.model_dump(),
            calibration.model_dump(mode="json"),
            texts,
        ]

    @cached_property
    def _tasks(self) -> Tasks | None:
        return evaluate.resolve_tasks(self.recipe.evaluate)

    @cached_property
    def _task_state(self) -> str | None:
        return definitions_hash(self._tasks.tasks.values()) if self._tasks else None

    @cached_property
    def _loaded(self) -> Loaded:
        return load_model(self.recipe.model)

    @property
    def _model(self) -> Any:
        return self._loaded[0]

    def _compressor(self, variant: Variant, model: Any) -> Compressor:
        return Compressor(
            model,
            self._loaded[1],
            self.recipe.calibration,
            variant.factorize,
            variant.refine,
            self.progress,
            None,
        )

    @cached_property
    def _calibration(self) -> SharedCalibration:
        """With the moments that any variant needs: without gradients, with gradients, or both."""
        self._refuse_contamination()
        # all read the same text and linears; each may refuse the model
        session, *_ = (self._compressor(v, self._model).calibration() for v in self.variants)
        requirements = [variant.factorize.build_method().requires for variant in self.variants]
        with_gradients = {"gradient_moment" in required for required in requirements if required}
        with peak_memory() as memory:
            for gradients in sorted(with_gradients):
                session.moments(gradients)
        return SharedCalibration(session, memory.peak)

    def _refuse_contamination(self) -> None:
        """Raises InputError where a text of the evaluation is also calibrated on."""
        no_training = self.recipe.finetune.model_copy(update={"data": ()})  # a sweep does none
        for variant in self.variants:
            recipe = self.recipe.model_copy(
                update={
                    "factorize": variant.factorize,
                    "refine": variant.refine,
                    "finetune": no_training,
                }
            )
            if reads_text(recipe):
                check_recipe(recipe)
                break

    def _prepare(self, variant: Variant) -> SharedPreparation:
        session = self._calibration.session
        started = time.perf_counter()
        prepared = prepare(
            self._model, session.linears, variant.factorize, None, session, self.progress
        ).for_many_plans()
        return SharedPreparation(prepared, time.perf_counter() - started)

    def _make_dense_point(self, weights: str | None) -> SweepPoint:
        if weights is None:
            return self._measure(DENSE, 1.0, None)
        model = copy.deepcopy(self._model)
        started = time.perf_counter()
        quantize(model, weights)
        seconds = time.perf_counter() - started
        return replace(self._measure(_name(DENSE, weights), 1.0, model), seconds=seconds)

    def _make_point(
        self, point: PointSpec, prepare_once: Callable[[], SharedPreparation]
    ) -> SweepPoint:
        calibration, variant = self._calibration, point.variant
        ledger = CostLedger(calibration.session)
        with peak_memory() as memory:
            preparation = prepare_once()
            prepared = preparation.model
            model = copy.deepcopy(self._model)
            with ledger.timing(prepared.decompositions):
                kept = self._compress(point, prepared, model)
            if point.weights is not None:
                quantize(model, point.weights)
        ledger.charge(preparation.seconds, memory.peak)
        text = ""
        if _is_calibrated(variant, prepared):
            ledger.charge_calibration(prepared, calibration.memory)
            text = _text_of(calibration.session)
        measured = self._measure(point.name, point.keep_ratio, model)
        return replace(measured, kept=kept, seconds=ledger.seconds, memory=ledger.memory, text=text)

    def _compress(self, point: PointSpec, prepared: PreparedModel, model: Any) -> float:
        """Compresses `model` in place; returns the share of the selected parameters kept."""
        budget = Budget(keep_ratio=point.keep_ratio)
        plan = prepared.allocator.allocate(prepared.candidates, budget)
        planned = replace(prepared, keep_ratio=point.keep_ratio, plan=plan)
        compressor = self._compressor(point.variant, model)
        result = compressor.compress(planned, self._calibration.session)
        return result.selected.keep_ratio

    def _measure(self, name: str, keep_ratio: float, model: Any) -> SweepPoint:
        """The point's metrics, without its costs; the dense model's where `model` is None.

        Speeds are measured in alternation with the dense model's.
        """
        settings, title = self.recipe.evaluate, label(name, keep_ratio)
        loaded = self._loaded if model is None else (model, self._loaded[1])
        length = sequence_length(loaded[0], settings.context_length)
        results = evaluate.quality(title, loaded, settings, self._tasks, length, self.progress)
        models = {DENSE: self._loaded} | {title: loaded}
        speeds = evaluate.speed(models, settings, self.progress)
        return SweepPoint(
            variant=name,
            keep_ratio=keep_ratio,
            kept=1.0,
            seconds=0.0,
            memory=None,
            text="",
            metrics=(*results.metrics, *(speed for speed in speeds if speed.model == title)),
            baseline=tuple(speed for speed in speeds if speed.model != title),
        )


def _is_calibrated(variant: Variant, prepared: PreparedModel) -> bool:
    """Whether any stage of the variant reads the calibration text."""
    is_anchored = variant.factorize.sequential == "anchored"
    return bool(prepared.moments) or variant.refine.enabled or is_anchored


def _text_of(session: CalibrationSession) -> str:
    """The calibration text in words."""
    fingerprint = session.fingerprint
    assert fingerprint is not None
    return f"{fingerprint.num_samples} x {fingerprint.seq_len} tokens of {fingerprint.data}"


def _quantize_inputs(weights: str | None) -> list[Any]:
    return [] if weights is None else [weights, version("torchao")]


def _name(variant: str, weights: str | None) -> str:
    """The variant's name in reports and files: with the format of quantized weights, if any."""
    return variant if weights is None else f"{variant} {weights}"
