"""Measures several models side by side: size, perplexity, tasks and speed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrcompress.benchmark import throughput
from lrcompress.checkpoint.record import RECORD, ModelWithRecord, read_record, write_measured
from lrcompress.config import EvaluateSettings
from lrcompress.config.recipe import Recipe, sections_from_flat
from lrcompress.data.corpora import read_corpus
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
from lrcompress.layers.model_info import model_kind, parameter_count, sequence_length, weight_bytes
from lrcompress.layers.model_state import evaluation_mode
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
from lrcompress.runtime.paths import unique_file_names
from lrcompress.runtime.progress import Progress, silent


@dataclass(frozen=True)
class Results:
    """The metrics of models, and by the label of each what its tasks asked and it answered."""

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
    """Measures `model`, and `baseline` beside it in the same run: a loaded model, or several.

    `settings` are the keys of the recipe's `evaluate` section: perplexity, tasks, limit,
    context_length, ... Raises InputError where a setting is refused, a text or task cannot be
    read, or a loss is not finite.
    """
    checked = sections_from_flat({"evaluate": EvaluateSettings}, settings)["evaluate"]
    given = [] if baseline is None else baseline
    others = list(given) if isinstance(given, list | tuple) else [given]
    names = ["baseline"] * len(others) + ["model"]
    kinds = [model_kind(one) for one in (*others, model)]
    pairs = [(one, tokenizer) for one in (*others, model)]
    models = dict(zip(labels(kinds, names), pairs, strict=True))
    return measure(models, checked, resolve_tasks(checked), progress).metrics


def resolve_tasks(settings: EvaluateSettings) -> Tasks | None:
    """The tasks of `settings`, found before any model is loaded; None where there are none.

    Raises InputError where one cannot be read, or its results cannot be kept.
    """
    if not settings.tasks:
        return None
    TaskCache.at(settings.task_cache)
    return resolve(settings.tasks, settings.seed, settings.data_dir)


def measure(
    models: Mapping[str, Loaded],
    settings: EvaluateSettings,
    tasks: Tasks | None,
    progress: Progress = silent,
) -> Results:
    """Every metric of every model, models in the order given, each with its own tokenizer."""
    length = common_length(models, settings)
    found: list[Metric] = []
    logs: dict[str, Logs] = {}
    for label, loaded in models.items():
        one = quality(label, loaded, settings, tasks, length, progress)
        found += one.metrics
        logs.update(one.logs)
    return Results(found + speed(models, settings, progress), logs)


def details(
    models: Mapping[str, Loaded], settings: EvaluateSettings, progress: Progress = silent
) -> Differences:
    """Later models against the first, token by token and block by block, and all on the prompts."""
    for _, tokenizer in models.values():
        _check_tokenizer(tokenizer, settings)
    length, limit = common_length(models, settings), settings.compared_windows
    if settings.limit is not None:
        limit = min(limit, settings.limit)
    tokens: list[TokenChange] = []
    blocks: list[BlockChange] = []
    with _evaluating(models):
        texts = continuations(models, settings.prompts, settings.continuation_tokens, progress)
        if len(models) > 1 and limit:
            corpora = [read_corpus(spec, "test") for spec in settings.perplexity]
            for corpus in corpora:
                window = (length, settings.stride, limit)
                tokens += token_changes(models, corpus, *window, progress)
            for corpus in corpora[:1]:
                blocks += block_changes(models, corpus, length, limit, progress)
    return Differences(tuple(tokens), tuple(blocks), tuple(texts))


@contextmanager
def _evaluating(models: Mapping[str, Loaded]) -> Iterator[None]:
    with ExitStack() as stack:
        for model, _ in models.values():
            stack.enter_context(evaluation_mode(model))
        yield


def common_length(models: Mapping[str, Loaded], settings: EvaluateSettings) -> int:
    """Tokens of a window that fits every model."""
    return min(sequence_length(model, settings.context_length) for model, _ in models.values())


def speed(
    models: Mapping[str, Loaded], settings: EvaluateSettings, progress: Progress = silent
) -> list[Metric]:
    """Speed in use and in training of all models in alternation, as the settings ask for it;
    compressed models are optimized for it, and put back."""
    alone = {label: model for label, (model, _) in models.items()}
    length, repeats = settings.prompt_length, settings.repeats
    found: list[Metric] = []
    with _evaluating(models), ExitStack() as stack:
        if settings.speed or settings.training_speed:
            for model in alone.values():
                stack.enter_context(optimize(model))
        if settings.speed:
            found += throughput.generation_throughput(
                alone, length, settings.new_tokens, repeats, progress
            )
        if settings.training_speed:
            size = settings.batch_size
            found += throughput.training_throughput(alone, size, length, repeats, progress)
    return found


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
    corpora = [read_corpus(spec, "test") for spec in settings.perplexity]
    found = list(size(label, model))
    logs: Logs = {}
    with evaluation_mode(model):
        for corpus in corpora:
            window = (length, settings.stride, settings.limit)
            found.append(perplexity(label, model, tokenizer, corpus, *window, progress))
        if tasks:
            asking = TaskOptions(length, settings.limit, settings.num_fewshot, settings.batch_size)
            cache = TaskCache.at(settings.task_cache)
            done = run_tasks(label, model, tokenizer, tasks, asking, cache, progress)
            found += done.metrics
            logs = done.logs
    return Results(found, {label: logs})


def _check_tokenizer(tokenizer: Any, settings: EvaluateSettings) -> None:
    if tokenizer is None and (settings.perplexity or settings.tasks or settings.prompts):
        raise InputError("the model has no tokenizer: add the tokenizer's files to its folder")


def size(label: str, model: Any) -> Iterator[Metric]:
    """Parameters of the FFNs, if they are known, and of the model, and its weights' bytes."""
    held = ffn_parameters(model)
    if held:
        yield Metric(label, "FFN parameters", held, "", False)
    yield Metric(label, "parameters", parameter_count(model), "", False)
    dtype = {"dtype": str(model.dtype)[6:]}
    yield Metric(label, "weight bytes", weight_bytes(model), "B", False, dtype)


