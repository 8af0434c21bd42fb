"""Finds lm-eval tasks by name: built-in tasks, YAML and JSONL files, perplexity of a text."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from yaml import YAMLError

from lrcompress.data.corpora import EMBEDDED, read_corpus
from lrcompress.data.files import TextFiles, find_files, suffix
from lrcompress.evaluation.tasks.local_datasets import reading_copies
from lrcompress.evaluation.tasks.sibling_modules import make_importable
from lrcompress.evaluation.tasks.task_files import (
    GroupFolder,
    TaskFile,
    did_you_mean,
    used_modules,
)
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import user_path

# fields of a JSONL row that make a file a multiple-choice task
CHOICE_FIELDS = {"query", "choices", "gold"}
TEST_SPLIT = "test"
# lm-eval raises any of these for a task or data that it cannot use
TASK_ERRORS = (
    OSError, LookupError, TypeError, ValueError, AssertionError, AttributeError, TemplateError,
    ImportError, ArithmeticError, RecursionError, SyntaxError, YAMLError,
)  # fmt: skip


@dataclass(frozen=True)
class Seeds:
    """Seeds of lm-eval's random generators, which decide few-shot examples, the order of choices
    and sampled answers."""

    random: int
    numpy: int
    torch: int
    fewshot: int

    @classmethod
    def from_setting(cls, seed: int | None) -> Seeds:
        """`seed` for all generators; lm-eval's default seeds if it is None."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        if seed is not None:
            return cls(seed, seed, seed, seed)
        return cls(DEFAULT_RANDOM_SEED, *[DEFAULT_OTHER_SEED] * 3)

    def __str__(self) -> str:
        """The four seeds in the form of lm-eval's option --seed."""
        return f"{self.random},{self.numpy},{self.torch},{self.fewshot}"

    def start(self) -> None:
        """Seeds the generators of Python, NumPy and torch."""
        from lm_eval.utils import set_torch_seed

        random.seed(self.random)
        np.random.seed(self.numpy)
        set_torch_seed(self.torch)


@dataclass(frozen=True)
class Tasks:
    """Resolved tasks, with their questions read.

    tasks, groups: lm-eval's Task and Group objects by name.
    files: for a built-in task that takes its questions from a file in `data_dir`: name -> file.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    files: Mapping[str, str]
    seeds: Seeds


def resolve(
    names: Sequence[str], seed: int | None = None, data_dir: str | Path | None = None
) -> Tasks:
    """Finds every task and reads its questions; needs no model.

    A name can be:
    - FILE.yaml: an lm-eval task file, or a group file beside those of its tasks;
    - a text file whose rows have the fields query, choices and gold: a multiple-choice task;
    - `pydoc`, or any other text file: a rolling-perplexity task;
    - otherwise the name of a task or group of lm-eval. If `data_dir` is given, its data is read
      from there and never from the hub.

    `seed` is that of `Seeds.from_setting`. Raises InputError where a name is unknown or data
    cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InputError(f"data directory {str(data_dir)!r} does not exist: name a folder")
    specs = {name: _local_spec(name) for name in names}
    files_of_tasks = [spec for spec in specs.values() if isinstance(spec, TaskFile)]
    make_importable([module for file in files_of_tasks for module in used_modules(file)])
    built_in = [name for name, spec in specs.items() if spec is None]
    manager = _task_manager(bool(built_in))
    _check_names(manager, built_in)
    files = _question_files(built_in, data_dir)
    specs |= {name: _multiple_choice(name, _questions(file)) for name, file in files.items()}
    seeds = Seeds.from_setting(seed)
    loaded = {name: _load(manager, name, spec, seeds, data_dir) for name, spec in specs.items()}
    return Tasks(
        tasks=_union(loaded, "tasks"),
        groups=_union(loaded, "groups"),
        files={name: str(file) for name, file in files.items()},
        seeds=seeds,
    )


@cache
def _task_manager(include_built_in: bool) -> Any:
    """lm-eval's index of tasks. Reading the built-in tasks takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_built_in)


def _load_file(file: TaskFile) -> Mapping[str, Mapping[str, Any]]:
    """The tasks and groups of a YAML file. The tasks of a group are looked up in its folder too."""
    if not file.is_group:
        return _task_manager(False).load([str(file.path)])  # type: ignore[no-any-return]
    from lm_eval.tasks import TaskManager

    path = file.path.absolute()
    manager = TaskManager(include_path=str(path.parent))
    GroupFolder.of(file).check_parts(manager.all_tasks)
    # by its name: lm-eval loads the path of a group as if its list of tasks were the name
    names = [name for name, entry in manager.task_index.items() if entry.yaml_path == path]
    return manager.load(names or [str(path)])  # type: ignore[no-any-return]


def _check_names(manager: Any, names: Sequence[str]) -> None:
    """Raises InputError where a name is not one of lm-eval's tasks or groups."""
    for name in names:
        if name not in manager.all_tasks:
            raise InputError(
                f"task {name!r} is unknown{did_you_mean(name, manager.all_tasks)} (give an lm-eval "
                "task, FILE.yaml, FILE.jsonl or a text)"
            )


