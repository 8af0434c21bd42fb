"""Cache of lm-eval results: a file per model and task, found by a hash of all inputs."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, cast
from uuid import uuid4

from lrcompress.checkpoint.fingerprints import STAGES, add_tensors
from lrcompress.evaluation.tasks.task_code import UntrackedCodeError, sources
from lrcompress.runtime.atomic_io import replace_text, writing_state
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import safe_name, user_path
from lrcompress.runtime.safe_parsing import read_object

CACHE_OFF = "none"  # the value of task_cache that keeps nothing
# config keys that tell where a model came from, not what it computes
ORIGIN_KEYS = {"_name_or_path", "transformers_version", "architectures"}
# parts of a fast tokenizer's state that its last call changes
CALL_STATE_KEYS = ("truncation", "padding")

TaskRecord = TypedDict(
    "TaskRecord",
    {
        "results": dict[str, Any],  # "METRIC,FILTER" -> value, as lm-eval returns it
        "versions": Any,
        "n-shot": int | None,
        "higher_is_better": dict[str, bool],
        "effective": int | None,  # number of questions asked; None for a group
        "logs": list[dict[str, Any]],
        "cut": int,  # number of questions of which a prompt lost its beginning
        "resamples": dict[str, int],  # metric -> those of its bootstrap, where lm-eval draws more
        "questions": str,  # hash of the questions
    },
)


def default_folder() -> Path:
    """`lrcompress/tasks` in $XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lrcompress/tasks"


@dataclass(frozen=True)
class TaskCache:
    """A folder with a subfolder for each model, which has a JSON file for each result."""

    folder: Path

    @classmethod
    def from_setting(cls, task_cache: str | None) -> TaskCache | None:
        """The cache that the setting `task_cache` names: a folder, None for the default folder,
        or "none" for no cache.

        Raises InputError where the folder cannot be written.
        """
        if task_cache == CACHE_OFF:
            return None
        folder = default_folder() if task_cache is None else user_path(task_cache)
        absolute = folder.absolute()
        existing = next(path for path in (absolute, *absolute.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise InputError(
                f"task cache {str(folder)!r} is not a folder that can be written: name another "
                f"with --task-cache (in a recipe task_cache), or switch it off with {CACHE_OFF!r}"
            )
        return cls(folder)

    def entry(self, model_hash: str, task: str, inputs: Any) -> CacheEntry:
        """The entry of one result. `model_hash` is a `model_fingerprint`; `inputs` is everything
        else that decides the result, JSON data."""
        content = json.dumps(
            [STAGES["tasks"], model_hash, task, inputs], sort_keys=True, default=str
        )
        key = hashlib.sha256(content.encode()).hexdigest()
        return CacheEntry(self.folder / model_hash[:32] / f"{safe_name(task)}-{key[:32]}.json", key)


@dataclass(frozen=True)
class CacheEntry:
    """The file of one result. While the task is unfinished, a database of the model's answers
    stands beside it."""

    file: Path
    key: str

    def read(self) -> TaskRecord | None:
        """The cached result; None where there is none, or the file is damaged."""
        try:
            content = read_object(self.file)
        except (OSError, ValueError):
            return None
        result = content.get("result")
        is_valid = content.get("key") == self.key and isinstance(result, dict)
        return cast(TaskRecord, result) if is_valid else None

    def write(self, record: TaskRecord) -> None:
        """Writes the file in one rename. Raises MachineError where it cannot be written."""
        with writing_state(f"the results of tasks in {str(self.file.parent)!r}"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.file, json.dumps({"key": self.key, "result": record}), shared=True)

    def answers_file(self) -> Path:
        """Path of lm-eval's SQLite database of answers; a damaged database is removed first."""
        file = self.file.with_suffix(".db")
        with writing_state(f"the answers to tasks in {str(file.parent)!r}"):
            file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(file)) as database:
                is_intact = database.execute("PRAGMA quick_check").fetchone() == ("ok",)
        except sqlite3.Error:
            is_intact = False
        if not is_intact:
            file.unlink(missing_ok=True)
        return file


def model_fingerprint(model: Any, tokenizer: Any) -> str:
    """Hash of everything that decides a model's answers: config, tensors, generation settings and
    tokenizer. The folder that it was loaded from does not count."""
    config = _without_origin(model.config)
    attention = getattr(model.config, "_attn_implementation", None)
    generation = _without_origin(getattr(model, "generation_config", None))
    settings = [type(model).__name__, config, attention, generation, _tokenizer_state(tokenizer)]
    digest = hashlib.blake2b(_json_bytes(settings, sort_keys=True), digest_size=32)
    add_tensors(digest, (*model.named_parameters(), *model.named_buffers()))
    return digest.hexdigest()


def _without_origin(config: Any) -> dict[str, Any]:
    values = config.to_dict() if config else {}
    return {key: value for key, value in values.items() if key not in ORIGIN_KEYS}


def _tokenizer_state(tokenizer: Any) -> list[Any]:
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    state = [type(tokenizer).__name__, special, tokenizer.chat_template]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [*state, tokenizer.get_vocab(), sorted(tokenizer.init_kwargs.items(), key=str)]
    fast_state = json.loads(backend.to_str())
    return [*state, {key: v for key, v in fast_state.items() if key not in CALL_STATE_KEYS}]


def task_fingerprint(task: Any) -> str:
    """Hash of an lm-eval task whose requests are built: its definition and every question.

    Raises UntrackedCodeError where its code cannot be told.
    """
    content = [*_definition(task), questions_hash(task)]
    return hashlib.blake2b(_json_bytes(content)).hexdigest()


def definitions_hash(tasks: Iterable[Any]) -> str:
    """Hash of lm-eval tasks whose requests are not built: their definitions and data sets.

    Where the code of one cannot be told, no two hashes are equal.
    """
    try:
        content = [[*_definition(task), _dataset_state(task)] for task in tasks]
        return hashlib.blake2b(_json_bytes(content)).hexdigest()
    except UntrackedCodeError:
        return uuid4().hex


def _definition(task: Any) -> list[Any]:
    """Version, class and config of a task. Functions and classes stand for their code."""
    config = task.config.to_dict(keep_callable=True)
    config["metadata"] = {**(config.get("metadata") or {}), "config_source": None}
    return [task.VERSION, type(task), config]


def _dataset_state(task: Any) -> dict[str, Any]:
    """Split -> what `datasets` knows its content by."""
    return {split: getattr(rows, "_fingerprint", None) for split, rows in task.dataset.items()}


def questions_hash(task: Any) -> str:
    """Hash of the full text of every question of an lm-eval task whose requests are built."""
    digest = hashlib.blake2b(digest_size=32)
    for request in task.instances:
        digest.update(
            _json_bytes(
                [
                    request.request_type,
                    request.doc_id,
                    request.idx,
                    request.repeats,
                    request.arguments,
                    request.doc,
                ]
            )
        )
    return digest.hexdigest()


def _json_bytes(value: Any, **options: Any) -> bytes:
    return json.dumps(value, skipkeys=True, default=_json_form, **options).encode()


def _json_form(value: Any) -> Any:
    """A JSON form for values that have none. A function is represented by its name and all the
    source that it may run.

    Raises UntrackedCodeError where this cannot be told.
    """
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if callable(value):
        return [getattr(value, "__qualname__", None), sources(value)]
    return str(value)
