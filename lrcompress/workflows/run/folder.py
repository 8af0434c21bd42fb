"""The folder of a run: the models, the kept measurements, and the report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.fingerprints import Stage
from lrcompress.config.recipe import Recipe
from lrcompress.evaluation.tasks import sample_logs
from lrcompress.reporting import figures, report
from lrcompress.runtime import locks
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import refuse_links, unique_file_names
from lrcompress.workflows.work_folder import RECIPE, ResultFile, WorkFolder, partial_names

T = TypeVar("T")

MODEL, FINETUNED, STAGES_FOLDER = "model", "finetuned", "stages"
# stage that makes a model -> folder of the model
MODEL_FOLDERS: dict[Stage, str] = {"factorize": MODEL, "finetune": FINETUNED}


@dataclass(frozen=True)
class RunFolder(WorkFolder):
    """One recipe's folder: recipe.yaml, model/, finetuned/, stages/, samples/, and the report."""

    recipe: Recipe

    kind = "run"
    reports = tuple(report.FORMATS)
    results = STAGES_FOLDER

    def refuse_other(self, overwrite: bool) -> None:
        """Raises InputError where the folder holds links, other content, or another recipe's model.

        With `overwrite` another recipe's model is accepted.
        """
        refuse_links(self.out)
        if self._has_model() and self._is_other() and not overwrite:
            raise InputError(
                f"{str(self.out)!r} holds the run of another recipe: choose another folder, "
                "or redo the stages that differ with --overwrite"
            )
        self.refuse_foreign()

    def claim(self) -> None:
        """Makes the folder and writes the recipe, unless the folder holds a finished model.

        A finished model keeps its recipe and reports until the new model is complete: `adopt`.
        """
        if not self._has_model():
            self.out.mkdir(parents=True, exist_ok=True)
            self.write_recipe()

    def adopt(self) -> None:
        """Once model/ is this recipe's: writes the recipe, and removes reports of another one."""
        if self._is_other():
            self.drop_reports()
            self.write_recipe()

    def _has_model(self) -> bool:
        return bool(fingerprints.read_state(self._stage_file("factorize")))

    def _is_other(self) -> bool:
        return not (self.out / RECIPE).is_file() or self.has_other_recipe()

    def _are_ours(self, names: set[str]) -> bool:
        ours = {locks.LOCK_FILE, RECIPE, STAGES_FOLDER, *self.reports}
        ours |= partial_names(ours)
        for stage, folder in MODEL_FOLDERS.items():
            if self._stage_file(stage).is_file():  # otherwise a user put the folder there
                ours.add(folder)
        if (self.out / STAGES_FOLDER).is_dir():
            ours |= {sample_logs.FOLDER, figures.FOLDER}
        temporary = tuple(f".{name}." for name in (*MODEL_FOLDERS.values(), figures.FOLDER))
        return all(name in ours or name.startswith(temporary) for name in names)

    def model_folder(self, stage: Stage) -> Path:
        """Where the model of a stage is, or will be."""
        return self.out / MODEL_FOLDERS[stage]

    def model_state(self, stage: Stage) -> list[list[Any]]:
        """Name, size and time of the files that decide what the model of a stage computes."""
        folder = self.model_folder(stage)
        return fingerprints.file_states([*folder.glob("*.safetensors"), folder / "config.json"])

    def has_model(self, stage: Stage, inputs: list[Any]) -> bool:
        """Whether the stage made the model that is there from equal inputs."""
        record = fingerprints.read_state(self._stage_file(stage))
        is_current = record.get("inputs") == fingerprints.digest(inputs, stage)
        return is_current and record.get("model") == self.model_state(stage)

    def make_model(self, stage: Stage, inputs: list[Any], make: Callable[[Path], object]) -> None:
        """Calls `make` with the model's folder, unless the folder has the model already."""
        if self.has_model(stage, inputs):
            return
        if not self._stage_file(stage).is_file():
            self._write_stage(stage, {})  # marks the model's folder as this run's
        make(self.model_folder(stage))
        digest = fingerprints.digest(inputs, stage)
        self._write_stage(stage, {"inputs": digest, "model": self.model_state(stage)})

    def drop_model(self, stage: Stage) -> None:
        """Removes the model of a stage that the recipe does not have."""
        shutil.rmtree(self.model_folder(stage), ignore_errors=True)
        # last: without this file the model's folder would count as a user's
        self._stage_file(stage).unlink(missing_ok=True)

    def measurement(self, name: str, kind: type[T]) -> ResultFile[T]:
        """The file of the measurement `name`, a value of type `kind`."""
        return ResultFile(self._stage_file(name), "found", kind)

    def drop_other_logs(self, models: Iterable[str]) -> None:
        """Removes the logged task samples of models that are not among `models`."""
        names = unique_file_names(models).values()
        for folder in (self.out / sample_logs.FOLDER).glob("*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)

    def _write_stage(self, stage: Stage, content: dict[str, Any]) -> None:
        file = self._stage_file(stage)
        file.parent.mkdir(exist_ok=True)
        fingerprints.write_state(file, content)

    def _stage_file(self, stage: str) -> Path:
        return self.out / STAGES_FOLDER / f"{stage}.json"
