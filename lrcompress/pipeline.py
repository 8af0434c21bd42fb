"""A recipe's whole path over a run folder; the only place that knows the order of stages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lrcompress import checkpoint, compare, report, stages
from lrcompress.compress import apply
from lrcompress.files import check_free, replace_text, writing
from lrcompress.lowrank import compressed_layers
from lrcompress.models import locate
from lrcompress.protocols import InputError, Metric, Progress, silent
from lrcompress.recipe import Recipe, read_recipe, to_yaml
from lrcompress.settings import ModelSettings
from lrcompress.sizes import sequence_length
from lrcompress.sources import Loaded, load_settings, other_source
from lrcompress.tasks import Tasks

RECIPE, MODEL, STAGES = "recipe.yaml", "model", "stages"


def factorize_to(
    recipe: Recipe, out: Path, progress: Progress = silent, replace: bool = False
) -> dict[str, Any]:
    """Loads, factorizes and saves to `out`; returns what lrcompress.json holds.

    Raises InputError if `out` exists, unless an older result there is to be replaced.
    """
    if not replace:
        check_free(out)
    model, tokenizer = load_settings(recipe.model)
    work = out.with_name(f".{out.name}.refine")  # refined blocks, until the whole is saved
    done = apply(
        model, tokenizer, recipe.calibration, recipe.factorize, recipe.refine, progress, work
    )
    record = {
        "source": recipe.model.source,
        "recipe": recipe.model_dump(mode="json"),
        **done.to_dict(),
    }
    saved = checkpoint.save(model, tokenizer, out, record, replace)
    shutil.rmtree(work, ignore_errors=True)
    return saved


def evaluate_to(
    recipe: Recipe, out: Path | None = None, progress: Progress = silent
) -> list[Metric]:
    """Measures a model, beside its baseline if it has one; writes a report to `out`, if given."""
    settings = recipe.evaluate
    if out is not None:
        check_free(out)
    folder = locate(recipe.model.source, recipe.model.gguf_file).path
    record = checkpoint.read_record(Path(folder))
    tasks = compare.resolve_tasks(settings)
    model, baseline = load_settings(recipe.model), None
    if settings.baseline is not None:
        baseline = load_settings(other_source(recipe.model, settings.baseline))
    labels = compare.label_models(model, baseline, "finetuned" in (record or {}))
    metrics = compare.measure(labels, settings, tasks, progress)
    if out is not None:
        with writing(out) as partial:
            report.write(partial, f"{recipe.model.source}: evaluation", metrics, record)
    return metrics


def export_to(settings: ModelSettings, out: Path, standalone: bool) -> None:
    """Writes a compressed model as stock layers, or with the code that loads it."""
    check_free(out)
    record = checkpoint.read_record(Path(locate(settings.source).path)) or {}
    model, tokenizer = load_settings(settings)
    if not any(compressed_layers(model)):
        raise InputError(f"{settings.source!r} has no low-rank layers: there is nothing to export")
    write = checkpoint.export_standalone if standalone else checkpoint.export_dense
    write(model, tokenizer, out, record)


def run(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[Metric]:
    """Factorizes, evaluates beside the dense model and reports, all in the folder `out`.

    `recipe` is a Recipe or its file. An interrupted run continues: a stage whose inputs did
    not change is not done again. Raises InputError where `out` holds something else;
    `overwrite` allows another recipe's run there.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe))
    return Run(recipe, Path(out), progress).all(overwrite)


