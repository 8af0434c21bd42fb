"""Groups of lm-eval tasks: their results, the items that these are means of, and their place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lrcompress.evaluation.tasks.cache import TaskRecord
from lrcompress.evaluation.tasks.registry import Tasks
from lrcompress.reporting.metric import Number

# for each item its score and its weight, both times the weight of its task
Samples = Sequence[Sequence[Number]]


def ordered(tasks: Tasks) -> list[str]:
    """The names of all tasks and groups as they were requested; a group is before its parts."""
    parents = {part: name for name, group in tasks.groups.items() for part in group.child_names}
    names: dict[str, None] = {}
    for name in tasks.tasks:
        root = name
        while root in parents:
            root = parents[root]
        names |= dict.fromkeys(_with_parts(root, tasks.groups))
    return list(names)


def _with_parts(name: str, groups: Mapping[str, Any]) -> Iterator[str]:
    yield name
    for part in groups[name].child_names if name in groups else ():
        yield from _with_parts(part, groups)


def group_record(group: Any, records: Mapping[str, TaskRecord]) -> TaskRecord:
    """The result of a group from the results of its tasks, by lm-eval's own aggregation."""
    members = _members(group, records).values()
    higher_is_better: dict[str, bool] = {}
    for member in members:
        higher_is_better = member["higher_is_better"] | higher_is_better
    shots = {member["n-shot"] for member in members}
    questions = hashlib.sha256(" ".join(member["questions"] for member in members).encode())
    return {
        "results": group.aggregate({name: record["results"] for name, record in records.items()}),
        "versions": group.version,
        "n-shot": shots.pop() if len(shots) == 1 else None,
        "higher_is_better": higher_is_better,
        "effective": None,
        "cut": sum(member["cut"] for member in members),
        "logs": [],
        "resamples": {},
        "questions": questions.hexdigest(),
    }


def parts(group: Any, key: str, records: Mapping[str, TaskRecord]) -> Iterator[str]:
    """The tasks and groups directly in `group` that have the metric `key`, which is "NAME,FILTER".

    Groups that do not have it give their own parts.
    """
    for name in group.child_names:
        if key in records[name]["results"]:
            yield name
        elif name not in {task.task_name for task in group.get_all_tasks()}:
            yield from parts(group.get(name), key, records)


def group_samples(
    group: Any, key: str, samples: Mapping[str, Samples], value: float
) -> list[list[float]]:
    """[weight * score, weight] of every item of every task in `group`.

    The weight is 1 where lm-eval weights tasks by size, otherwise 1 / the number of items of the
    task. `samples` holds [score, 1] of the items of each task that has the metric `key`. Empty
    where `value`, which is that of lm-eval, is not the weighted mean.
    """
    tasks = [samples[t.task_name] for t in group.get_all_tasks() if t.task_name in samples]
    by_size = _is_weighted_by_size(group, key.partition(",")[0])
    items = [
        [score * weight, weight]
        for scores in tasks
        for weight in [1.0 if by_size else 1 / max(len(scores), 1)]
        for score, _ in scores
    ]
    if not items or not all(tasks):
        return []
    mean = math.fsum(score for score, _ in items) / math.fsum(weight for _, weight in items)
    return items if math.isclose(mean, value, abs_tol=1e-12) else []


def _is_weighted_by_size(group: Any, metric: str) -> bool:
    return any(
        aggregation.metric == metric and aggregation.weight_by_size
        for aggregation in group.aggregate_metric_list or ()
    )


def _members(group: Any, records: Mapping[str, TaskRecord]) -> dict[str, TaskRecord]:
    """The records of all tasks in a group and its sub-groups."""
    return {task.task_name: records[task.task_name] for task in group.get_all_tasks()}
