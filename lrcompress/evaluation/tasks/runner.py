"""Runs lm-eval tasks on a loaded model; cached results and answers are not computed again."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from lrcompress.evaluation.tasks.cache import (
    CacheEntry,
    TaskCache,
    TaskRecord,
    model_fingerprint,
    questions_hash,
    task_fingerprint,
)
from lrcompress.evaluation.tasks.cut_prompts import cut_prompts
from lrcompress.evaluation.tasks.groups import group_record, group_samples, ordered, parts
from lrcompress.evaluation.tasks.lm_eval_output import shown_bootstraps, warnings_once
from lrcompress.evaluation.tasks.registry import Seeds, Tasks, explained
from lrcompress.evaluation.tasks.sample_logs import Logs
from lrcompress.evaluation.tasks.task_code import UntrackedCodeError
from lrcompress.layers.nonfinite import checked_logits
from lrcompress.models.loading import Loaded
from lrcompress.reporting.intervals import score_interval
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.remarks import PROMPTS_CUT, RESAMPLES
from lrcompress.reporting.tables import QUESTIONS
from lrcompress.runtime.errors import InputError, MachineError
from lrcompress.runtime.notices import notice
from lrcompress.runtime.packages import versions
from lrcompress.runtime.progress import Progress, silent


@dataclass(frozen=True)
class TaskOptions:
    """How a model is asked.

    max_length: tokens of a context.
    limit: number of questions of each task; None asks all.
    num_fewshot: number of examples before each question; None is the task's own number.
    batch_size: sequences in a forward pass.
    chat: whether questions become messages of the tokenizer's chat template.
    system_instruction: the system message, or the begin of the context without `chat`.
    multiturn: with `chat`, whether examples become earlier turns.
    """

    max_length: int
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    chat: bool = False
    system_instruction: str | None = None
    multiturn: bool = False

    @property
    def prompting(self) -> dict[str, Any]:
        """How questions become prompts, as keyword arguments of lm-eval."""
        return {
            "apply_chat_template": self.chat,
            "system_instruction": self.system_instruction,
            "fewshot_as_multiturn": self.multiturn,
        }


@dataclass(frozen=True)
class TaskResult:
    """The metrics of all tasks, and a log of the questions and answers of each task."""

    metrics: list[Metric]
    logs: Logs


def run_tasks(
    label: str,
    loaded: Loaded,
    tasks: Tasks,
    options: TaskOptions,
    cache: TaskCache | None = None,
    progress: Progress = silent,
) -> TaskResult:
    """Every metric of every task and group for one model, called `label` in the metrics.

    Each task runs by itself, as when lm-eval's command line runs this task alone, and its result
    is written to `cache` when it is complete. Raises InputError where lm-eval refuses a task, and
    where questions are to be messages but the tokenizer has no chat template, and NotFiniteError
    where logits are NaN or infinite.
    """
    from lrcompress.evaluation.tasks.quiet_hflm import QuietHFLM

    model, tokenizer = loaded
    if options.chat and not tokenizer.chat_template:
        raise InputError(
            f"the {label} model has no chat template: give --chat-template FILE (in a recipe "
            "chat_template), or leave --apply-chat-template out"
        )
    size, length = options.batch_size, options.max_length
    lm = QuietHFLM(
        progress, pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=size
    )
    model_hash = "" if cache is None else model_fingerprint(model, tokenizer)
    records: dict[str, TaskRecord] = {}
    for name, task in tasks.tasks.items():
        with explained(name), warnings_once(), checked_logits(label, model):
            _build_requests(lm, task, tasks.seeds, options)
            inputs = [versions(), str(tasks.seeds), length, size, _device_name(lm)]
            entry = None if cache is None else _entry(cache, model_hash, name, task, inputs)
            record = _cached_or_computed(lm, name, task, tasks.seeds, options, entry)
            records[name] = {**record, "questions": questions_hash(task)}
    logs = {name: record["logs"] for name, record in records.items()}
    records |= {name: group_record(group, records) for name, group in tasks.groups.items()}
    return TaskResult(list(_metrics(label, records, tasks, options)), logs)


def _entry(
    cache: TaskCache, model_hash: str, name: str, task: Any, inputs: list[Any]
) -> CacheEntry | None:
    """The place of a result in `cache`; None where it cannot be told what it depends on."""
    try:
        return cache.entry(model_hash, name, [*inputs, task_fingerprint(task)])
    except UntrackedCodeError as error:
        notice(f"The results of task {name!r} are not kept: {error}.")
        return None


def _device_name(lm: Any) -> str:
    on_gpu = lm.device.type == "cuda"
    return torch.cuda.get_device_name(lm.device) if on_gpu else str(lm.device.type)


def _build_requests(lm: Any, task: Any, seeds: Seeds, options: TaskOptions) -> None:
    """Builds the requests of a task; the number of examples follows lm-eval's command line."""
    default_shots = task.get_config("num_fewshot")
    if options.num_fewshot is not None and default_shots != 0:  # a task with 0 allows no examples
        task.set_config("num_fewshot", options.num_fewshot)
    elif default_shots is None:
        task.set_config("num_fewshot", 0)
    _start_seeds(task, seeds)
    task.build_all_requests(
        limit=options.limit,
        chat_template=lm.apply_chat_template if options.chat else None,
        **options.prompting,
    )