class Run:
    """One recipe over one folder: recipe.yaml, model/, stages/, and the report."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress) -> None:
        self.recipe, self.out, self.progress = recipe, out, progress

    def all(self, overwrite: bool) -> list[Metric]:
        self._claim(overwrite)
        settings = self.recipe.evaluate
        tasks = compare.resolve_tasks(settings)
        self._factorize()
        metrics: list[Metric] = []
        for label in self._models:
            metrics += self._stage(f"quality-{label}", partial(self._quality, label, tasks))
        if settings.speed:
            metrics += self._stage("speed", self._speed)
        self._report(metrics)
        return metrics

    def _claim(self, overwrite: bool) -> None:
        """Makes the folder this recipe's. Raises InputError where it holds a finished model of
        another recipe, or something that is no run at all."""
        finished = bool(stages.read(self.out / STAGES / "factorize.json"))
        if finished and self._is_other() and not overwrite:
            raise InputError(
                f"{str(self.out)!r} holds the run of another recipe: choose another folder, "
                "or redo the stages that differ with --overwrite"
            )
        if self.out.exists() and not self._is_run():
            raise InputError(f"output {str(self.out)!r} exists and is no run: choose another name")
        if not finished:
            self.out.mkdir(parents=True, exist_ok=True)
            replace_text(self.out / RECIPE, to_yaml(self.recipe))

    def _is_run(self) -> bool:
        if not self.out.is_dir():
            return False
        own = {RECIPE, MODEL, STAGES, *report.FORMATS}
        names = {path.name for path in self.out.iterdir()}
        return all(name in own or name.startswith(f".{MODEL}.") for name in names)

    def _factorize(self) -> None:
        """Makes model/; an older one, and its recipe and reports, stay until the new is whole."""
        done, model = self.out / STAGES / "factorize.json", self.out / MODEL
        known, inputs = stages.read(done), stages.digest(self._factorize_inputs())
        if known.get("inputs") != inputs or known.get("model") != stages.states(_weights(model)):
            factorize_to(self.recipe, model, self.progress, replace=True)
            done.parent.mkdir(exist_ok=True)
            stages.write(done, {"inputs": inputs, "model": stages.states(_weights(model))})
        if self._is_other():
            for name in report.FORMATS:
                (self.out / name).unlink(missing_ok=True)
            replace_text(self.out / RECIPE, to_yaml(self.recipe))

    def _is_other(self) -> bool:
        file = self.out / RECIPE
        return not file.is_file() or file.read_bytes() != to_yaml(self.recipe).encode()

    def _stage(self, name: str, action: Callable[[], list[Metric]]) -> list[Metric]:
        """The metrics of a stage, from its file if its inputs are those of the last time."""
        file, inputs = self.out / STAGES / f"{name}.json", stages.digest(self._measuring_inputs())
        known = stages.read(file)
        if known.get("inputs") != inputs:
            known = {"inputs": inputs, "metrics": [asdict(metric) for metric in action()]}
            stages.write(file, known)
        return [Metric(**metric) for metric in known["metrics"]]

    def _factorize_inputs(self) -> list[Any]:
        made_of = {"model", "calibration", "factorize", "refine"}
        settings = self.recipe.model_dump(mode="json", include=made_of)
        return [
            settings,
            stages.model_state(self.recipe.model),
            [stages.data_state(spec) for spec in self.recipe.calibration.data],
        ]

    def _measuring_inputs(self) -> list[Any]:
        settings, model = self.recipe.evaluate, self.recipe.model
        texts = [stages.data_state(spec) for spec in (*settings.perplexity, *settings.tasks)]
        other = (
            stages.model_state(other_source(model, settings.baseline))
            if settings.baseline
            else None
        )
        weights = stages.states(_weights(self.out / MODEL))
        return [self._factorize_inputs(), settings.model_dump(mode="json"), texts, other, weights]

    @property
    def _models(self) -> dict[str, Callable[[], Loaded]]:
        """What is compared, loaded when it is needed."""
        first = "dense" if self.recipe.evaluate.baseline is None else "baseline"
        return {first: lambda: self._dense, "factorized": lambda: self._factorized}

    @cached_property
    def _dense(self) -> Loaded:
        source, model = self.recipe.evaluate.baseline, self.recipe.model
        return load_settings(model if source is None else other_source(model, source))

    @cached_property
    def _factorized(self) -> Loaded:
        return load_settings(other_source(self.recipe.model, str(self.out / MODEL)))

    def _quality(self, label: str, tasks: Tasks | None) -> list[Metric]:
        loaded, settings = self._models[label](), self.recipe.evaluate
        length = sequence_length(loaded[0], settings.context_length)
        return compare.quality(label, loaded, settings, tasks, length, self.progress)

    def _speed(self) -> list[Metric]:
        models = {label: get() for label, get in self._models.items()}
        return compare.speed(models, self.recipe.evaluate, self.progress)

    def _report(self, metrics: list[Metric]) -> None:
        record = checkpoint.read_record(self.out / MODEL) or {}
        record["metrics"] = [asdict(metric) for metric in metrics]
        checkpoint.write_record(self.out / MODEL, record)
        kept = record["counts"]["selected"]["keep_ratio"]
        title = f"{self.recipe.model.source}: {self.recipe.factorize.method}, {kept:.1%} kept"
        report.write(self.out, title, metrics, record)


def _weights(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), folder / "config.json"]
