"""lm-eval tasks: built-in names, local YAML and JSONL files, and rolling perplexity of a text."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean
from typing import Any

from lrcompress.corpora import EMBEDDED, read_corpus
from lrcompress.protocols import InputError, Metric

# resamples behind the standard errors that lm-eval has no formula for
BOOTSTRAPS = 100
CHOICE_FIELDS = {"query", "choices", "gold"}


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist and can be read, ready for lm-eval."""

    specs: list[str | dict[str, Any]]
    manager: Any


def resolve(names: Sequence[str]) -> Tasks:
    """Finds every task before any model is loaded.

    A name that ends in .yaml is a task file, .jsonl with query, choices and gold a
    multiple-choice task, `pydoc` and any other .txt or .jsonl text a rolling-perplexity
    task, and the rest lm-eval's own tasks. Raises InputError where a name is unknown or a file
    cannot be read.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    specs = [_local(name) for name in names]
    # reading the index of lm-eval's own tasks takes seconds
    manager = TaskManager(include_defaults=any(spec is None for spec in specs))
    for name, spec in zip(names, specs, strict=True):
        if spec is None and name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, 3)
            hint = f", did you mean {', '.join(close)}?" if close else ""
            raise InputError(
                f"task {name!r} is unknown{hint} (give an lm-eval task, FILE.yaml, FILE.jsonl or "
                "a text)"
            )
    tasks = Tasks([spec or name for name, spec in zip(names, specs, strict=True)], manager)
    with _explained():
        manager.load(tasks.specs)
    local = [str(spec["task"]) for spec in specs if isinstance(spec, dict)]
    if len(set(local)) < len(local):
        raise InputError(f"tasks {', '.join(local)}: two of the same name, rename one of the files")
    return tasks


@contextmanager
def _explained() -> Iterator[None]:
    """lm-eval's many ways to say that a task cannot be read or run -> one InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, LookupError, TypeError, ValueError, AssertionError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"a task cannot be run: {reason}") from error


def _local(name: str) -> str | dict[str, Any] | None:
    file, _, field = name.partition(":")
    if file.endswith((".yaml", ".yml")):
        if not Path(file).is_file():
            raise InputError(f"task file {file!r} does not exist")
        return file
    if file.endswith(".jsonl") and not field:
        rows = _rows(Path(file))
        if rows and rows[0].keys() >= CHOICE_FIELDS:
            return _multiple_choice(Path(file).stem, rows)
    if file == EMBEDDED or file.endswith((".jsonl", ".txt")):
        return _rolling(name)
    return None


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"task file {str(path)!r} does not exist")
    try:
        lines = path.read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise InputError(f"task file {str(path)!r} is not JSON lines: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"task file {str(path)!r}: every line has to be a JSON object")
    return rows


def _multiple_choice(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    for number, row in enumerate(rows, 1):
        if not _is_question(row):
            raise InputError(
                f"task {name!r} line {number}: needs query (text), choices (texts) and gold (index)"
            )
    return {
        "task": name,
        "output_type": "multiple_choice",
        "custom_dataset": _dataset([{k: row[k] for k in CHOICE_FIELDS} for row in rows]),
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }


def _is_question(row: Mapping[str, Any]) -> bool:
    query, choices, gold = (row.get(key) for key in ("query", "choices", "gold"))
    if not (isinstance(query, str) and isinstance(choices, list) and type(gold) is int):
        return False
    return all(isinstance(c, str) and c for c in choices) and 0 <= gold < len(choices)


def _rolling(spec: str) -> dict[str, Any]:
    documents = [{"text": text} for text in read_corpus(spec, "test").documents if text.strip()]
    if not documents:
        raise InputError(f"task text {spec!r} is empty")
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return {
        "task": f"rolling {spec}",
        "output_type": "loglikelihood_rolling",
        "custom_dataset": _dataset(documents),
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": metric} for metric in metrics],
        "metadata": {"version": 1.0},
    }


def _dataset(rows: list[dict[str, Any]]) -> Any:
    def build(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({"test": Dataset.from_list(rows)})

    return build


def run_tasks(
    label: str,
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    max_length: int,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
) -> list[Metric]:
    """Every metric of every task. Raises InputError where a task's data cannot be had."""
    from lm_eval import simple_evaluate

    harness = _harness()(
        pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=batch_size
    )
    with _explained():
        results = simple_evaluate(
            model=harness,
            tasks=tasks.specs,
            task_manager=tasks.manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
        )
    return _metrics(label, results, max_length)


def _harness() -> Any:
    from lm_eval.models.huggingface import HFLM

    class QuietHFLM(HFLM):  # type: ignore[misc]
        """HFLM without a progress bar for each window inside that of the whole text."""

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            quiet = disable_tqdm or override_bs is not None
            return super()._loglikelihood_tokens(requests, quiet, override_bs)

    return QuietHFLM


def _metrics(label: str, results: Mapping[str, Any], max_length: int) -> list[Metric]:
    found = []
    for task, values in results["results"].items():
        conditions = {
            "task_version": results["versions"].get(task),
            "num_fewshot": results["n-shot"].get(task),
            "samples": results["n-samples"].get(task, {}).get("effective"),
            "context_length": max_length,
        }
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            better = bool(results["higher_is_better"].get(task, {}).get(metric, True))
            one = _metric(label, task, metric, values, key, better, conditions)
            logged = results["samples"].get(task, ())
            found.append(replace(one, samples=_scores(logged, metric, filtered, one.value)))
    return found


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
    metric: str,
    values: Mapping[str, Any],
    key: str,
    better: bool,
    conditions: Mapping[str, object],
) -> Metric:
    name, filtered = key.split(",", 1)
    spread = values.get(f"{name}_stderr,{filtered}")
    value = float(values[key])
    low, high = (value - spread, value + spread) if isinstance(spread, float) else (None, None)
    title = f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})")
    return Metric(label, title, value, "", better, conditions, low, high)