def _start_seeds(task: Any, seeds: Seeds) -> None:
    seeds.start()
    task.set_fewshot_seed(seeds.fewshot)


def _cached_or_computed(
    lm: Any, name: str, task: Any, seeds: Seeds, options: TaskOptions, entry: CacheEntry | None
) -> TaskRecord:
    """The result of a task whose requests are built."""
    if entry is not None and (cached := entry.read()):
        return cached
    _start_seeds(task, seeds)
    record = _compute(lm, name, task, options, entry)
    if entry is not None:
        entry.write(record)
        entry.answers_file().unlink(missing_ok=True)
    return record


def _compute(
    lm: Any, name: str, task: Any, options: TaskOptions, entry: CacheEntry | None
) -> TaskRecord:
    from lm_eval import evaluate

    cut = cut_prompts(lm, task)
    with _caching_answers(lm, entry) as caching_lm, shown_bootstraps(lm.text_progress) as reduced:
        tasks = {"tasks": {name: task}}
        output = evaluate(
            caching_lm,
            tasks,
            limit=options.limit,
            **options.prompting,
        )
    record = {
        key: output[key][name] for key in ("results", "versions", "n-shot", "higher_is_better")
    }
    record["cut"] = cut
    functions = {metric: f.__name__ for metric, f in task.aggregation().items()}
    record["resamples"] = {m: reduced[name] for m, name in functions.items() if name in reduced}
    record["effective"] = output["n-samples"][name]["effective"]
    record["logs"] = output["samples"][name]
    # through JSON, so that a computed result equals the same result read from the cache
    text = json.dumps(record, skipkeys=True, default=_json_form)
    plain_record: TaskRecord = json.loads(text)
    return plain_record


