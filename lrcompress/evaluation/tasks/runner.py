"""lm-eval's tasks on a model that is loaded: what is known is not asked again."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch

from lrcompress.evaluation.tasks.cache import Entry, TaskCache, fingerprint, identity, questions
from lrcompress.evaluation.tasks.registry import Tasks, explained
from lrcompress.evaluation.tasks.sample_logs import Logs
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.tables import QUESTIONS
from lrcompress.runtime.errors import MachineError
from lrcompress.runtime.packages import versions
from lrcompress.runtime.progress import Progress, silent


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are put to a model: tokens of a context, questions of a task, examples before
    each (None is the task's own number), sequences in a forward pass."""

    max_length: int
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1


@dataclass(frozen=True)
class TaskResult:
    """The metrics of tasks, and what was asked and answered."""

    metrics: list[Metric]
    logs: Logs


def run_tasks(
    label: str,
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    asking: TaskOptions,
    cache: TaskCache | None = None,
    progress: Progress = silent,
) -> TaskResult:
    """Every metric of every task and group, from `cache` what it has of an equal model.

    Each task is run by itself, as lm-eval's command line runs it alone, and kept when it is done.
    Raises InputError where lm-eval refuses one.
    """
    size, length = asking.batch_size, asking.max_length
    harness = _harness(progress)
    lm = harness(pretrained=model, tokenizer=tokenizer, max_length=length, batch_size=size)
    mark = "" if cache is None else fingerprint(model, tokenizer)
    found = {}
    for name, task in tasks.tasks.items():
        with explained(name):
            _ask(task, tasks, asking)
            inputs = [versions(), identity(task), str(tasks.seeds), length, size, _device(lm)]
            entry = None if cache is None else cache.entry(mark, name, inputs)
            asked = {QUESTIONS: questions(task)}
            found[name] = _result(lm, name, task, tasks, asking, entry) | asked
    logs = {name: result["logs"] for name, result in found.items()}
    found |= {name: _group(group, found) for name, group in tasks.groups.items()}
    return TaskResult(list(_metrics(label, found, tasks, length)), logs)


def _device(lm: Any) -> str:
    on_gpu = lm.device.type == "cuda"
    return torch.cuda.get_device_name(lm.device) if on_gpu else str(lm.device.type)


def _harness(progress: Progress) -> Any:
    from lm_eval.models.huggingface import HFLM

    class QuietHFLM(HFLM):  # type: ignore[misc]
        """HFLM whose progress bar is that of all texts, and not a new one for each window."""

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            quiet = disable_tqdm or override_bs is not None
            return super()._loglikelihood_tokens(requests, quiet, override_bs)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            """One text after another, each kept when it is done; more than one window in a pass
            are of several texts."""
            ask = super().loglikelihood_rolling
            if self.batch_size != 1:
                return ask(requests, disable_tqdm)
            texts = progress(requests, "texts of a task")
            return [score for text in texts for score in ask([text], True)]

    return QuietHFLM


def _ask(task: Any, tasks: Tasks, asking: TaskOptions) -> None:
    """Builds the requests, by the rules of lm-eval's command line for examples."""
    own = task.get_config("num_fewshot")
    if asking.num_fewshot is not None and own != 0:  # a task that says 0 means it
        task.set_config("num_fewshot", asking.num_fewshot)
    elif own is None:
        task.set_config("num_fewshot", 0)
    _start(task, tasks)
    task.build_all_requests(limit=asking.limit)


def _start(task: Any, tasks: Tasks) -> None:
    tasks.seeds.start()
    task.set_fewshot_seed(tasks.seeds.fewshot)


def _result(
    lm: Any, name: str, task: Any, tasks: Tasks, asking: TaskOptions, entry: Entry | None
) -> dict[str, Any]:
    """Of a task whose requests are built."""
    from lm_eval import evaluate

    if entry is not None and (known := entry.read()):
        return known
    _start(task, tasks)
    with _remembering(lm, entry) as answering:
        done = evaluate(answering, {"tasks": {name: task}}, limit=asking.limit)
    kept = {key: done[key][name] for key in ("results", "versions", "n-shot", "higher_is_better")}
    kept |= {"effective": done["n-samples"][name]["effective"], "logs": done["samples"][name]}
    # as it will be read again, so that it makes no difference where it comes from
    result: dict[str, Any] = json.loads(json.dumps(kept, skipkeys=True, default=_plain))
    if entry is not None:
        entry.write(result)
        entry.answers().unlink(missing_ok=True)
    return result


def _plain(value: Any) -> Any:
    from lm_eval.utils import handle_non_serializable

    return handle_non_serializable(value)


@contextmanager
def _remembering(lm: Any, entry: Entry | None) -> Iterator[Any]:
    """`lm` with the answers to a task that was interrupted, and keeping each that it gives."""
    from lm_eval.api.model import CachingLM

    if entry is None:
        yield lm
        return
    try:
        caching = CachingLM(lm, str(entry.answers()))
        with closing(caching.dbdict):
            yield caching
    except sqlite3.Error as error:
        raise MachineError(
            f"could not keep answers in {str(entry.file.parent)!r}: {error}; mend that, or name "
            "another task cache, then the same command goes on"
        ) from error


def _group(group: Any, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The result of a group, of those of its tasks, by lm-eval's own aggregation."""
    parts = [found[task.task_name] for task in group.get_all_tasks()]
    better: dict[str, bool] = {}
    for part in parts:
        better = part["higher_is_better"] | better
    shots = {part["n-shot"] for part in parts}
    return {
        "results": group.aggregate({name: result["results"] for name, result in found.items()}),
        "versions": group.version,
        "n-shot": shots.pop() if len(shots) == 1 else None,
        "higher_is_better": better,
        "effective": None,
        "logs": [],
    }


def _metrics(
    label: str, found: Mapping[str, Mapping[str, Any]], tasks: Tasks, max_length: int
) -> Iterator[Metric]:
    for name, result in found.items():
        conditions: dict[str, object] = {
            "task_version": result["versions"],
            "num_fewshot": result["n-shot"],
            "samples": result["effective"],
            "context_length": max_length,
            "seed": str(tasks.seeds),
        }
        if QUESTIONS in result:
            conditions[QUESTIONS] = result[QUESTIONS]
        if name in tasks.files:
            conditions["data"] = tasks.files[name]
        for key, value in result["results"].items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            better = bool(result["higher_is_better"].get(metric, True))
            one = _metric(label, name, result["results"], key, better, conditions)
            yield replace(one, samples=_scores(result["logs"], metric, filtered, one.value))


def _scores(
    logged: Sequence[Mapping[str, Any]], metric: str, filtered: str, value: float
) -> list[list[float]]:
    """The score of every item, where `value` is their mean; else nothing."""
    scores = [sample.get(metric) for sample in logged if sample["filter"] == filtered]
    if not scores or not all(isinstance(score, int | float) for score in scores):
        return []
    found = [float(score) for score in scores if score is not None]
    return [[score, 1] for score in found] if math.isclose(fmean(found), value) else []


def _metric(
    label: str,
    task: str,
    values: Mapping[str, Any],
    key: str,
    better: bool,
    conditions: Mapping[str, object],
) -> Metric:
    name, filtered = key.split(",", 1)
    spread = values.get(f"{name}_stderr,{filtered}")
    value = float(values[key])
    low, high = (value - spread, value + spread) if isinstance(spread, float) else (None, None)
    title = f"{task} {name}" + ("" if filtered == "none" else f" ({filtered})")
    return Metric(label, title, value, "", better, conditions, low, high)
