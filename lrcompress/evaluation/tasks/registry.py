"""lm-eval tasks by name: built-in ones, YAML and JSONL files, rolling perplexity of a text."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from yaml import YAMLError

from lrcompress.data.corpora import EMBEDDED, read_corpus
from lrcompress.evaluation.tasks.local_datasets import reading_copies
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.safe_parsing import read_json

CHOICE_FIELDS = {"query", "choices", "gold"}
# what lm-eval raises where a task or its data is wrong
UNUSABLE = (
    OSError, LookupError, TypeError, ValueError, AssertionError, AttributeError, TemplateError,
    ImportError, ArithmeticError, RecursionError, YAMLError,
)  # fmt: skip


@dataclass(frozen=True)
class Seeds:
    """Where lm-eval's generators start: few-shot examples, order of choices, sampled answers."""

    random: int
    numpy: int
    torch: int
    fewshot: int

    @classmethod
    def of(cls, seed: int | None) -> Seeds:
        """One seed for all; lm-eval's own where it is None."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

        if seed is not None:
            return cls(seed, seed, seed, seed)
        return cls(DEFAULT_RANDOM_SEED, *[DEFAULT_OTHER_SEED] * 3)

    def __str__(self) -> str:
        """As lm-eval's own --seed takes them."""
        return f"{self.random},{self.numpy},{self.torch},{self.fewshot}"

    def start(self) -> None:
        from lm_eval.utils import set_torch_seed

        random.seed(self.random)
        np.random.seed(self.numpy)
        set_torch_seed(self.torch)


@dataclass(frozen=True)
class Tasks:
    """Tasks that exist, with their questions read: lm-eval's Task and Group objects by name.

    `files` names the file whose questions a task asks although it has the name of a built-in one.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]
    files: Mapping[str, str]
    seeds: Seeds


def resolve(
    names: Sequence[str], seed: int | None = None, data_dir: str | Path | None = None
) -> Tasks:
    """Finds every task, and reads its questions, before any model is loaded.

    A name that ends in .yaml is a task file, .jsonl with query, choices and gold a
    multiple-choice task, `pydoc` and any other .txt or .jsonl text a rolling-perplexity
    task, and the rest lm-eval's own tasks; these read their data from `data_dir`, if it is given,
    and never from the hub. Raises InputError where a name is unknown or data cannot be read.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if data_dir is not None and not Path(data_dir).is_dir():
        raise InputError(f"data directory {str(data_dir)!r} does not exist: name a folder")
    specs = {name: _local(name) for name in names}
    manager = _manager(None in specs.values())
    files = _known(manager, [name for name, spec in specs.items() if spec is None], data_dir)
    specs |= {name: _multiple_choice(name, _rows(file)) for name, file in files.items()}
    seeds = Seeds.of(seed)
    loaded = {name: _load(manager, name, spec, seeds, data_dir) for name, spec in specs.items()}
    tasks, groups = _union(loaded, "tasks"), _union(loaded, "groups")
    return Tasks(tasks, groups, {name: str(file) for name, file in files.items()}, seeds)


@cache
def _manager(built_in: bool) -> Any:
    """lm-eval's index of tasks: reading that of its own takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=built_in)


def _known(manager: Any, names: Sequence[str], data_dir: str | Path | None) -> dict[str, Path]:
    """Checks the names of built-in tasks; those that have a file of questions in `data_dir`."""
    for name in names:
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, 3)
            hint = f", did you mean {', '.join(close)}?" if close else ""
            raise InputError(
                f"task {name!r} is unknown{hint} (give an lm-eval task, FILE.yaml, FILE.jsonl or "
                "a text)"
            )
    found = {} if data_dir is None else {n: Path(data_dir) / f"{n}.jsonl" for n in names}
    return {name: file for name, file in found.items() if file.is_file()}


def _load(
    manager: Any,
    name: str,
    spec: str | dict[str, Any] | None,
    seeds: Seeds,
    data_dir: str | Path | None,
) -> Mapping[str, Mapping[str, Any]]:
    """The tasks and groups of one name; lm-eval may draw the order of choices here."""
    seeds.start()
    with explained(name):
        if spec is not None or data_dir is None:
            return manager.load([spec or name])  # type: ignore[no-any-return]
        with reading_copies(Path(data_dir), name):
            return manager.load([name])  # type: ignore[no-any-return]


def _union(loaded: Mapping[str, Mapping[str, Any]], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for owner, parts in loaded.items():
        for name, one in parts[kind].items():
            if name in found:
                raise InputError(
                    f"task {name!r} is there twice, as {owners[name]!r} and {owner!r}: leave one "
                    "out, or rename a file"
                )
            found[name], owners[name] = one, owner
    return found


@contextmanager
def explained(name: str) -> Iterator[None]:
    """lm-eval's many ways to say that a task cannot be read or run -> one InputError."""
    try:
        yield
    except InputError:
        raise
    except UNUSABLE as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"task {name!r} cannot be run: {reason}") from error


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
        rows = [read_json(line) for line in lines if line.strip()]
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
