"""The folder of a scaling study: the tokenizer, the trained points, and the report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.fingerprints import Stage
from lrcompress.config.recipe import ScalingRecipe
from lrcompress.reporting import figures
from lrcompress.reporting.metric import Metric
from lrcompress.runtime import locks
from lrcompress.runtime.atomic_io import discard, writing
from lrcompress.runtime.errors import InputError
from lrcompress.workflows.scaling import report as scaling_report
from lrcompress.workflows.scaling.point import ScalingPoint
from lrcompress.workflows.scaling.report import ScalingReport
from lrcompress.workflows.work_folder import RECIPE, ResultFile, WorkFolder

POINTS, TOKENIZER, CHECKPOINTS, SPEED = "points", "tokenizer", "training", "speed.json"
# a low-rank model begins as a factorization, and FLOPs are counted
POINT_STAGES: tuple[Stage, ...] = ("pretrain", "factorize", "benchmark")
SPEED_STAGES: tuple[Stage, ...] = ("benchmark",)


def refuse_studies(folders: Iterable[Path]) -> None:
    """Raises InputError where one of `folders` has the report of a scaling study."""
    for folder in folders:
        if (folder / scaling_report.JSON).is_file():
            raise InputError(
                f"{str(folder)!r} is a scaling study: read its scaling.md or scaling.html, which "
                "lrcompress scaling writes anew"
            )


@dataclass(frozen=True)
class ScalingFolder(WorkFolder):
    """One recipe's folder: recipe.yaml, tokenizer/, points/, and the report.

    While a model trains, its checkpoints are in training/.
    """

    recipe: ScalingRecipe

    kind = "scaling study"
    reports = tuple(scaling_report.FORMATS)
    results = POINTS

    def _are_ours(self, names: set[str]) -> bool:
        ours = {RECIPE, POINTS, TOKENIZER, CHECKPOINTS, figures.FOLDER, *self.reports}
        if any(name not in ours and not name.startswith(".") for name in names):
            return False
        return POINTS in names or not names

    @property
    def tokenizer(self) -> Path:
        """The folder of the tokenizer for the texts and the vocabulary that the recipe names."""
        settings = self.recipe.pretrain
        sources = [settings.tokenizer, settings.vocab_size, *settings.data]
        texts = [fingerprints.data_state(spec) for spec in settings.data]
        digest = fingerprints.digest([sources, texts], "pretrain")
        return self.out / TOKENIZER / digest[:16]

    def save_tokenizer(self, tokenizer: Any) -> None:
        """Writes the tokenizer that all points and all shards use."""
        with writing(self.tokenizer) as folder:
            tokenizer.save_pretrained(folder)

    def text_state(self) -> list[Any]:
        """The state of everything that the token sequences come from."""
        file = self.tokenizer / "tokenizer.json"
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        specs = (*self.recipe.pretrain.data, *self.recipe.scaling.test)
        return [sha256, list(specs), [fingerprints.data_state(spec) for spec in specs]]

    def point(self, name: str, inputs: Any, train: Callable[[Path], ScalingPoint]) -> None:
        """Trains the point `name` and stores it, unless the folder has it for `inputs`.

        `train` gets a folder for its checkpoints, which is removed once the point is stored.
        """
        file = self._point_file(name)
        if file.read(inputs, POINT_STAGES) is not None:
            return
        digest = fingerprints.digest(inputs, *POINT_STAGES)
        checkpoints = self.out / CHECKPOINTS / f"{name}-{digest[:16]}"
        with locks.beside(checkpoints, replace=True):  # another shard may train the same point
            file.cached(inputs, POINT_STAGES, partial(train, checkpoints))
            discard(checkpoints, checkpoints)

    def _point_file(self, name: str) -> ResultFile[ScalingPoint]:
        return ResultFile(self.out / POINTS / f"{name}.json", "point", ScalingPoint)

    def speeds(self, inputs: Any, measure: Callable[[], list[Metric]]) -> None:
        """Measures and stores the training speeds, unless the folder has them for `inputs`."""
        self._speed_file.cached(inputs, SPEED_STAGES, measure)

    @property
    def _speed_file(self) -> ResultFile[list[Metric]]:
        return ResultFile(self.out / POINTS / SPEED, "metrics", list[Metric])

    def write(self, inputs: Mapping[str, Any], speed_inputs: Any) -> list[ScalingPoint]:
        """Writes the report of the points that are there, and returns them.

        `inputs` are those of every point of the ladder, by the point's name.
        """
        points, missing = list[ScalingPoint](), list[str]()
        for name, point_inputs in inputs.items():
            point = self._point_file(name).read(point_inputs, POINT_STAGES)
            if point is None:
                missing.append(name)
            else:
                points.append(point)
        speeds = self._speed_file.read(speed_inputs, SPEED_STAGES) or []
        report = ScalingReport(self.recipe.scaling, points, missing, speeds)
        scaling_report.write(self.out, report)
        return points
