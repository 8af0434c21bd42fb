"""The folder of a sweep: the measured points, and the report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lrcompress.checkpoint import fingerprints
from lrcompress.checkpoint.fingerprints import Stage
from lrcompress.config.field_types import variant_name
from lrcompress.config.recipe import Recipe
from lrcompress.reporting import figures, metrics_json
from lrcompress.runtime import locks
from lrcompress.runtime.atomic_io import writing
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.paths import check_free
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep import sweep_json
from lrcompress.workflows.sweep.point import DENSE, PointSummary, SweepPoint
from lrcompress.workflows.sweep.report import SweepReport
from lrcompress.workflows.work_folder import RECIPE, ResultFile, WorkFolder, partial_names

POINTS = "points"
DENSE_STAGES: tuple[Stage, ...] = ("evaluate", "tasks", "benchmark")
COMPRESSED_STAGES: tuple[Stage, ...] = ("factorize", *DENSE_STAGES)


@dataclass(frozen=True)
class SweepFolder(WorkFolder):
    """One recipe's folder: recipe.yaml, points/, and the report."""

    recipe: Recipe

    kind = "sweep"
    reports = tuple(sweep_report.FORMATS)
    results = POINTS

    def _are_ours(self, names: set[str]) -> bool:
        ours = {RECIPE, POINTS, figures.FOLDER, locks.LOCK_FILE, *self.reports}
        ours |= partial_names(ours)
        half_written = f".{figures.FOLDER}."
        if any(name not in ours and not name.startswith(half_written) for name in names):
            return False
        return POINTS in names or names <= {locks.LOCK_FILE}

    def dense_point(
        self, name: str, inputs: list[Any], make: Callable[[], SweepPoint]
    ) -> SweepPoint:
        """A point of the dense model; `make` makes it, unless the folder has it for `inputs`."""
        return self._cached(_point_file(self.out, name, 1.0), [inputs, 1.0], DENSE_STAGES, make)

    def point(
        self, variant: str, keep_ratio: float, inputs: list[Any], make: Callable[[], SweepPoint]
    ) -> SweepPoint:
        """A compressed point; `make` makes it, unless the folder has it for `inputs`."""
        file = _point_file(self.out, variant, keep_ratio)
        return self._cached(file, [inputs, keep_ratio], COMPRESSED_STAGES, make)

    def _cached(
        self,
        file: ResultFile[SweepPoint],
        inputs: list[Any],
        stages: Collection[Stage],
        make: Callable[[], SweepPoint],
    ) -> SweepPoint:
        def make_anew() -> SweepPoint:
            if fingerprints.read_state(file.path):
                self.drop_reports()  # they show the point that is replaced
            return make()

        return file.cached(inputs, stages, make_anew)

    def write(self, points: Sequence[SweepPoint]) -> SweepReport:
        """Writes the report of `points`, and returns it."""
        report = SweepReport(self.recipe.model.source, tuple(points))
        sweep_report.write(self.out, report)
        return report


def _point_file(out: Path, variant: str, keep_ratio: float) -> ResultFile[SweepPoint]:
    name = DENSE if variant == DENSE else f"{variant}-{keep_ratio:g}"
    return ResultFile(out / POINTS / f"{name}.json", "point", SweepPoint)


def is_sweep(folder: Path) -> bool:
    """Whether `folder` holds the points or the report of a sweep."""
    return (folder / POINTS).is_dir() or (folder / sweep_json.SWEEP).is_file()


def read_report(folder: Path) -> SweepReport:
    """The report in `folder`, with the samples of its points.

    Raises InputError where there is no report, or one of its points is missing or damaged.
    """
    file = folder / sweep_json.SWEEP
    content = metrics_json.read(sweep_json.Sweep, file)
    for summary in content.points:
        _check_name(file, summary.variant)
    return SweepReport(
        content.source, tuple(_read_point(folder, summary) for summary in content.points)
    )


def _check_name(file: Path, variant: str) -> None:
    """Raises InputError for a name that could lead to another folder."""
    try:
        if variant != DENSE:
            variant_name(variant)
    except ValueError as error:
        raise InputError(f"{str(file)!r} is damaged ({error}): run the sweep again") from None


def _read_point(folder: Path, summary: PointSummary) -> SweepPoint:
    file = _point_file(folder, summary.variant, summary.keep_ratio)
    try:
        return file.stored()
    except ValidationError:
        raise InputError(
            f"{str(file.path)!r} is missing or damaged: give the folder of the sweep itself, and "
            "run the sweep again to have the point made anew"
        ) from None


def sweep_report_to(folders: Sequence[Path], out: Path | None = None) -> SweepReport:
    """Reads the report of the sweep in `folders`; writes it again to a new folder `out`, if given.

    Raises InputError for several folders, and where there is no report that can be read.
    """
    if len(folders) > 1:
        raise InputError(
            f"the report of a sweep cannot be joined with others: give {str(folders[0])!r} alone"
        )
    if out is not None:
        check_free(out)
    with metrics_json.refuse_inconsistent(folders):
        report = read_report(folders[0])
        if out is None:
            sweep_report.markdown(report)  # fails here if the numbers cannot be shown
        else:
            with writing(out) as partial:
                sweep_report.write(partial, report)
    return report
