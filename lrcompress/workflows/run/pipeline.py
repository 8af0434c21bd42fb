"""A recipe's whole path over a run folder; the only place that knows the order of stages."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.record import read_record, write_measured
from lrcompress.compression.factorize_folder import factorize_to
from lrcompress.config import ModelSettings
from lrcompress.config.recipe import Recipe, read_recipe
from lrcompress.evaluation import evaluate
from lrcompress.evaluation.contamination import check_checkpoint, check_recipe
from lrcompress.evaluation.tasks import sample_logs
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
from lrcompress.runtime.progress import Progress, Say, silent, unsaid
from lrcompress.training.finetune import check_settings, finetune_to
from lrcompress.workflows.run.folder import RunFolder

# settings that leave the metrics as they are
DETAILS = ("compared_windows", "prompts", "continuation_tokens")
NO_INPUT = (*DETAILS, "task_cache")


def run(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> list[Metric]:
    """Factorizes, finetunes if there is text for it, evaluates beside the dense model and reports,
    all in the folder `out`. Models are made only if no text of the evaluation is among theirs.

    `recipe` is a Recipe or its file. An interrupted run continues: a stage whose inputs did
    not change is not done again. Raises InputError where `out` holds something else;
    `overwrite` allows another recipe's run there.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(Path(recipe))
    return list(Run(recipe, Path(out), progress).all(overwrite).metrics)


