"""The folder of a sweep: whose it is, which of its points are done, and its report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lrcompress import figures, stages, sweepreport
from lrcompress.files import replace_text
from lrcompress.points import DENSE, Point
from lrcompress.protocols import InputError
from lrcompress.recipe import Recipe, to_yaml

RECIPE, POINTS = "recipe.yaml", "points"
HIDDEN_FIGURES = f".{figures.FOLDER}."  # while they are written


@dataclass(frozen=True)
class SweepFolder:
    """One recipe's folder: recipe.yaml, points/, and the report."""

    recipe: Recipe
    out: Path

    def claim(self) -> None:
        """Makes the folder a sweep's. Raises InputError where it holds something else."""
        if self.out.exists() and not self._is_sweep():
            raise InputError(
                f"output {str(self.out)!r} exists and is no sweep: choose another name"
            )
        recipe, text = self.out / RECIPE, to_yaml(self.recipe)
        if recipe.exists() and recipe.read_text("utf-8") != text:
            for name in sweepreport.FORMATS:  # they are of other settings
                (self.out / name).unlink(missing_ok=True)
            shutil.rmtree(self.out / figures.FOLDER, ignore_errors=True)
        (self.out / POINTS).mkdir(parents=True, exist_ok=True)
        replace_text(recipe, text)

    def _is_sweep(self) -> bool:
        if not self.out.is_dir():
            return False
        names = {path.name for path in self.out.iterdir()}
        own = {RECIPE, POINTS, figures.FOLDER, *sweepreport.FORMATS}
        partial = {f".{name}.partial" for name in own}
        left = {name for name in names - own - partial if not name.startswith(HIDDEN_FIGURES)}
        return not names or (POINTS in names and not left)

    def point(
        self, variant: str, keep_ratio: float, inputs: Any, make: Callable[[], Point]
    ) -> Point:
        """The point if the folder has it, made of the same inputs; else it is made, and kept."""
        name = DENSE if variant == DENSE else f"{variant}-{keep_ratio:g}"
        file = self.out / POINTS / f"{name}.json"
        digest = stages.digest([inputs, keep_ratio])
        known = stages.read(file)
        if known.get("inputs") != digest:
            known = {"inputs": digest, "point": asdict(make())}
            stages.write(file, known)
        return Point.from_dict(known["point"])

    def write(self, points: Sequence[Point]) -> None:
        sweepreport.write(self.out, self.recipe.model.source, points)