def _question_files(names: Sequence[str], data_dir: str | Path | None) -> dict[str, Path]:
    """The file NAME.jsonl in `data_dir` of every built-in task that has one."""
    if data_dir is None:
        return {}
    files = {name: Path(data_dir) / f"{name}.jsonl" for name in names}
    return {name: file for name, file in files.items() if file.is_file()}


def _load(
    manager: Any,
    name: str,
    spec: TaskFile | dict[str, Any] | None,
    seeds: Seeds,
    data_dir: str | Path | None,
) -> Mapping[str, Mapping[str, Any]]:
    """The tasks and groups of one name."""
    seeds.start()  # lm-eval may draw the order of choices while it loads a task
    with explained(name):
        if isinstance(spec, TaskFile):
            return _load_file(spec)
        if spec is not None or data_dir is None:
            return manager.load([spec or name])  # type: ignore[no-any-return]
        with reading_copies(Path(data_dir), name):
            return manager.load([name])  # type: ignore[no-any-return]


def _union(loaded: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, Any]:
    """All objects of a kind ("tasks" or "groups"); InputError where two have one name."""
    union: dict[str, Any] = {}
    requested_as: dict[str, str] = {}
    for request, kinds in loaded.items():
        for name, task in kinds[kind].items():
            if name in union:
                raise InputError(
                    f"task {name!r} is given twice, as {requested_as[name]!r} and {request!r}: "
                    "leave one out, or give one another name (that of its file, in YAML its 'task')"
                )
            union[name], requested_as[name] = task, request
    return union


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turns lm-eval's various errors about the task `name` into one InputError."""
    try:
        yield
    except InputError:
        raise
    except TASK_ERRORS as error:
        raise InputError(f"task {name!r} cannot be run: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, ModuleNotFoundError):
        return f"{reason}: install it, put it beside the task, or name its folder in PYTHONPATH"
    is_bare = not reason or isinstance(error, KeyError)  # whose text is the key alone
    return f"{type(error).__name__} {reason}".rstrip() if is_bare else reason


def _local_spec(name: str) -> TaskFile | dict[str, Any] | None:
    """A YAML file, or a task's config; None for a built-in task."""
    if name.endswith((".yaml", ".yml")):
        if not user_path(name).is_file():
            raise InputError(f"task file {name!r} does not exist")
        with explained(name):
            file = TaskFile.read(user_path(name))
        file.check()
        return file
    if name.partition(":")[0] == EMBEDDED:
        return _rolling(name)
    files = find_files(name) if re.search(r"[^\w-]", name) else None  # a folder can be named piqa
    if files is None:
        return None
    first = next(files.rows(TEST_SPLIT), None)
    if files.field is None and first and _has_fields(first[1][1]):
        return _multiple_choice(_task_name(files.files[0]), files)
    return _rolling(name)


def _questions(file: Path) -> TextFiles:
    return TextFiles(str(file), (file,), field=None)


def _has_fields(row: Any) -> bool:
    return isinstance(row, Mapping) and row.keys() >= CHOICE_FIELDS


def _task_name(file: Path) -> str:
    """The name of a file without its suffixes of format and compression."""
    return file.name[: file.name.lower().rindex(suffix(file))] if suffix(file) else file.name


def _multiple_choice(name: str, files: TextFiles) -> dict[str, Any]:
    """The config of a task that compares the likelihoods of choices."""
    rows = []
    for file, (place, row) in files.rows(TEST_SPLIT):
        if not _is_question(row):
            raise InputError(
                f"task {name!r}: {file!r} {place} needs query (text), choices (texts) and gold "
                "(index)"
            )
        rows.append({key: row[key] for key in CHOICE_FIELDS})
    return {
        "task": name,
        "output_type": "multiple_choice",
        "custom_dataset": _dataset(rows),
        "test_split": "test",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1.0},
    }


def _is_question(row: Any) -> bool:
    if not isinstance(row, Mapping):
        return False
    query, choices, gold = (row.get(key) for key in ("query", "choices", "gold"))
    if not (isinstance(query, str) and isinstance(choices, list) and type(gold) is int):
        return False
    return all(isinstance(c, str) and c for c in choices) and 0 <= gold < len(choices)


def _rolling(spec: str) -> dict[str, Any]:
    """The config of a task that measures the perplexity of whole documents."""
    documents = [{"text": text} for text in read_corpus(spec, "test").documents]
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
    """A function of the form that lm-eval calls to get a task's data: `rows` as the test split."""

    def build(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({"test": Dataset.from_list(rows)})

    return build
