"""Fingerprints of a stage's inputs, and the state file that lets a finished stage be skipped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lrcompress.config import EvaluateSettings, ModelSettings
from lrcompress.config.recipe import Recipe
from lrcompress.data.files import existing_files
from lrcompress.models.loading import locate
from lrcompress.runtime.atomic_io import replace_text
from lrcompress.runtime.packages import versions
from lrcompress.runtime.safe_parsing import read_object

Stage = Literal["benchmark", "evaluate", "factorize", "finetune", "pretrain", "tasks", "teacher"]

# The version of a stage is part of every fingerprint of its results. Raise it with every edit after
# which equal inputs give other results: older results are then computed again.
STAGES: dict[Stage, int] = {
    "benchmark": 1,
    "evaluate": 3,
    "factorize": 8,
    "finetune": 1,
    "pretrain": 1,
    "tasks": 4,
    "teacher": 1,
}


class Digest(Protocol):
    """A hash object of hashlib."""

    def update(self, data: Any, /) -> None: ...


def model_state(settings: ModelSettings) -> list[list[Any]]:
    """State of the files that hold the model, as `file_states` gives it."""
    location = locate(settings.source, settings.gguf_file)
    folder = Path(location.path)
    return file_states([folder / location.gguf_file] if location.gguf_file else folder.glob("*"))


def model_inputs(settings: ModelSettings) -> list[Any]:
    """The settings that load a model, and the state of its files (empty for a hub model)."""
    return [settings.model_dump(mode="json"), model_state(settings)]


def factorize_inputs(recipe: Recipe) -> list[Any]:
    """Everything that a factorized model depends on: settings, model files and text files."""
    sections = {"model", "calibration", "factorize", "refine"}
    calibration = recipe.calibration
    texts = [data_state(spec) for spec in (*calibration.data, calibration.chat_template)]
    return [recipe.model_dump(mode="json", include=sections), model_state(recipe.model), texts]


def data_state(spec: str) -> list[list[Any]]:
    """State of the files that a text's SPEC names; empty where it names none.

    A chat template, or a file of a task, can stand for the SPEC.
    """
    files = existing_files(spec)
    return file_states(files.contents()) if files else []


def evaluation_inputs(settings: EvaluateSettings) -> list[Any]:
    """The state of the texts and tasks that an evaluation reads."""
    states = [data_state(spec) for spec in _text_names(settings)]
    return [*states, folder_state(settings.data_dir)]


def _text_names(settings: EvaluateSettings) -> tuple[str, ...]:
    return (*settings.perplexity, *settings.tasks, settings.chat_template)


def folder_state(folder: str | None) -> list[list[Any]]:
    """State of all files below `folder`; empty if it is None."""
    return [] if folder is None else file_states(Path(folder).rglob("*"))


def file_states(files: Iterable[Path]) -> list[list[Any]]:
    """[name, bytes, time of last change in ns] of those of `files` that exist, sorted by path."""
    existing = sorted(file for file in files if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in existing]


def read_state(file: Path) -> dict[str, Any]:
    """Reads a stage's state file. Returns {} where it is missing or damaged, so that the stage runs
    again."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


def write_state(file: Path, state: dict[str, Any]) -> None:
    """Writes a stage's state file in one rename; MachineError where it cannot be written."""
    replace_text(file, json.dumps(state, indent=2, default=str) + "\n")


def digest(inputs: Any, *stages: Stage) -> str:
    """SHA-256 of what a result depends on: `inputs` (JSON data), the versions of the stages that
    computed it, and the versions of packages."""
    stage_versions = {stage: STAGES[stage] for stage in stages}
    content = json.dumps([versions(), stage_versions, inputs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def add_tensors(digest: Digest, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Adds names, dtypes, shapes and all bytes of `tensors` to `digest`."""
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