def _json_form(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable

    return handle_non_serializable(value)


@contextmanager
def _caching_answers(lm: Any, entry: CacheEntry | None) -> Iterator[Any]:
    """`lm` with a database of its answers, from which an interrupted task resumes.

    Raises MachineError where the database cannot be written.
    """
    from lm_eval.api.model import CachingLM

    if entry is None:
        yield lm
        return
    try:
        caching_lm = CachingLM(lm, str(entry.answers_file()))
        with closing(caching_lm.dbdict):
            yield caching_lm
    except sqlite3.Error as error:
        raise MachineError(
            f"could not keep answers in {str(entry.file.parent)!r}: {error}; fix that, or name "
            "another task cache, then run the same command again to resume"
        ) from error


def _metrics(
    label: str, records: Mapping[str, TaskRecord], tasks: Tasks, options: TaskOptions
) -> Iterator[Metric]:
    """Every metric of every task and group; those of a group are before those of its parts."""
    for name in ordered(tasks):
        conditions = _conditions(name, records[name], tasks, options)
        for key, value in records[name]["results"].items():
            metric_name, _, filter_name = key.partition(",")
            is_number = isinstance(value, int | float)
            if filter_name and is_number and not metric_name.endswith("_stderr"):
                metric = _metric(label, name, records[name], key, conditions)
                group = tasks.groups.get(name)
                yield metric if group is None else _of_group(metric, group, key, records)


def _conditions(
    name: str, record: TaskRecord, tasks: Tasks, options: TaskOptions
) -> dict[str, object]:
    conditions: dict[str, object] = {
        "task_version": record["versions"],
        "num_fewshot": record["n-shot"],
        "context_length": options.max_length,
        "seed": str(tasks.seeds),
        QUESTIONS: record["questions"],
    }
    conditions |= {key: value for key, value in options.prompting.items() if value}
    if record["effective"] is not None:
        conditions["samples"] = record["effective"]
    if record["cut"]:
        conditions[PROMPTS_CUT] = record["cut"]
    if name in tasks.files:
        conditions["data"] = tasks.files[name]
    return conditions


def _metric(
    label: str, task: str, record: TaskRecord, key: str, conditions: Mapping[str, object]
) -> Metric:
    """The metric that lm-eval stores as `key`, which is "NAME,FILTER"."""
    name = key.partition(",")[0]
    resamples = record["resamples"].get(name)
    metric = Metric(
        model=label,
        name=_metric_name(task, key),
        value=float(record["results"][key]),
        unit="",
        higher_is_better=bool(record["higher_is_better"].get(name, True)),
        conditions={**conditions, **({RESAMPLES: resamples} if resamples else {})},
        samples=_item_scores(record, key),
    )
    return _with_interval(metric, record, key)


def _with_interval(metric: Metric, record: TaskRecord, key: str) -> Metric:
    """`metric` with `low` and `high`, from its samples and lm-eval's standard error."""
    name, filter_name = key.split(",", 1)
    error = record["results"].get(f"{name}_stderr,{filter_name}")
    known = error if isinstance(error, float) else None
    interval = score_interval(metric.value, known, metric.samples, is_pooled=bool(metric.parts))
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return replace(metric, low=low, high=high)


def _of_group(metric: Metric, group: Any, key: str, records: Mapping[str, TaskRecord]) -> Metric:
    """`metric` of a group with its interval, the items of its tasks and the names of its parts."""
    samples = {
        task.task_name: _item_scores(records[task.task_name], key)
        for task in group.get_all_tasks()
        if key in records[task.task_name]["results"]
    }
    of_group = replace(
        metric,
        samples=group_samples(group, key, samples, metric.value),
        parts=[_metric_name(part, key) for part in parts(group, key, records)],
    )
    return _with_interval(of_group, records[group.name], key)


def _metric_name(task: str, key: str) -> str:
    name, filter_name = key.split(",", 1)
    return f"{task} {name}" + ("" if filter_name == "none" else f" ({filter_name})")


def _item_scores(record: TaskRecord, key: str) -> list[list[float]]:
    """[score, 1] of every item if the metric `key` is the mean of the scores; otherwise an empty
    list."""
    metric, filter_name = key.split(",", 1)
    scores = [item.get(metric) for item in record["logs"] if item["filter"] == filter_name]
    if not scores or not all(isinstance(score, int | float) for score in scores):
        return []
    numbers = [float(score) for score in scores if score is not None]
    is_mean = math.isclose(fmean(numbers), float(record["results"][key]))
    return [[number, 1] for number in numbers] if is_mean else []
