"""The folder of a sweep: whose it is, which of its points are done, and its report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lrcompress.checkpoint import fingerprints
from lrcompress.config.field_types import variant_name
from lrcompress.config.recipe import Recipe, to_yaml
from lrcompress.reporting import figures, metrics_json
from lrcompress.runtime import locks
from lrcompress.runtime.atomic_io import replace_text, writing
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import check_free, refuse_links
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep import sweep_json
from lrcompress.workflows.sweep.point import DENSE, PointSummary, SweepPoint
from lrcompress.workflows.sweep.report import SweepReport

RECIPE, POINTS = "recipe.yaml", "points"
POINT_STAGES: tuple[fingerprints.Stage, ...] = ("factorize", "evaluate", "benchmark")
HIDDEN_FIGURES = f".{figures.FOLDER}."  # while they are written


@dataclass(frozen=True)
class SweepFolder:
    """One recipe's folder: recipe.yaml, points/, and the report."""

    recipe: Recipe
    out: Path

    def refuse_other(self) -> None:
        """Raises InputError for a link in the folder, or where it holds something else."""
        refuse_links(self.out)
        if self.out.exists() and not self._is_sweep():
            raise InputError(
                f"output {str(self.out)!r} exists and is no sweep: choose another name"
            )

    def claim(self) -> None:
        """Makes the folder a sweep's."""
        self.refuse_other()
        recipe, text = self.out / RECIPE, to_yaml(self.recipe)
        if recipe.exists() and recipe.read_bytes() != text.encode():
            self._drop_reports()
        (self.out / POINTS).mkdir(parents=True, exist_ok=True)
        replace_text(recipe, text)

    def _drop_reports(self) -> None:
        """Those of other settings or inputs: a report is of the points that are there."""
        for name in sweep_report.FORMATS:
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.out / figures.FOLDER, ignore_errors=True)

    def _is_sweep(self) -> bool:
        if not self.out.is_dir():
            return False
        names = {path.name for path in self.out.iterdir()}
        own = {RECIPE, POINTS, figures.FOLDER, locks.INSIDE, *sweep_report.FORMATS}
        partial = {f".{name}.partial" for name in own}
        left = {name for name in names - own - partial if not name.startswith(HIDDEN_FIGURES)}
        return not left and (POINTS in names or names <= {locks.INSIDE})

    def point(
        self, variant: str, keep_ratio: float, inputs: Any, make: Callable[[], SweepPoint]
    ) -> SweepPoint:
        """The point if the folder has it, made of the same inputs; else it is made, and kept."""
        file = _file(self.out, variant, keep_ratio)
        digest = fingerprints.digest([inputs, keep_ratio], *POINT_STAGES)
        known = fingerprints.read(file)
        if known.get("inputs") == digest:
            with suppress(KeyError, TypeError):  # a damaged one is made again
                return SweepPoint.from_dict(known["point"])
        if known:
            self._drop_reports()
        made = asdict(make())
        fingerprints.write(file, {"inputs": digest, "point": made})
        return SweepPoint.from_dict(made)

    def write(self, points: Sequence[SweepPoint]) -> SweepReport:
        report = SweepReport(self.recipe.model.source, tuple(points))
        sweep_report.write(self.out, report)
        return report


def _file(out: Path, variant: str, keep_ratio: float) -> Path:
    name = DENSE if variant == DENSE else f"{variant}-{keep_ratio:g}"
    return out / POINTS / f"{name}.json"


def is_sweep(folder: Path) -> bool:
    return (folder / POINTS).is_dir() or (folder / sweep_json.SWEEP).is_file()


def read_report(folder: Path) -> SweepReport:
    """The report in `folder`, with the samples of its points.

    Raises InputError where there is no report, or a point of it is missing or damaged.
    """
    known = metrics_json.read(sweep_json.Sweep, folder / sweep_json.SWEEP)
    for one in known.points:
        _check_name(folder / sweep_json.SWEEP, one.variant)
    return SweepReport(known.source, tuple(_point(folder, one) for one in known.points))


def _check_name(file: Path, variant: str) -> None:
    """Raises InputError for a name that could lead to another folder."""
    try:
        if variant != DENSE:
            variant_name(variant)
    except ValueError as error:
        raise InputError(f"{str(file)!r} is damaged ({error}): run the sweep again") from None


def _point(folder: Path, summary: PointSummary) -> SweepPoint:
    file = _file(folder, summary.variant, summary.keep_ratio)
    try:
        return TypeAdapter(SweepPoint).validate_python(fingerprints.read(file).get("point"))
    except ValidationError:
        raise InputError(
            f"{str(file)!r} is missing or damaged: give the folder of the sweep itself, and run "
            "the sweep again to have the point made anew"
        ) from None


def sweep_report_to(folders: Sequence[Path], out: Path | None = None) -> SweepReport:
    """The report of a sweep, once more in `out`, if given.

    Raises InputError where there is another folder, or no report that can be read.
    """
    if len(folders) > 1:
        raise InputError(
            f"the report of a sweep cannot be joined with others: give {str(folders[0])!r} alone"
        )
    if out is not None:
        check_free(out)
    with metrics_json.refuse_inconsistent(folders):
        found = read_report(folders[0])
        if out is None:
            sweep_report.markdown(found)
        else:
            with writing(out) as partial:
                sweep_report.write(partial, found)
    return found
