"""Measures models side by side: size, perplexity, tasks and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrcompress.benchmark import throughput
from lrcompress.checkpoint.record import (
    ModelWithRecord,
    check_writable_checkpoint,
    write_measured,
)
from lrcompress.config import EvaluateSettings, ModelSettings
from lrcompress.config.recipe import Recipe, sections_from_flat
from lrcompress.data.conversations import ChatFormat, with_template
from lrcompress.data.corpora import Corpus, read_corpus
from lrcompress.data.windows import Windowing
from lrcompress.evaluation.block_divergence import block_changes
from lrcompress.evaluation.contamination import check_checkpoint
from lrcompress.evaluation.continuations import continuations
from lrcompress.evaluation.perplexity import perplexity
from lrcompress.evaluation.tasks import sample_logs
from lrcompress.evaluation.tasks.cache import TaskCache
from lrcompress.evaluation.tasks.registry import Tasks, resolve
from lrcompress.evaluation.tasks.runner import TaskOptions, run_tasks
from lrcompress.evaluation.tasks.sample_logs import Logs
from lrcompress.evaluation.token_divergence import token_changes
from lrcompress.layers.ffn_layouts import ffn_parameters
from lrcompress.layers.model_info import (
    check_predicts_next_token,
    model_kind,
    parameter_count,
    sequence_length,
    weight_bytes,
)
from lrcompress.layers.model_state import evaluation_mode
from lrcompress.layers.nonfinite import check_weights_finite, checked_logits
from lrcompress.layers.optimize import optimize
from lrcompress.models.loading import Loaded, with_source
from lrcompress.reporting import report
from lrcompress.reporting.differences import BlockChange, Differences, TokenChange
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.report import Report
from lrcompress.reporting.tables import labels
from lrcompress.runtime import locks
from lrcompress.runtime.atomic_io import writing
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import unique_file_names, user_path
from lrcompress.runtime.progress import Progress, silent


@dataclass(frozen=True)
class Results:
    """The metrics of models, and for each model (by its label) the logs of its tasks."""

    metrics: list[Metric]
    logs: Mapping[str, Logs]


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    baseline: Any = None,
    progress: Progress = silent,
    **settings: Any,
) -> list[Metric]:
    """Measures `model`, and in the same run `baseline`: a loaded model, or a list of them.

    `settings` are the keys of the recipe's `evaluate` section: perplexity, tasks, limit,
    context_length, ... Raises InputError where a setting is invalid, a text or task cannot be
    read, or a weight, a loss or logits are NaN or infinite.
    """
    checked = sections_from_flat({"evaluate": EvaluateSettings}, settings)["evaluate"]
    if baseline is None:
        baselines = []
    else:
        baselines = list(baseline) if isinstance(baseline, list | tuple) else [baseline]
    all_models = [*baselines, model]
    names = ["baseline"] * len(baselines) + ["model"]
    titles = labels([model_kind(each) for each in all_models], names)
    models = {title: (each, tokenizer) for title, each in zip(titles, all_models, strict=True)}
    return measure(models, checked, resolve_tasks(checked), progress).metrics


def resolve_tasks(settings: EvaluateSettings) -> Tasks | None:
    """The tasks of `settings`, resolved before any model is loaded; None where there are none.

    Raises InputError where a task cannot be read, or the task cache cannot be written.
    """
    if not settings.tasks:
        return None
    TaskCache.from_setting(settings.task_cache)
    return resolve(settings.tasks, settings.seed, settings.data_dir)


def measure(
    models: Mapping[str, Loaded],
    settings: EvaluateSettings,
    tasks: Tasks | None,
    progress: Progress = silent,
) -> Results:
    """Every metric of every model, in the order of `models`; each model has its own tokenizer."""
    length = common_length(models, settings)
    metrics: list[Metric] = []
    logs: dict[str, Logs] = {}
    for label, loaded in models.items():
        results = quality(label, loaded, settings, tasks, length, progress)
        metrics += results.metrics
        logs.update(results.logs)
    return Results(metrics + speed(models, settings, progress), logs)


def details(
    models: Mapping[str, Loaded], settings: EvaluateSettings, progress: Progress = silent
) -> Differences:
    """Compares later models with the first by token and by block, and continues the prompts."""
    for _, tokenizer in models.values():
        _check_tokenizer(tokenizer, settings)
    for label, (model, _) in models.items():
        check_weights_finite(label, model)
    length, limit = common_length(models, settings), settings.compared_windows
    if settings.limit is not None:
        limit = min(limit, settings.limit)
    tokens: list[TokenChange] = []
    blocks: list[BlockChange] = []
    with _evaluation_modes(models), ExitStack() as stack:
        for label, (model, _) in models.items():
            stack.enter_context(checked_logits(label, model))
        texts = continuations(models, settings.prompts, settings.continuation_tokens, progress)
        if len(models) > 1 and limit:
            _, tokenizer = next(iter(models.values()))
            corpora = _corpora(tokenizer, settings)
            for corpus in corpora:
                windowing = Windowing(length, settings.stride, limit, settings.loss_on)
                tokens += token_changes(models, corpus, windowing, progress)
            for corpus in corpora[:1]:
                blocks += block_changes(models, corpus, Windowing(length, limit=limit), progress)
    return Differences(tuple(tokens), tuple(blocks), tuple(texts))


@contextmanager
def _evaluation_modes(models: Mapping[str, Loaded]) -> Iterator[None]:
    with ExitStack() as stack:
        for model, _ in models.values():
            stack.enter_context(evaluation_mode(model))
        yield


def common_length(models: Mapping[str, Loaded], settings: EvaluateSettings) -> int:
    """The number of tokens of a window, no more than any of the models can read."""
    return min(sequence_length(model, settings.context_length) for model, _ in models.values())


def speed(
    models: Mapping[str, Loaded], settings: EvaluateSettings, progress: Progress = silent
) -> list[Metric]:
    """Generation and training throughput, as far as the settings ask for it.

    The models are timed in alternation. Compressed models are optimized while they are timed, and
    restored afterwards.
    """
    plain_models = {label: model for label, (model, _) in models.items()}
    metrics: list[Metric] = []
    with _evaluation_modes(models), ExitStack() as stack:
        if settings.speed or settings.training_speed:
            for model in plain_models.values():
                stack.enter_context(optimize(model))
        if settings.speed:
            for model in plain_models.values():
                check_predicts_next_token(model, "timing generation")
            metrics += throughput.generation_throughput(
                plain_models,
                settings.prompt_length,
                settings.new_tokens,
                settings.repeats,
                progress,
            )
        if settings.training_speed:
            metrics += throughput.training_throughput(
                plain_models,
                settings.batch_size,
                settings.prompt_length,
                settings.repeats,
                progress,
            )
    return metrics


def quality(
    label: str,
    loaded: Loaded,
    settings: EvaluateSettings,
    tasks: Tasks | None,
    length: int,
    progress: Progress = silent,
) -> Results:
    """Size, perplexities and task metrics of one model, in windows of `length` tokens."""
    model, tokenizer = loaded
    _check_tokenizer(tokenizer, settings)
    if settings.perplexity or settings.tasks:
        check_predicts_next_token(model, "an evaluation")
    check_weights_finite(label, model)
    corpora = _corpora(tokenizer, settings)
    windowing = Windowing(length, settings.stride, settings.limit, settings.loss_on)
    metrics = list(size(label, model))
    logs: Logs = {}
    with evaluation_mode(model):
        for corpus in corpora:
            metrics.append(perplexity(label, loaded, corpus, windowing, progress))
        if tasks:
            options = TaskOptions(
                max_length=length,
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
                chat=settings.apply_chat_template,
                system_instruction=settings.system_instruction,
                multiturn=settings.fewshot_as_multiturn,
            )
            asked = (model, with_template(tokenizer, settings.chat_template))
            cache = TaskCache.from_setting(settings.task_cache)
            task_result = run_tasks(label, asked, tasks, options, cache, progress)
            metrics += task_result.metrics
            logs = task_result.logs
    return Results(metrics, {label: logs})


def _corpora(tokenizer: Any, settings: EvaluateSettings) -> list[Corpus]:
    """The texts of perplexity, with conversations as `tokenizer` writes them."""
    chat = ChatFormat.from_setting(tokenizer, settings.chat_template, settings.loss_on)
    return [read_corpus(spec, "test", chat) for spec in settings.perplexity]


def _check_tokenizer(tokenizer: Any, settings: EvaluateSettings) -> None:
    if tokenizer is None and (settings.perplexity or settings.tasks or settings.prompts):
        raise InputError("the model has no tokenizer: add the tokenizer's files to its folder")


def size(label: str, model: Any) -> Iterator[Metric]:
    """Numbers of parameters (FFNs, where they are known, and whole model) and bytes of weights."""
    in_ffns = ffn_parameters(model)
    if in_ffns:
        yield Metric(label, "FFN parameters", in_ffns, "", False)
    yield Metric(label, "parameters", parameter_count(model), "", False)
    dtype = {"dtype": str(model.dtype).removeprefix("torch.")}
    yield Metric(label, "weight bytes", weight_bytes(model), "B", False, dtype)


def evaluate_to(
    recipe: Recipe, out: Path | None = None, progress: Progress = silent, card: bool = False
) -> Report:
    """Measures the model of `recipe`, and its baselines in the same run.

    `out`, if given, gets the report and the logs of the tasks. With `card` the numbers are also
    written to the lrcompress.json and README.md of the model's own folder.

    Raises InputError where a model was made from a text that it would be measured on, and with
    `card` where the model is not a checkpoint of lrcompress.
    """
    with locks.beside(out):
        if card:
            check_writable_checkpoint(recipe.model.source)
        tasks = resolve_tasks(recipe.evaluate)
        baselines = [with_source(recipe.model, name) for name in recipe.evaluate.baseline]
        columns = _load_columns([*baselines, recipe.model])
        evaluation, logs = _evaluate_columns(recipe, tasks, columns, progress)
        if out is not None:
            _write_report(out, evaluation, logs)
        if card:
            write_measured(
                user_path(recipe.model.source), evaluation.metrics, evaluation.comparisons
            )
        return evaluation


def _load_columns(sources: Sequence[ModelSettings]) -> dict[str, ModelWithRecord]:
    """The models by their titles in the report, which has a column for each."""
    models = [ModelWithRecord.load(source) for source in sources]
    names = [model.source.source for model in models]
    titles = labels([model.kind for model in models], names)
    return dict(zip(titles, models, strict=True))


def _evaluate_columns(
    recipe: Recipe,
    tasks: Tasks | None,
    columns: Mapping[str, ModelWithRecord],
    progress: Progress,
) -> tuple[Report, Mapping[str, Logs]]:
    """The report on all models, of which the last is that of `recipe`, and their task logs."""
    settings = recipe.evaluate
    models = {title: column.loaded for title, column in columns.items()}
    length = common_length(models, settings)
    for title, column in columns.items():
        check_checkpoint(title, column.loaded[1], settings, length, column.record or {})
    differences = details(models, settings, progress)  # first, because it refuses unfit prompts
    results = measure(models, settings, tasks, progress)
    *_, compressed = columns.values()
    evaluation = Report(
        title=f"{recipe.model.source}: evaluation",
        metrics=tuple(results.metrics),
        details=differences,
        record=compressed.record or {},
    )
    return evaluation, results.logs


def _write_report(out: Path, evaluation: Report, logs: Mapping[str, Logs]) -> None:
    with writing(out) as folder:
        report.write(folder, evaluation)
        for title, name in unique_file_names(logs).items():
            sample_logs.write(folder / sample_logs.FOLDER / name, logs[title])
