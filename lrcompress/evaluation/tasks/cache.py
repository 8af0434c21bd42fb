"""Results of lm-eval tasks, kept by all that decides them, so that none is computed twice."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.fingerprints import STAGES, add_tensors
from lrcompress.runtime.atomic_io import writing_state
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import safe_name, user_path
from lrcompress.runtime.safe_parsing import read_object

OFF = "none"
# of a config, what says where a model came from and not what it computes
ORIGIN = {"_name_or_path", "transformers_version", "architectures"}
# of a fast tokenizer's state, what its last call left behind
PASSING = ("truncation", "padding")


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lrcompress/tasks"


@dataclass(frozen=True)
class TaskCache:
    """A folder with one JSON file for each result, below one folder for each model."""

    folder: Path

    @classmethod
    def at(cls, place: str | None) -> TaskCache | None:
        """At `place`, or where caches belong if that is None; none at all if it is "none".

        Raises InputError where it cannot be written to.
        """
        if place == OFF:
            return None
        folder = default_folder() if place is None else user_path(place)
        there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise InputError(
                f"task cache {str(folder)!r} is no folder to write to: name another with "
                f"--task-cache (in a recipe task_cache), or switch it off with {OFF!r}"
            )
        return cls(folder)

    def entry(self, model: str, task: str, inputs: Any) -> Entry:
        """The place of a result: of which model, by fingerprint, which task, and all its inputs."""
        content = json.dumps([STAGES["tasks"], model, task, inputs], sort_keys=True, default=str)
        key = hashlib.sha256(content.encode()).hexdigest()
        return Entry(self.folder / model[:32] / f"{safe_name(task)}-{key[:32]}.json", key)


@dataclass(frozen=True)
class Entry:
    """One result's file, and beside it, as long as there is none, the answers up to now."""

    file: Path
    key: str

    def read(self) -> dict[str, Any] | None:
        """None where there is no whole result, or another one."""
        try:
            found = read_object(self.file)
        except (OSError, ValueError):
            return None
        whole = found.get("key") == self.key
        return found["result"] if whole and isinstance(found.get("result"), dict) else None

    def write(self, result: Mapping[str, Any]) -> None:
        """In one rename. Raises MachineError where the disk is full or cannot be written."""
        partial_file = self.file.with_suffix(f".{os.getpid()}.partial")
        with writing_state(f"the results of tasks in {str(self.file.parent)!r}"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial_file.write_text(json.dumps({"key": self.key, "result": result}), "utf-8")
                partial_file.replace(self.file)
            finally:
                partial_file.unlink(missing_ok=True)

    def answers(self) -> Path:
        """lm-eval's data base of the answers of an interrupted task; a damaged one is removed."""
        found = self.file.with_suffix(".db")
        with writing_state(f"the answers to tasks in {str(found.parent)!r}"):
            found.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(found)) as base:
                whole = base.execute("PRAGMA quick_check").fetchone() == ("ok",)
        except sqlite3.Error:
            whole = False
        if not whole:
            found.unlink(missing_ok=True)
        return found


def fingerprint(model: Any, tokenizer: Any) -> str:
    """Of all that decides what a model answers: config, tensors and tokenizer, not their folder."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ORIGIN}
    attention = getattr(model.config, "_attn_implementation", None)
    settings = [type(model).__name__, config, attention, _generation(model), _vocabulary(tokenizer)]
    mark = hashlib.blake2b(_json(settings, sort_keys=True), digest_size=32)
    add_tensors(mark, (*model.named_parameters(), *model.named_buffers()))
    return mark.hexdigest()


def _generation(model: Any) -> dict[str, Any]:
    found = getattr(model, "generation_config", None)
    return {k: v for k, v in (found.to_dict() if found else {}).items() if k not in ORIGIN}


def _vocabulary(tokenizer: Any) -> list[Any]:
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items()}
    found = [type(tokenizer).__name__, special, tokenizer.chat_template]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [*found, tokenizer.get_vocab(), sorted(tokenizer.init_kwargs.items(), key=str)]
    state = json.loads(backend.to_str())
    return [*found, {key: value for key, value in state.items() if key not in PASSING}]


def identity(task: Any) -> str:
    """Of an lm-eval task whose requests are built: its version and config, the code that these
    name, and every question, word for word."""
    config = task.config.to_dict(keep_callable=True)
    config["metadata"] = {**(config.get("metadata") or {}), "config_source": None}
    return hashlib.blake2b(_json([task.VERSION, config, questions(task)])).hexdigest()


def questions(task: Any) -> str:
    """Of every question of an lm-eval task whose requests are built, word for word."""
    mark = hashlib.blake2b(digest_size=32)
    for one in task.instances:
        asked = [one.request_type, one.doc_id, one.idx, one.repeats, one.arguments, one.doc]
        mark.update(_json(asked))
    return mark.hexdigest()


def _json(value: Any, **options: Any) -> bytes:
    return json.dumps(value, skipkeys=True, default=_plain, **options).encode()


def _plain(value: Any) -> Any:
    """What JSON has no form for; of code the whole module, since functions call others."""
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if callable(value):
        return [getattr(value, "__qualname__", str(type(value))), _source(value)]
    return str(value)


def _source(value: Any) -> str:
    module = inspect.getmodule(value)
    try:
        return "" if module is None else inspect.getsource(module)
    except (OSError, TypeError):  # built in, or not from a file
        return ""
