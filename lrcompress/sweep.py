"""Many points of one trade-off: every variant at every keep_ratio, in memory, resumable.

Calibration, each variant's choices and the dense model's numbers are measured once and shared.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lrcompress import compare, stages
from lrcompress.calibration import Calibration
from lrcompress.compress import Compression
from lrcompress.contamination import reads_text, refuse_planned
from lrcompress.corpora import read_corpus
from lrcompress.files import replace_text
from lrcompress.memory import peak_memory
from lrcompress.points import DENSE, Point, markdown
from lrcompress.prepare import Prepared, prepare
from lrcompress.protocols import Budget, InputError, Progress, silent
from lrcompress.recipe import Recipe, flags, from_flat, sections, to_yaml
from lrcompress.settings import BUDGETS, FactorizeSettings, RefineSettings
from lrcompress.sizes import sequence_length
from lrcompress.sources import Loaded, load_settings
from lrcompress.tasks import Tasks

RECIPE, POINTS = "recipe.yaml", "points"
FORMATS = ("sweep.md", "sweep.json")
SELECTION = ("include", "exclude", "dense_first")
MEASURED = (
    "perplexity", "context_length", "stride", "tasks", "limit", "num_fewshot", "seed", "data_dir",
    "batch_size",
)  # fmt: skip
# what a variant decides as a whole: the recipe's own choice would hide a method's defaults
METHOD_KEYS = ("method", "method_options", "ranks", "ranks_options", "form")


@dataclass(frozen=True)
class Variant:
    name: str
    factorize: FactorizeSettings
    refine: RefineSettings


def sweep(recipe: Recipe, out: Path, progress: Progress = silent) -> list[Point]:
    """Measures every point of `recipe.sweep` and writes sweep.json and sweep.md to `out`.

    Points that `out` already holds, made of the same inputs, are not made again. The first point
    is the dense model. Raises InputError where `out` is something else.
    """
    return Sweep(recipe, out, progress).all()


def variants(recipe: Recipe) -> Iterator[Variant]:
    """The recipe's own section if it names neither methods nor variants.

    A variant that names a method has that method's defaults; others are the recipe's otherwise.
    """
    shared = recipe.factorize.model_dump(exclude={*BUDGETS, *METHOD_KEYS})
    shared |= {flag: getattr(recipe.refine, key) for flag, key in flags(RefineSettings).items()}
    own = recipe.factorize.model_dump(include={*METHOD_KEYS})
    settings = recipe.sweep
    named = {method: {"method": method} for method in settings.methods} | settings.variants
    for name, values in (named or {recipe.factorize.method: {}}).items():
        say = partial(_say, name)
        for key in (*BUDGETS, *SELECTION):
            if key in values:
                raise InputError(f"{say(key)}: it holds for all variants; set it outside of them")
        flat = (
            shared | {"keep_ratio": settings.keep_ratios[0]} | ({} if "method" in values else own)
        )
        checked = from_flat(sections("factorize", "refine"), flat | values, say)
        yield Variant(name, checked["factorize"], checked["refine"])


def _say(variant: str, key: str) -> str:
    return f"sweep.variants.{variant}.{key}"


class Sweep:
    """One recipe's points over one folder."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress) -> None:
        self.recipe, self.out, self.progress = recipe, out, progress
        self.variants = list(variants(recipe))

    def all(self) -> list[Point]:
        self._claim()
        for spec in self.recipe.evaluate.perplexity:
            read_corpus(spec, "test")
        points = [self._point(None, 1.0, lambda: self._measured(DENSE, 1.0, self._model))]
        for variant in self.variants:
            points += self._of(variant)
            self._write(points)
        return points

    def _claim(self) -> None:
        """Makes the folder a sweep's. Raises InputError where it holds something else."""
        if self.out.exists() and not self._is_sweep():
            raise InputError(
                f"output {str(self.out)!r} exists and is no sweep: choose another name"
            )
        recipe, text = self.out / RECIPE, to_yaml(self.recipe)
        if recipe.exists() and recipe.read_text("utf-8") != text:
            for name in FORMATS:  # they are of other settings
                (self.out / name).unlink(missing_ok=True)
        (self.out / POINTS).mkdir(parents=True, exist_ok=True)
        replace_text(recipe, text)

    def _is_sweep(self) -> bool:
        if not self.out.is_dir():
            return False
        names = {path.name for path in self.out.iterdir()}
        own = {RECIPE, POINTS, *FORMATS}
        partial = {f".{name}.partial" for name in own}
        return not names or (POINTS in names and names <= own | partial)

    def _of(self, variant: Variant) -> Iterator[Point]:
        shared: dict[str, Any] = {}
        for ratio in self.recipe.sweep.keep_ratios:
            make = partial(self._made, variant, ratio, shared)
            yield self._point(variant, ratio, make)

    def _point(self, variant: Variant | None, ratio: float, make: Callable[[], Point]) -> Point:
        name = DENSE if variant is None else f"{variant.name}-{ratio:g}"
        file = self.out / POINTS / f"{name}.json"
        inputs = stages.digest([self._inputs(variant), ratio])
        known = stages.read(file)
        if known.get("inputs") != inputs:
            known = {"inputs": inputs, "point": asdict(make())}
            stages.write(file, known)
        return Point.from_dict(known["point"])

    def _inputs(self, variant: Variant | None) -> list[Any]:
        recipe, evaluate = self.recipe, self.recipe.evaluate
        texts = [stages.data_state(spec) for spec in (*evaluate.perplexity, *evaluate.tasks)]
        texts.append(stages.folder_state(evaluate.data_dir))
        measuring = evaluate.model_dump(mode="json", include={*MEASURED})
        dense = [recipe.model.model_dump(), stages.model_state(recipe.model), measuring, texts]
        if variant is None:
            return dense
        calibration = recipe.calibration
        read = [stages.data_state(spec) for spec in calibration.data]
        settings = variant.factorize.model_dump(mode="json", exclude={*BUDGETS})
        made = [settings, variant.refine.model_dump(), calibration.model_dump(mode="json"), read]
        return dense + made

    @cached_property
    def _tasks(self) -> Tasks | None:
        return compare.resolve_tasks(self.recipe.evaluate)

    @cached_property
    def _loaded(self) -> Loaded:
        return load_settings(self.recipe.model)

    @property
    def _model(self) -> Any:
        return self._loaded[0]

    def _compression(self, variant: Variant, model: Any) -> Compression:
        calibration, tokenizer = self.recipe.calibration, self._loaded[1]
        settings, refine = variant.factorize, variant.refine
        return Compression(model, tokenizer, calibration, settings, refine, self.progress, None)

    @cached_property
    def _text(self) -> tuple[Calibration, int | None]:
        """Of the widest needs of all variants, and the peak memory of measuring."""
        self._refuse_contamination()
        text = self._compression(self.variants[0], self._model).text()
        needs = [variant.factorize.compressor().requires for variant in self.variants]
        with peak_memory() as memory:
            if any(needs):
                text.moments(any("gradient_moment" in need for need in needs))
        return text, memory.peak

    def _refuse_contamination(self) -> None:
        nothing = self.recipe.finetune.model_copy(update={"data": ()})  # a sweep does not train
        for variant in self.variants:
            parts = {"factorize": variant.factorize, "refine": variant.refine, "finetune": nothing}
            recipe = self.recipe.model_copy(update=parts)
            if reads_text(recipe):
                refuse_planned(recipe)
                break

    def _made(self, variant: Variant, ratio: float, shared: dict[str, Any]) -> Point:
        text, peak = self._text
        with peak_memory() as memory:
            started = time.perf_counter()
            if not shared:
                settings = variant.factorize
                arguments = (settings, None, text.moments, self.progress)
                shared["prepared"] = prepare(self._model, text.linears, *arguments)
                shared["seconds"] = time.perf_counter() - started
                started = time.perf_counter()
            prepared = shared["prepared"]
            plan = prepared.allocator.allocate(prepared.choices, Budget(keep_ratio=ratio))
            model, read = copy.deepcopy(self._model), text.reading
            planned = replace(prepared, keep_ratio=ratio, plan=plan)
            done = self._compression(variant, model).carry_out(planned, text)
            seconds = time.perf_counter() - started - (text.reading - read) + shared["seconds"]
        point = self._measured(variant.name, ratio, model)
        point = replace(point, kept=done.selected.keep_ratio, seconds=seconds, memory=memory.peak)
        return self._charged(point, variant, prepared, text, peak)

    def _charged(
        self,
        point: Point,
        variant: Variant,
        prepared: Prepared,
        text: Calibration,
        peak: int | None,
    ) -> Point:
        """`point` with its part in what was shared."""
        measured = prepared.moments is not None
        if not (measured or variant.refine.enabled or variant.factorize.sequential == "anchored"):
            return point
        read = text.fingerprint
        assert read is not None
        words = f"{read.num_samples} x {read.seq_len} tokens of {read.data}"
        seconds = point.seconds + text.reading + (text.measuring if measured else 0.0)
        memory = max(point.memory or 0, (peak or 0) if measured else 0) or None
        return replace(point, text=words, seconds=seconds, memory=memory)

    def _measured(self, name: str, ratio: float, model: Any) -> Point:
        settings = self.recipe.evaluate
        length = sequence_length(model, settings.context_length)
        label = name if name == DENSE else f"{name} {ratio:g}"
        loaded = (model, self._loaded[1])
        found = compare.quality(label, loaded, settings, self._tasks, length, self.progress)
        return Point(name, ratio, 1.0, 0.0, None, "", tuple(found.metrics))

    def _write(self, points: list[Point]) -> None:
        content = json.dumps([asdict(point) for point in points], indent=2, default=str)
        replace_text(self.out / "sweep.md", markdown(self.recipe.model.source, points))
        replace_text(self.out / "sweep.json", content + "\n")