class Run:
    """One recipe over one folder."""

    def __init__(self, recipe: Recipe, out: Path, progress: Progress, say: Say = unsaid) -> None:
        self.recipe, self.progress, self.say = recipe, progress, say
        self.folder = RunFolder(recipe, out)
        self._kept: dict[ModelSettings, Loaded] = {}

    def all(self, overwrite: bool) -> Report:
        self.folder.refuse_other(overwrite)
        with locks.inside(self.folder.out):
            return self._all(overwrite)

    def _all(self, overwrite: bool) -> Report:
        self.folder.refuse_other(overwrite)  # another process may have been here
        tasks = evaluate.resolve_tasks(self.recipe.evaluate)
        if "finetune" in self.stages:
            check_settings(self.recipe.finetune, self.recipe.model.device)
        self._find_others()
        if not all(self.folder.is_made(stage, self._making(stage)) for stage in self.stages):
            check_recipe(self.recipe)
        self.folder.claim()
        self.folder.make("factorize", self._making("factorize"), self._factorize)
        self.folder.adopt()
        if "finetune" in self.stages:
            self.folder.make("finetune", self._making("finetune"), self._finetune)
        details = self._details()  # first: it refuses unfit prompts
        return self._report(self._measure(tasks), details)

    def _find_others(self) -> None:
        """Raises InputError for a teacher or baseline that is not there, before hours of work."""
        teacher = self.recipe.finetune.teacher
        for name in (*self.recipe.evaluate.baseline, *([teacher] if teacher else [])):
            locate(name)

    @property
    def stages(self) -> tuple[fingerprints.Stage, ...]:
        """Those that make a model."""
        return ("factorize", "finetune") if self.recipe.finetune.data else ("factorize",)

    def _factorize(self, out: Path) -> None:
        """An older model, and its recipe and reports, stay until the new is whole."""
        factorize_to(self.recipe, out, self.progress, replace=True, say=self.say)

    def _finetune(self, out: Path) -> None:
        source, settings = self._made("factorize"), self.recipe.finetune
        finetune_to(
            source, settings, out, self.progress, replace=True, load_teacher=self._load_teacher
        )

    def _load_teacher(self, settings: ModelSettings) -> Loaded:
        """The recipe's own model, kept for the evaluation, unless another is named."""
        return self._load(self.recipe.model if self.recipe.finetune.teacher is None else settings)

    def _load(self, settings: ModelSettings) -> Loaded:
        """A model, loaded when it is first needed."""
        if settings not in self._kept:
            self._kept[settings] = load_model(settings)
        return self._kept[settings]

    def _made(self, stage: fingerprints.Stage) -> ModelSettings:
        return with_source(self.recipe.model, str(self.folder.model(stage)))

    def _making(self, stage: fingerprints.Stage) -> list[Any]:
        """What the model of a stage depends on."""
        if stage == "factorize":
            return fingerprints.factorize_inputs(self.recipe)
        tuning = self.recipe.finetune
        texts = [fingerprints.data_state(spec) for spec in tuning.data]
        teacher = tuning.teacher and fingerprints.model_inputs(
            with_source(self.recipe.model, tuning.teacher)
        )
        made = [*self._making("factorize"), self.folder.weights("factorize")]
        return [made, tuning.model_dump(mode="json"), texts, teacher]

    @cached_property
    def _columns(self) -> dict[str, ModelSettings]:
        """Title -> model of what is compared: baselines or the dense model, then what was made."""
        names, model = self.recipe.evaluate.baseline, self.recipe.model
        found = dict(
            zip(
                labels(["baseline"] * len(names), names),
                [with_source(model, name) for name in names],
                strict=True,
            )
        ) or {"dense": model}
        titles = {"factorize": "factorized", "finetune": "finetuned"}
        return found | {titles[stage]: self._made(stage) for stage in self.stages}

    def _measuring(self, title: str) -> list[Any]:
        """What the numbers of a column depend on."""
        settings, source = self.recipe.evaluate, self._columns[title]
        texts = [fingerprints.data_state(spec) for spec in (*settings.perplexity, *settings.tasks)]
        texts.append(fingerprints.folder_state(settings.data_dir))
        made = {str(self.folder.model(stage)): stage for stage in self.stages}
        stage = made.get(source.source)
        if stage:
            model: list[Any] = [self._making(stage), self.folder.weights(stage)]
        else:
            model = fingerprints.model_inputs(source)
        return [settings.model_dump(mode="json", exclude={*NO_INPUT}), texts, model]

    def _measure(self, tasks: Tasks | None) -> list[Metric]:
        settings, found = self.recipe.evaluate, list[Metric]()
        inputs = {title: self._measuring(title) for title in self._columns}
        for index, (title, depends) in enumerate(inputs.items(), 1):
            name = title if " " not in title else f"baseline-{index}"  # a title may hold a path
            quality = partial(self._quality, title, tasks)
            found += self.folder.measured(f"quality-{name}", depends, list[Metric], quality)
        if settings.speed or settings.training_speed:
            depends = list(inputs.values())
            found += self.folder.measured("speed", depends, list[Metric], self._speed)
        return found

    def _details(self) -> Differences:
        if not (self.recipe.evaluate.compared_windows or self.recipe.evaluate.prompts):
            return Differences()
        settings = self.recipe.evaluate.model_dump(mode="json", include={*DETAILS})
        depends = [settings, *map(self._measuring, self._columns)]
        return self.folder.measured("details", depends, Differences, self._compare)

    def _compare(self) -> Differences:
        models = {title: self._load(source) for title, source in self._columns.items()}
        return evaluate.details(models, self.recipe.evaluate, self.progress)

    def _quality(self, title: str, tasks: Tasks | None) -> list[Metric]:
        source, settings = self._columns[title], self.recipe.evaluate
        loaded = self._load(source)
        length = sequence_length(loaded[0], settings.context_length)
        folder = Path(locate(source.source, source.gguf_file).path)
        record = read_record(folder) or {}
        check_checkpoint(title, loaded[1], settings, length, record)
        found = evaluate.quality(title, loaded, settings, tasks, length, self.progress)
        place = unique_file_names(self._columns)[title]
        sample_logs.write(self.folder.out / sample_logs.FOLDER / place, found.logs[title])
        return found.metrics

    def _speed(self) -> list[Metric]:
        models = {title: self._load(source) for title, source in self._columns.items()}
        return evaluate.speed(models, self.recipe.evaluate, self.progress)

    def _report(self, metrics: list[Metric], details: Differences) -> Report:
        """Into the record and card of each model, and into the report, which is of the last."""
        last = read_record(self.folder.model(self.stages[-1])) or {}
        kept = last["counts"]["selected"]["keep_ratio"]
        title = f"{self.recipe.model.source}: {self.recipe.factorize.method}, {kept:.1%} kept"
        made = Report(title, tuple(metrics), details, last)
        for stage in self.stages:
            write_measured(self.folder.model(stage), metrics, made.comparisons)
        if "finetune" not in self.stages:
            self.folder.drop("finetune")
        self.folder.keep_logs(self._columns)
        report.write(self.folder.out, made)
        return made
