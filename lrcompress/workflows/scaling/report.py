"""The report of a scaling study: its laws, what they mean in words, its points, and pictures."""

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
    laws,
    matched,
    paired,
    usable,
    variants,
    verdicts,
)
from lrcompress.workflows.scaling.figures import Series, picture
from lrcompress.workflows.scaling.intervals import shown
from lrcompress.workflows.scaling.point import ScalingPoint

JSON = "scaling.json"
# points of a curve in a picture
FINE = 60
LAWS = {
    "power": "log L = a - b log x",
    "offset": "L = E + exp(a - b log x)",
    "decade": "L = a - b log10 x",
}


@dataclass(frozen=True)
class ScalingReport:
    """Of the points that there are; `missing` names the others."""

    settings: ScalingSettings
    points: Sequence[ScalingPoint]
    missing: Sequence[str]
    speeds: Sequence[Metric]

    @cached_property
    def laws(self) -> list[FittedLaw]:
        return laws(self.points, self.settings.resamples)

    @cached_property
    def verdicts(self) -> list[str]:
        return list(verdicts(self.laws, self.points))

    @cached_property
    def matched(self) -> list[Matched]:
        return list(matched(self.points, self.laws))

    @cached_property
    def pictures(self) -> tuple[Picture, ...]:
        """Loss against every cost; none as long as a model is missing, or where all diverged."""
        if self.missing or not usable(self.points):
            return ()
        return tuple(
            picture(name, series(self, axis), TITLES[axis]) for name, axis in PICTURES.items()
        )

    @cached_property
    def paired(self) -> list[Paired]:
        return list(paired(self.points, self.settings.equal_flops))


def _values(report: ScalingReport) -> dict[str, Any]:
    known = {"report": report, "titles": TITLES, "laws": LAWS, "shown": shown}
    return known | {"speeds": table(report.speeds)}


def markdown(report: ScalingReport) -> str:
    return render("scaling.md.jinja", escape=False, **_values(report))


def html(report: ScalingReport) -> str:
    """One self-contained page, with the pictures in it: no network."""
    shown_too = {"title": "Scaling", "pictures": report.pictures}
    return render("scaling.html.jinja", escape=True, **_values(report), **shown_too)


def to_json(report: ScalingReport) -> str:
    content = {
        "settings": report.settings.model_dump(mode="json"),
        "points": [asdict(point) for point in report.points],
        "missing": list(report.missing),
        "laws": [_law(one) for one in report.laws],
        "verdicts": report.verdicts,
        "matched": [asdict(one) for one in report.matched],
        "paired": [asdict(one) | {"verdict": one.verdict} for one in report.paired],
        "speeds": [metric.summary() for metric in report.speeds],
    }
    return json.dumps(content, indent=2) + "\n"


def _law(one: FittedLaw) -> dict[str, Any]:
    against = None if one.against is None else asdict(one.against)
    floor = one.fit.irreducible
    return {
        "axis": one.axis,
        "law": one.fit.law,
        "variant": one.variant,
        "parameters": one.fit.parameters,
        "slope": asdict(one.fit.slope),
        "irreducible": None if floor is None else asdict(floor),
        "against_dense": against,
        "bend": None if one.bend is None else asdict(one.bend),
    }


def to_csv(report: ScalingReport) -> str:
    """One row a point."""
    text = io.StringIO()
    names = [name for name in ScalingPoint.__dataclass_fields__ if name != "curve"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: getattr(point, name) for name in names} for point in report.points)
    return text.getvalue()


# file name -> what writes it: a new format is one function and one row
FORMATS: Mapping[str, Callable[[ScalingReport], str]] = {
    "scaling.md": markdown,
    "scaling.html": html,
    JSON: to_json,
    "scaling.csv": to_csv,
}
PICTURES: Mapping[str, Axis] = {
    "loss-flops": "flops",
    "loss-parameters": "non_embedding",
    "loss-seconds": "seconds",
}


def series(report: ScalingReport, axis: Axis) -> list[Series]:
    """Of every variant along an axis, with its line of the law "decade"."""
    lines = {one.variant: one for one in report.laws if (one.axis, one.fit.law) == (axis, "decade")}
    points = usable(report.points)
    found = []
    for variant in variants(points):
        own = [point for point in points if point.variant == variant]
        x, curve = [float(getattr(point, axis)) for point in own], None
        if variant in lines:
            fine = np.geomspace(min(x), max(x), FINE)
            fit = lines[variant].fit
            curve = (fine, fit.loss(fine), *fit.band(fine))
        found.append(Series(variant, x, [point.loss for point in own], curve))
    return found


def write(folder: Path, report: ScalingReport) -> None:
    """Writes the report in every format into `folder`, each file in one rename, and figures/."""
    for name, formatted in FORMATS.items():
        replace_text(folder / name, formatted(report))
    figures.write(folder, report.pictures)
