"""What a stage depended on and what it gave, in a file, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from lrcompress.config import ModelSettings
from lrcompress.config.recipe import Recipe
from lrcompress.models.loading import locate
from lrcompress.runtime.atomic_io import replace_text
from lrcompress.runtime.packages import versions
from lrcompress.runtime.safe_parsing import read_object

Stage = Literal["benchmark", "evaluate", "factorize", "finetune", "pretrain", "tasks", "teacher"]

# The number of a stage is part of everything that is kept of it. Raise it with every edit after
# which equal inputs give other results: what was kept before is then made again.
STAGES: dict[Stage, int] = {
    "benchmark": 1,
    "evaluate": 1,
    "factorize": 1,
    "finetune": 1,
    "pretrain": 1,
    "tasks": 1,
    "teacher": 1,
}


class Digest(Protocol):
    """A hash of hashlib."""

    def update(self, data: Any, /) -> None: ...


def model_state(settings: ModelSettings) -> list[list[Any]]:
    """Of the files that hold the model."""
    location = locate(settings.source, settings.gguf_file)
    folder = Path(location.path)
    return states([folder / location.gguf_file] if location.gguf_file else folder.glob("*"))


def model_inputs(settings: ModelSettings) -> list[Any]:
    """How the model is named and loaded, and the state of its files: a hub's are not here."""
    return [settings.model_dump(mode="json"), model_state(settings)]


def factorizing(recipe: Recipe) -> list[Any]:
    """What a factorized model depends on."""
    made_of = {"model", "calibration", "factorize", "refine"}
    texts = [data_state(spec) for spec in recipe.calibration.data]
    return [recipe.model_dump(mode="json", include=made_of), model_state(recipe.model), texts]


def data_state(spec: str) -> list[list[Any]]:
    """Of the file that a text's SPEC names, if it names one."""
    return states([Path(spec.partition(":")[0])])


def folder_state(folder: str | None) -> list[list[Any]]:
    """Of all files below a folder, if one is named."""
    return [] if folder is None else states(Path(folder).rglob("*"))


def states(files: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of the files that exist; none for what the hub holds."""
    found = sorted(file for file in files if file.is_file())
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found]


def read(file: Path) -> dict[str, Any]:
    """A stage's file; empty, so that the stage is done again, where it is missing or damaged."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


def write(file: Path, content: dict[str, Any]) -> None:
    """Writes a stage's file in one rename."""
    replace_text(file, json.dumps(content, indent=2, default=str) + "\n")


def digest(inputs: Any, *stages: Stage) -> str:
    """SHA-256 of what a result depends on: inputs, the stages that made it, and versions."""
    numbers = {stage: STAGES[stage] for stage in stages}
    content = json.dumps([versions(), numbers, inputs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def add_tensors(digest: Digest, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Adds names, dtypes, shapes and contents of `tensors` to a hash, bit for bit."""
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
