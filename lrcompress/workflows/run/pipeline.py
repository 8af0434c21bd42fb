"""Runs every stage of a recipe in a run folder; only this module knows their order."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.fingerprints import Stage
from lrcompress.checkpoint.record import read_record, record_of, write_measured
from lrcompress.compression.factorize_folder import factorize_to
from lrcompress.config import ModelSettings
from lrcompress.config.recipe import Recipe, read_recipe
from lrcompress.evaluation import evaluate
from lrcompress.evaluation.contamination import check_checkpoint, check_recipe
from lrcompress.evaluation.tasks import sample_logs
from lrcompress.evaluation.tasks.cache import definitions_hash
from lrcompress.evaluation.tasks.registry import Tasks
from lrcompress.layers.model_info import sequence_length
from lrcompress.models.loading import Loaded, load_model, locate, with_source
from lrcompress.reporting import report
from lrcompress.reporting.differences import Differences
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.report import Report
from lrcompress.reporting.tables import labels
from lrcompress.runtime import locks
from lrcompress.runtime.paths import unique_file_names
from lrcompress.runtime.progress import Progress, ShowMessage, show_nothing, silent
from lrcompress.training.finetune import check_settings, finetune_to
from lrcompress.workflows.run.folder import RunFolder


def run(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[Metric]:
    """Factorizes, finetunes if the recipe has text for it, evaluates and reports, in folder `out`.

    Returns the metrics of all models, those of the dense model first. `recipe` is a Recipe or
    its file. An interrupted run continues: a stage whose inputs did not change is not run again.
    Raises InputError where a text of the evaluation is also calibrated or trained on, and where
    `out` holds something else; `overwrite` allows another recipe's run there.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe))
    return list(Run(recipe, Path(out), progress).all(overwrite).metrics)


