"""A recipe's whole path over a run folder; the only place that knows the order of stages."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from lrcompress import benchmark, checkpoint, compare, report
from lrcompress.compress import apply
from lrcompress.models import load, locate
from lrcompress.protocols import InputError, Metric, Progress, silent
from lrcompress.recipe import ModelSettings, Recipe, to_yaml

RECIPE, MODEL, STAGES = "recipe.yaml", "model", "stages"


def load_settings(settings: ModelSettings) -> tuple[Any, Any]:
    """(model, tokenizer) as a recipe's model section describes them."""
    arguments = settings.model_dump()
    return load(arguments.pop("source"), **arguments)


def factorize_to(recipe: Recipe, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Loads, factorizes and saves to the new folder `out`; returns what lrcompress.json holds."""
    checkpoint.check_free(out)
    model, tokenizer = load_settings(recipe.model)
    done = apply(model, tokenizer, recipe.calibration, recipe.factorize, progress)
    record = {
        "source": recipe.model.source,
        "recipe": recipe.model_dump(mode="json"),
        **done.to_dict(),
    }
    return checkpoint.save(model, tokenizer, out, record)


def evaluate_to(
    recipe: Recipe, out: Path | None = None, progress: Progress = silent
) -> list[Metric]:
    """Measures a model, beside its baseline if it has one; writes a report to `out`, if given."""
    if out is not None:
        checkpoint.check_free(out)
    settings = recipe.evaluate
    tasks = compare.resolve_tasks(settings)
    model, tokenizer = load_settings(recipe.model)
    baseline = None
    if settings.baseline is not None:
        baseline, _ = load_settings(_source(recipe.model, settings.baseline))
    models = compare.label_models(model, baseline)
    metrics = compare.measure(models, tokenizer, settings, tasks, progress)
    if out is not None:
        folder = Path(locate(recipe.model.source, recipe.model.gguf_file).path)
        record = checkpoint.read_record(folder)
        with checkpoint.writing(out) as partial:
            report.write(partial, f"{recipe.model.source}: evaluation", metrics, record)
    return metrics


def _source(settings: ModelSettings, source: str) -> ModelSettings:
    """The same loading settings for another model; a GGUF file belongs to its own model."""
    return settings.model_copy(update={"source": source, "gguf_file": None})


def export_to(source: Path, out: Path, standalone: bool) -> None:
    """Writes a checkpoint as stock layers, or with the code that loads it."""
    checkpoint.check_free(out)
    model, tokenizer = load(source)
    record = checkpoint.read_record(source)
    if record is None:
        raise InputError(f"{str(source)!r} is no lrcompress checkpoint: it has no lrcompress.json")
    write = checkpoint.export_standalone if standalone else checkpoint.export_dense
    write(model, tokenizer, out, record)


def run(
    recipe: Recipe, out: str | Path, *, overwrite: bool = False, progress: Progress = silent
) -> list[Metric]:
    """Factorizes, evaluates beside the dense model and reports, all in the folder `out`.

    An interrupted run continues: a stage whose inputs did not change is not done again. Raises
    InputError where `out` holds something else; `overwrite` allows another recipe's run there.
    """
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
        metrics = []
        for label in ("dense", "factorized"):
            metrics += self._stage(
                f"quality-{label}",
                lambda label=label: list(  # type: ignore[misc]
                    compare.quality(label, *self._load(label), settings, tasks, self.progress)
                ),
            )
        if settings.speed:
            metrics += self._stage("speed", self._speed)
        self._report(metrics)
        return metrics

    def _claim(self, overwrite: bool) -> None:
        """Makes the folder this recipe's, or raises InputError where it is something else's."""
        text, file = to_yaml(self.recipe), self.out / RECIPE
        if file.is_file():
            if file.read_text("utf-8") != text and not overwrite:
                raise InputError(
                    f"{str(self.out)!r} holds the run of another recipe: choose another folder, "
                    "or redo the stages that differ with --overwrite"
                )
        elif self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise InputError(
                f"output {str(self.out)!r} exists and is no run: choose another folder"
            )
        (self.out / STAGES).mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")

    def _factorize(self) -> None:
        done = self.out / STAGES / "factorize.json"
        inputs = self._inputs("factorize")
        if _read(done).get("inputs") == inputs and (self.out / MODEL).is_dir():
            return
        done.unlink(missing_ok=True)
        shutil.rmtree(self.out / MODEL, ignore_errors=True)
        factorize_to(self.recipe, self.out / MODEL, self.progress)
        _write(done, {"inputs": inputs})

    def _stage(self, name: str, action: Callable[[], list[Metric]]) -> list[Metric]:
        """The metrics of a stage, from its file if its inputs are those of the last time."""
        file, inputs = self.out / STAGES / f"{name}.json", self._inputs("evaluate")
        known = _read(file)
        if known.get("inputs") != inputs:
            known = {"inputs": inputs, "metrics": [asdict(metric) for metric in action()]}
            _write(file, known)
            gc.collect()
        return [Metric(**metric) for metric in known["metrics"]]

    def _inputs(self, stage: str) -> str:
        """Hash of all that a stage's result depends on: settings, versions, and source files."""
        recipe = self.recipe.model_dump(mode="json")
        model, settings = self.recipe.model, self.recipe.evaluate
        states = [_model_state(model), _data_state(self.recipe.calibration.data)]
        if stage == "factorize":
            recipe.pop("evaluate")
        else:
            states += [_data_state(spec) for spec in (*settings.perplexity, *settings.tasks)]
            states += [_model_state(_source(model, settings.baseline))] if settings.baseline else []
        content = json.dumps([checkpoint.versions(), recipe, states], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _load(self, label: str) -> tuple[Any, Any]:
        return self._dense if label == "dense" else self._factorized

    @cached_property
    def _dense(self) -> tuple[Any, Any]:
        source = self.recipe.evaluate.baseline
        model = self.recipe.model
        return load_settings(model if source is None else _source(model, source))

    @cached_property
    def _factorized(self) -> tuple[Any, Any]:
        return load_settings(_source(self.recipe.model, str(self.out / MODEL)))

    def _speed(self) -> list[Metric]:
        settings = self.recipe.evaluate
        models = {"dense": self._dense[0], "factorized": self._factorized[0]}
        lengths = (settings.prompt_length, settings.new_tokens, settings.repeats)
        return benchmark.speed(models, *lengths, self.progress)

    def _report(self, metrics: list[Metric]) -> None:
        record = checkpoint.read_record(self.out / MODEL) or {}
        record["metrics"] = [asdict(metric) for metric in metrics]
        checkpoint.write_record(self.out / MODEL, record)
        report.write(self.out, _title(self.recipe), metrics, record)


def _title(recipe: Recipe) -> str:
    wanted = recipe.factorize
    budget = f"rank {wanted.rank}" if wanted.rank else f"FFN keep_ratio {wanted.keep_ratio}"
    return f"{recipe.model.source}: {wanted.method}, {budget}"


def _model_state(settings: ModelSettings) -> list[list[Any]]:
    location = locate(settings.source, settings.gguf_file)
    folder = Path(location.path)
    return _states([folder / location.gguf_file] if location.gguf_file else folder.glob("*"))


def _data_state(spec: str) -> list[list[Any]]:
    return _states([Path(spec.partition(":")[0])])


def _states(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of the files that exist; none for what the hub holds."""
    found = sorted(file for file in files if file.is_file())
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in found]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", "utf-8")
    partial.replace(file)
