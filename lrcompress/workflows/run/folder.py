"""The folder of a run: whose it is, and which of its stages are done."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lrcompress.checkpoint import fingerprints
from lrcompress.config.recipe import Recipe, to_yaml
from lrcompress.evaluation.tasks import sample_logs
from lrcompress.reporting import figures, report
from lrcompress.runtime import locks
from lrcompress.runtime.atomic_io import replace_text
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import refuse_links, unique_file_names

T = TypeVar("T")

RECIPE, MODEL, FINETUNED, STAGES = "recipe.yaml", "model", "finetuned", "stages"
# stage that makes a model -> the model's folder
MADE: dict[fingerprints.Stage, str] = {"factorize": MODEL, "finetune": FINETUNED}


@dataclass(frozen=True)
class RunFolder:
    """One recipe's folder: recipe.yaml, model/, finetuned/, stages/, samples/, and the report."""

    recipe: Recipe
    out: Path

    def refuse_other(self, overwrite: bool) -> None:
        """Raises InputError where the folder holds a finished model of another recipe, or
        something that is no run at all, or a link."""
        refuse_links(self.out)
        if self._is_taken() and self._is_other() and not overwrite:
            raise InputError(
                f"{str(self.out)!r} holds the run of another recipe: choose another folder, "
                "or redo the stages that differ with --overwrite"
            )
        if self.out.exists() and not self._is_run():
            raise InputError(f"output {str(self.out)!r} exists and is no run: choose another name")

    def claim(self) -> None:
        """Makes the folder this recipe's, unless there is a finished model to be kept until the
        new one is whole."""
        if not self._is_taken():
            self.out.mkdir(parents=True, exist_ok=True)
            replace_text(self.out / RECIPE, to_yaml(self.recipe))

    def adopt(self) -> None:
        """Makes the folder this recipe's, now that model/ is; reports of another go."""
        if self._is_other():
            for name in report.FORMATS:
                (self.out / name).unlink(missing_ok=True)
            shutil.rmtree(self.out / figures.FOLDER, ignore_errors=True)
            replace_text(self.out / RECIPE, to_yaml(self.recipe))

    def _is_taken(self) -> bool:
        return bool(fingerprints.read_state(self._file("factorize")))

    def _is_run(self) -> bool:
        if not self.out.is_dir():
            return False
        own = {locks.INSIDE, RECIPE, STAGES, *report.FORMATS}
        own |= {f".{name}.partial" for name in own}  # of a process that was killed
        for stage, folder in MADE.items():
            if self._file(stage).is_file():  # else somebody put it there by hand
                own.add(folder)
        if (self.out / STAGES).is_dir():
            own |= {sample_logs.FOLDER, figures.FOLDER}
        hidden = tuple(f".{name}." for name in (*MADE.values(), figures.FOLDER))
        return all(p.name in own or p.name.startswith(hidden) for p in self.out.iterdir())

    def _is_other(self) -> bool:
        file = self.out / RECIPE
        return not file.is_file() or file.read_bytes() != to_yaml(self.recipe).encode()

    def model(self, stage: fingerprints.Stage) -> Path:
        """Where the model of a stage is, or will be."""
        return self.out / MADE[stage]

    def weights(self, stage: fingerprints.Stage) -> list[list[Any]]:
        """Of the files that decide what the model of a stage computes."""
        folder = self.model(stage)
        return fingerprints.file_states([*folder.glob("*.safetensors"), folder / "config.json"])

    def is_made(self, stage: fingerprints.Stage, inputs: list[Any]) -> bool:
        """Whether the stage made the model that is there, of equal inputs."""
        known = fingerprints.read_state(self._file(stage))
        made = known.get("inputs") == fingerprints.digest(inputs, stage)
        return made and known.get("model") == self.weights(stage)

    def make(
        self, stage: fingerprints.Stage, inputs: list[Any], action: Callable[[Path], object]
    ) -> None:
        """Has the model of a stage made by `action`, unless it is there already."""
        if not self.is_made(stage, inputs):
            if not self._file(stage).is_file():
                self._write(stage, {})  # what will be there is the run's own
            action(self.model(stage))
            known = {"inputs": fingerprints.digest(inputs, stage), "model": self.weights(stage)}
            self._write(stage, known)

    def drop(self, stage: fingerprints.Stage) -> None:
        """Removes the model of a stage that the recipe does not have."""
        shutil.rmtree(self.model(stage), ignore_errors=True)
        self._file(stage).unlink(missing_ok=True)  # last: without it the folder is nobody's

    def measured(self, stage: str, inputs: list[Any], kind: type[T], action: Callable[[], T]) -> T:
        """What a stage found, of type `kind`, from its file if its inputs are those of the last
        time."""
        known, mark = (
            fingerprints.read_state(self._file(stage)),
            fingerprints.digest(inputs, "evaluate", "benchmark"),
        )
        found = TypeAdapter(kind)
        if known.get("inputs") == mark and "found" in known:
            with suppress(ValidationError):  # a damaged one is made again
                return found.validate_python(known["found"])
        made = found.dump_python(action(), mode="json")
        self._write(stage, {"inputs": mark, "found": made})
        return found.validate_python(made)

    def keep_logs(self, models: Iterable[str]) -> None:
        """Removes what models that are not among `models` were asked and answered."""
        kept = unique_file_names(models).values()
        for found in (self.out / sample_logs.FOLDER).glob("*"):
            if found.name not in kept:
                shutil.rmtree(found, ignore_errors=True)

    def _write(self, stage: str, content: dict[str, Any]) -> None:
        file = self._file(stage)
        file.parent.mkdir(exist_ok=True)
        fingerprints.write_state(file, content)

    def _file(self, stage: str) -> Path:
        return self.out / STAGES / f"{stage}.json"