def evaluate_to(
    recipe: Recipe, out: Path | None = None, progress: Progress = silent, card: bool = False
) -> Report:
    """Measures a model, beside its baselines if it has any; writes the report to `out`, if given,
    with what the tasks asked and the models answered, and with `card` the numbers into the model's
    own lrcompress.json and README.md.

    Raises InputError where a model was made from a text that it would be measured on, and with
    `card` where it is no checkpoint of lrcompress.
    """
    with locks.beside(out):
        if card:
            _check_card(recipe.model.source)
        return _evaluated(recipe, out, progress, card)


def _evaluated(recipe: Recipe, out: Path | None, progress: Progress, card: bool) -> Report:
    settings = recipe.evaluate
    tasks = resolve_tasks(settings)
    others = [with_source(recipe.model, name) for name in settings.baseline]
    found = [ModelWithRecord.load(source) for source in (*others, recipe.model)]
    names = [column.source.source for column in found]
    titles = labels([column.kind for column in found], names)
    columns = dict(zip(titles, found, strict=True))
    models = {title: column.loaded for title, column in columns.items()}
    length = common_length(models, settings)
    for title, column in columns.items():
        check_checkpoint(title, column.loaded[1], settings, length, column.record or {})
    differences = details(models, settings, progress)  # first: it refuses unfit prompts
    measured = measure(models, settings, tasks, progress)
    title, record = f"{recipe.model.source}: evaluation", found[-1].record or {}
    made = Report(title, tuple(measured.metrics), differences, record)
    if out is not None:
        with writing(out) as partial:
            report.write(partial, made)
            for model, place in unique_file_names(models).items():
                sample_logs.write(partial / sample_logs.FOLDER / place, measured.logs[model])
    if card:
        write_measured(Path(recipe.model.source), made.metrics, made.comparisons)
    return made


def _check_card(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or read_record(folder) is None:
        raise InputError(
            f"{source!r} is no checkpoint of lrcompress, which could keep the numbers: leave out "
            f"--write-card, or evaluate a folder with a {RECORD}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{source!r} cannot be written to: leave out --write-card")
