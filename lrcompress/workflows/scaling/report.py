"""The report of a scaling study in every format: laws, verdicts in words, points and pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lrcompress.config.scaling import ScalingSettings
from lrcompress.reporting import figures
from lrcompress.reporting.figures import Picture
from lrcompress.reporting.intervals import shown
from lrcompress.reporting.metric import Metric
from lrcompress.reporting.render import render
from lrcompress.reporting.tables import table
from lrcompress.runtime.atomic_io import replace_text
from lrcompress.workflows.scaling.comparison import (
    TITLES,
    Axis,
    FittedLaw,
    Matched,
    Paired,
    costs,
    fit_laws,
    losses,
    match_costs,
    pair_equal_flops,
    points_of,
    usable,
    variants,
    verdicts,
)
from lrcompress.workflows.scaling.figures import Series, picture
from lrcompress.workflows.scaling.point import ScalingPoint

JSON = "scaling.json"
# points at which a picture's curves are drawn
CURVE_POINTS = 60
# law -> its formula, as reports show it
FORMULAS = {
    "power": "log L = a - b log x",
    "offset": "L = E + exp(a - b log x)",
    "decade": "L = a - b log10 x",
}


@dataclass(frozen=True)
class ScalingReport:
    """The trained points of a study; `missing` names the models that are not trained yet."""

    settings: ScalingSettings
    points: Sequence[ScalingPoint]
    missing: Sequence[str]
    speeds: Sequence[Metric]

    @cached_property
    def laws(self) -> list[FittedLaw]:
        return fit_laws(self.points, self.settings.resamples)

    @cached_property
    def verdicts(self) -> list[str]:
        return list(verdicts(self.laws, self.points))

    @cached_property
    def matched(self) -> list[Matched]:
        return list(match_costs(self.points, self.laws))

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        """Loss against every cost; empty while a model is missing, or where all diverged."""
        if self.missing or not usable(self.points):
            return ()
        return tuple(
            picture(name, series(self, axis), TITLES[axis]) for name, axis in PICTURES.items()
        )

    @cached_property
    def paired(self) -> list[Paired]:
        return list(pair_equal_flops(self.points, self.settings.equal_flops))


def _template_values(report: ScalingReport) -> dict[str, Any]:
    return {
        "report": report,
        "titles": TITLES,
        "laws": FORMULAS,
        "shown": shown,
        "speeds": table(report.speeds),
    }


def markdown(report: ScalingReport) -> str:
    """scaling.md."""
    return render("scaling.md.jinja", escape=False, **_template_values(report))


def html(report: ScalingReport) -> str:
    """One self-contained page with the pictures in it, which loads nothing from the network."""
    page = {"title": "Scaling", "pictures": report.pictures}
    return render("scaling.html.jinja", escape=True, **_template_values(report), **page)


def to_json(report: ScalingReport) -> str:
    """scaling.json: settings, points, and everything that is derived from them."""
    content = {
        "settings": report.settings.model_dump(mode="json"),
        "points": [asdict(point) for point in report.points],
        "missing": list(report.missing),
        "laws": [_law_content(law) for law in report.laws],
        "verdicts": report.verdicts,
        "matched": [asdict(matched) for matched in report.matched],
        "paired": [asdict(pair) | {"verdict": pair.verdict} for pair in report.paired],
        "speeds": [metric.summary() for metric in report.speeds],
    }
    return json.dumps(content, indent=2) + "\n"


def _law_content(law: FittedLaw) -> dict[str, Any]:
    irreducible = law.fit.irreducible
    return {
        "axis": law.axis,
        "law": law.fit.law,
        "variant": law.variant,
        "parameters": law.fit.parameters,
        "slope": asdict(law.fit.slope),
        "irreducible": None if irreducible is None else asdict(irreducible),
        "against_dense": None if law.against is None else asdict(law.against),
        "bend": None if law.bend is None else asdict(law.bend),
    }


def to_csv(report: ScalingReport) -> str:
    """scaling.csv: one row for each point."""
    text = io.StringIO()
    names = [name for name in ScalingPoint.__dataclass_fields__ if name != "curve"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: getattr(point, name) for name in names} for point in report.points)
    return text.getvalue()


# file name -> function that gives its text
FORMATS: Mapping[str, Callable[[ScalingReport], str]] = {
    "scaling.md": markdown,
    "scaling.html": html,
    JSON: to_json,
    "scaling.csv": to_csv,
}
# file name of a picture -> its axis
PICTURES: Mapping[str, Axis] = {
    "loss-flops": "flops",
    "loss-parameters": "non_embedding",
    "loss-seconds": "seconds",
}


def series(report: ScalingReport, axis: Axis) -> list[Series]:
    """The points of every variant along an axis, and the curve of its law "decade"."""
    lines = {
        law.variant: law.fit for law in report.laws if law.axis == axis and law.fit.law == "decade"
    }
    points = usable(report.points)
    plotted = []
    for variant in variants(points):
        of_variant = points_of(points, variant)
        x, curve = [float(cost) for cost in costs(of_variant, axis)], None
        if variant in lines:
            line, curve_x = lines[variant], np.geomspace(min(x), max(x), CURVE_POINTS)
            curve = (curve_x, line.loss(curve_x), *line.band(curve_x))
        plotted.append(Series(variant, x, losses(of_variant), curve))
    return plotted


def write(folder: Path, report: ScalingReport) -> None:
    """Writes the report in every format into `folder`, each file in one rename, and figures/."""
    for name, formatted in FORMATS.items():
        replace_text(folder / name, formatted(report))
    figures.write(folder, report.pictures)
