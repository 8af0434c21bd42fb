"""Many points of one trade-off: every variant at every keep_ratio, in memory, resumable.

Calibration, each variant's choices and decompositions, and the dense model's numbers are made
once and shared.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from lrcompress.workflows.sweep.folder import SweepFolder
from lrcompress.workflows.sweep.point import DENSE, SweepPoint, label
from lrcompress.workflows.sweep.report import SweepReport
from lrcompress.workflows.sweep.variants import Variant, variants

# settings that leave a point's metrics as they are, or that a sweep does not use
NO_INPUT = ("baseline", "compared_windows", "prompts", "continuation_tokens", "task_cache")


def sweep(recipe: Recipe, out: Path, progress: Progress = silent) -> list[SweepPoint]:
    """Measures every point of `recipe.sweep` and writes its report to `out`.

    Points that `out` already holds, made of the same inputs, are not made again. The first point
    is the dense model. Raises InputError where `out` is something else.
    """
    return list(SweepRunner(recipe, out, progress).all().points)


class SweepRunner:
    """One recipe's points over one folder."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress) -> None:
        self.recipe, self.progress = recipe, progress
        self.folder = SweepFolder(recipe, out)
        self.variants = list(variants(recipe))
        self._check_quantize()

    def _check_quantize(self) -> None:
        if self.recipe.sweep.quantize:
            require_extra("torchao", "quantize")
        taken = {_name(one, weights) for one in self._names for weights in self._weights[1:]}
        if both := taken & {*self._names}:
            raise InputError(
                f"sweep.variants.{both.pop()}: so a quantized variant is called; choose another "
                "name"
            )

    @property
    def _names(self) -> list[str]:
        return [DENSE, *(variant.name for variant in self.variants)]

    def all(self) -> SweepReport:
        self.folder.refuse_other()
        with locks.inside(self.folder.out):
            return self._all()

    def _all(self) -> SweepReport:
        self.folder.claim()
        for spec in self.recipe.evaluate.perplexity:
            read_corpus(spec, "test")
        points = list(self._dense())
        for variant in self.variants:
            points += self._of(variant)
            report = self.folder.write(points)
        return report

    @property
    def _weights(self) -> tuple[str | None, ...]:
        """As they are, then as they are to be quantized."""
        return (None, *self.recipe.sweep.quantize)

    def _dense(self) -> Iterator[SweepPoint]:
        for weights in self._weights:
            make = partial(self._dense_point, weights)
            yield self._point(DENSE, 1.0, self._inputs(None), weights, make)

    def _of(self, variant: Variant) -> Iterator[SweepPoint]:
        share = cache(partial(self._prepared, variant))
        inputs = self._inputs(variant)
        for ratio in self.recipe.sweep.keep_ratios:
            for weights in self._weights:
                make = partial(self._made, variant, ratio, weights, share)
                yield self._point(variant.name, ratio, inputs, weights, make)

    def _point(
        self,
        variant: str,
        ratio: float,
        inputs: list[Any],
        weights: str | None,
        make: Callable[[], SweepPoint],
    ) -> SweepPoint:
        depends = inputs if weights is None else [*inputs, weights, version("torchao")]
        return self.folder.point(_name(variant, weights), ratio, depends, make)

    def _dense_point(self, weights: str | None) -> SweepPoint:
        if weights is None:
            return self._measured(DENSE, 1.0, None)
        model, started = copy.deepcopy(self._model), time.perf_counter()
        quantize(model, weights)
        seconds = time.perf_counter() - started
        return replace(self._measured(_name(DENSE, weights), 1.0, model), seconds=seconds)

    def _inputs(self, variant: Variant | None) -> list[Any]:
        recipe, evaluate = self.recipe, self.recipe.evaluate
        texts = [fingerprints.data_state(spec) for spec in (*evaluate.perplexity, *evaluate.tasks)]
        texts.append(fingerprints.folder_state(evaluate.data_dir))
        measuring = evaluate.model_dump(mode="json", exclude={*NO_INPUT})
        dense = [
            recipe.model.model_dump(),
            fingerprints.model_state(recipe.model),
            measuring,
            texts,
        ]
        if variant is None:
            return dense
        calibration = recipe.calibration
        read = [fingerprints.data_state(spec) for spec in calibration.data]
        settings = variant.factorize.model_dump(mode="json", exclude={*BUDGETS})
        made = [settings, variant.refine.model_dump(), calibration.model_dump(mode="json"), read]
        return dense + made

    @cached_property
    def _tasks(self) -> Tasks | None:
        return evaluate.resolve_tasks(self.recipe.evaluate)

    @cached_property
    def _loaded(self) -> Loaded:
        return load_model(self.recipe.model)

    @property
    def _model(self) -> Any:
        return self._loaded[0]

    def _compression(self, variant: Variant, model: Any) -> Compressor:
        calibration, tokenizer = self.recipe.calibration, self._loaded[1]
        settings, refine = variant.factorize, variant.refine
        return Compressor(model, tokenizer, calibration, settings, refine, self.progress, None)

    @cached_property
    def _text(self) -> tuple[CalibrationSession, int | None]:
        """Of the widest needs of all variants, and the peak memory of measuring."""
        self._refuse_contamination()
        text = self._compression(self.variants[0], self._model).calibration()
        needs = [variant.factorize.compressor().requires for variant in self.variants]
        with peak_memory() as memory:
            for gradients in sorted({"gradient_moment" in need for need in needs if need}):
                text.moments(gradients)
        return text, memory.peak

    def _refuse_contamination(self) -> None:
        nothing = self.recipe.finetune.model_copy(update={"data": ()})  # a sweep does not train
        for variant in self.variants:
            parts = {"factorize": variant.factorize, "refine": variant.refine, "finetune": nothing}
            recipe = self.recipe.model_copy(update=parts)
            if reads_text(recipe):
                check_recipe(recipe)
                break

    def _prepared(self, variant: Variant) -> tuple[PreparedModel, float]:
        """What all points of a variant share, and the seconds that it took."""
        text, started = self._text[0], time.perf_counter()
        arguments = (variant.factorize, None, text, self.progress)
        prepared = prepare(self._model, text.linears, *arguments).for_many_plans()
        return prepared, time.perf_counter() - started

    def _made(
        self,
        variant: Variant,
        ratio: float,
        weights: str | None,
        share: Callable[[], tuple[PreparedModel, float]],
    ) -> SweepPoint:
        text, peak = self._text
        with peak_memory() as memory:
            prepared, shared = share()
            model = copy.deepcopy(self._model)
            kept, seconds = self._carried_out(variant, ratio, prepared, model)
            if weights is not None:
                quantize(model, weights)
        point = self._measured(_name(variant.name, weights), ratio, model)
        point = replace(point, kept=kept, seconds=seconds + shared, memory=memory.peak)
        return self._charged(point, variant, prepared, text, peak)

    def _carried_out(
        self, variant: Variant, ratio: float, prepared: PreparedModel, model: Any
    ) -> tuple[float, float]:
        """The share kept of `model`, and the seconds as if nothing had been decomposed before."""
        text, started = self._text[0], time.perf_counter()
        read, saved = text.text_seconds, prepared.decompositions.saved
        plan = prepared.allocator.allocate(prepared.candidates, Budget(keep_ratio=ratio))
        planned = replace(prepared, keep_ratio=ratio, plan=plan)
        done = self._compression(variant, model).compress(planned, text)
        seconds = time.perf_counter() - started - (text.text_seconds - read)
        return done.selected.keep_ratio, seconds + prepared.decompositions.saved - saved

    def _charged(
        self,
        point: SweepPoint,
        variant: Variant,
        prepared: PreparedModel,
        text: CalibrationSession,
        peak: int | None,
    ) -> SweepPoint:
        """`point` with its part in what was shared."""
        moments = prepared.moments
        if not (moments or variant.refine.enabled or variant.factorize.sequential == "anchored"):
            return point
        read = text.fingerprint
        assert read is not None
        words = f"{read.num_samples} x {read.seq_len} tokens of {read.data}"
        measuring = text.moment_seconds[moments.gradient_tokens > 0] if moments else 0.0
        seconds = point.seconds + text.text_seconds + measuring
        memory = max(point.memory or 0, (peak or 0) if moments else 0) or None
        return replace(point, text=words, seconds=seconds, memory=memory)

    def _measured(self, variant: str, ratio: float, model: Any) -> SweepPoint:
        """Of the dense model where `model` is None; speeds in turn with the dense model's."""
        settings, name, tasks = self.recipe.evaluate, label(variant, ratio), self._tasks
        loaded = self._loaded if model is None else (model, self._loaded[1])
        length = sequence_length(loaded[0], settings.context_length)
        found = evaluate.quality(name, loaded, settings, tasks, length, self.progress)
        speeds = evaluate.speed({DENSE: self._loaded} | {name: loaded}, settings, self.progress)
        metrics = [*found.metrics, *(metric for metric in speeds if metric.model == name)]
        baseline = tuple(metric for metric in speeds if metric.model != name)
        return SweepPoint(variant, ratio, 1.0, 0.0, None, "", tuple(metrics), baseline)


def _name(variant: str, weights: str | None) -> str:
    return variant if weights is None else f"{variant} {weights}"