class Run:
    """One recipe over one folder."""

    def __init__(
        self, recipe: Recipe, out: Path, progress: Progress, say: ShowMessage = show_nothing
    ) -> None:
        self.recipe, self.progress, self.say = recipe, progress, say
        self.folder = RunFolder(recipe, out)
        self._loaded: dict[ModelSettings, Loaded] = {}

    def all(self, overwrite: bool) -> Report:
        """Runs every stage that is not finished yet, and returns the report."""
        self.folder.refuse_other(overwrite)
        with locks.inside(self.folder.out):
            self.folder.refuse_other(overwrite)  # another process may have been here
            _ = self._tasks  # before hours of work: they may be refused
            self._check()
            self._make_models()
            differences = self._differences()  # first: it refuses prompts that are too long
            return self._report(self._metrics(), differences)

    def _check(self) -> None:
        """Raises InputError, before hours of work, for what later stages would refuse."""
        if "finetune" in self.stages:
            check_settings(self.recipe.finetune, self.recipe.model.device)
        teacher = self.recipe.finetune.teacher
        for name in (*self.recipe.evaluate.baseline, *([teacher] if teacher else [])):
            locate(name)
        if not all(
            self.folder.has_model(stage, self._model_inputs(stage)) for stage in self.stages
        ):
            check_recipe(self.recipe)

    def _make_models(self) -> None:
        self.folder.claim()
        self.folder.make_model("factorize", self._model_inputs("factorize"), self._factorize)
        self.folder.adopt()
        if "finetune" in self.stages:
            self.folder.make_model("finetune", self._model_inputs("finetune"), self._finetune)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages that make a model."""
        return ("factorize", "finetune") if self.recipe.finetune.data else ("factorize",)

    def _factorize(self, out: Path) -> None:
        """An older model, its recipe and its reports stay until the new model is complete."""
        factorize_to(self.recipe, out, self.progress, replace=True, say=self.say)

    def _finetune(self, out: Path) -> None:
        finetune_to(
            self._model_of("factorize"),
            self.recipe.finetune,
            out,
            self.progress,
            replace=True,
            load_teacher=self._load_teacher,
        )

    def _load_teacher(self, settings: ModelSettings) -> Loaded:
        """The recipe's own model, which the evaluation uses again, unless another is named."""
        return self._load(self.recipe.model if self.recipe.finetune.teacher is None else settings)

    def _load(self, settings: ModelSettings) -> Loaded:
        """A model, loaded when it is first needed."""
        if settings not in self._loaded:
            self._loaded[settings] = load_model(settings)
        return self._loaded[settings]

    def _model_of(self, stage: Stage) -> ModelSettings:
        """How to load the model that a stage makes."""
        return with_source(self.recipe.model, str(self.folder.model_folder(stage)))

    def _model_inputs(self, stage: Stage) -> list[Any]:
        """Everything that the model of a stage depends on."""
        if stage == "factorize":
            return fingerprints.factorize_inputs(self.recipe)
        finetune = self.recipe.finetune
        texts = [fingerprints.data_state(spec) for spec in (*finetune.data, finetune.chat_template)]
        teacher = finetune.teacher and fingerprints.model_inputs(
            with_source(self.recipe.model, finetune.teacher)
        )
        student = [*self._model_inputs("factorize"), self.folder.model_state("factorize")]
        return [student, finetune.model_dump(mode="json"), texts, teacher]

    @cached_property
    def _compared(self) -> dict[str, ModelSettings]:
        """Column title -> model: the baselines or the dense model, then the models made here."""
        names, model = self.recipe.evaluate.baseline, self.recipe.model
        titles = labels(["baseline"] * len(names), names)
        baselines = {
            title: with_source(model, name) for title, name in zip(titles, names, strict=True)
        }
        stage_titles = {"factorize": "factorized", "finetune": "finetuned"}
        made_here = {stage_titles[stage]: self._model_of(stage) for stage in self.stages}
        return (baselines or {"dense": model}) | made_here

    @cached_property
    def _tasks(self) -> Tasks | None:
        return evaluate.resolve_tasks(self.recipe.evaluate)

    @cached_property
    def _task_state(self) -> str | None:
        return definitions_hash(self._tasks.tasks.values()) if self._tasks else None

    def _metric_inputs(self, title: str) -> list[Any]:
        """Everything that the metrics of a column depend on."""
        settings, source = self.recipe.evaluate, self._compared[title]
        texts = fingerprints.evaluation_inputs(settings)
        stage_of = {str(self.folder.model_folder(stage)): stage for stage in self.stages}
        stage = stage_of.get(source.source)
        if stage:
            model: list[Any] = [self._model_inputs(stage), self.folder.model_state(stage)]
        else:
            model = fingerprints.model_inputs(source)
        return [settings.cache_key(), texts, self._task_state, model]

    def _metrics(self) -> list[Metric]:
        """The quality of every model, then their speeds; kept ones where inputs are equal."""
        settings, metrics = self.recipe.evaluate, list[Metric]()
        inputs = {title: self._metric_inputs(title) for title in self._compared}
        for index, (title, column_inputs) in enumerate(inputs.items(), 1):
            name = title if " " not in title else f"baseline-{index}"  # a title may hold a path
            quality = partial(self._quality, title)
            file = self.folder.measurement(f"quality-{name}", list[Metric])
            metrics += file.cached(column_inputs, ["evaluate", "tasks"], quality)
        if settings.speed or settings.training_speed:
            all_inputs = list(inputs.values())
            file = self.folder.measurement("speed", list[Metric])
            metrics += file.cached(all_inputs, ["benchmark"], self._speed)
        return metrics

    def _differences(self) -> Differences:
        """Kept ones where inputs are equal; empty where the recipe asks for none."""
        if not (self.recipe.evaluate.compared_windows or self.recipe.evaluate.prompts):
            return Differences()
        settings = self.recipe.evaluate.details_cache_key()
        inputs = [settings, *map(self._metric_inputs, self._compared)]
        file = self.folder.measurement("details", Differences)
        return file.cached(inputs, ["evaluate"], self._compare)

    def _compare(self) -> Differences:
        models = {title: self._load(model) for title, model in self._compared.items()}
        return evaluate.details(models, self.recipe.evaluate, self.progress)

    def _quality(self, title: str) -> list[Metric]:
        """Size, perplexities and task scores of one model; writes the samples of its tasks."""
        model, settings = self._compared[title], self.recipe.evaluate
        loaded = self._load(model)
        length = sequence_length(loaded[0], settings.context_length)
        record = record_of(model) or {}
        check_checkpoint(title, loaded[1], settings, length, record)
        results = evaluate.quality(title, loaded, settings, self._tasks, length, self.progress)
        folder_name = unique_file_names(self._compared)[title]
        sample_logs.write(self.folder.out / sample_logs.FOLDER / folder_name, results.logs[title])
        return results.metrics

    def _speed(self) -> list[Metric]:
        models = {title: self._load(model) for title, model in self._compared.items()}
        return evaluate.speed(models, self.recipe.evaluate, self.progress)

    def _report(self, metrics: list[Metric], differences: Differences) -> Report:
        """Adds the metrics to each model's record and card, and writes the report."""
        record = read_record(self.folder.model_folder(self.stages[-1])) or {}
        keep_ratio = record["counts"]["selected"]["keep_ratio"]
        method = self.recipe.factorize.method
        title = f"{self.recipe.model.source}: {method}, {keep_ratio:.1%} kept"
        run_report = Report(title, tuple(metrics), differences, record)
        for stage in self.stages:
            write_measured(self.folder.model_folder(stage), metrics, run_report.comparisons)
        if "finetune" not in self.stages:
            self.folder.drop_model("finetune")
        self.folder.drop_other_logs(self._compared)
        report.write(self.folder.out, run_report)
        return run_report
