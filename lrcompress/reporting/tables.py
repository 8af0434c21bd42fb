"""Metrics of several models as one table of text, for reports and model cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import PurePath
from statistics import median

from lrcompress.reporting.metric import Summary, title
from lrcompress.reporting.render import nonfinite_to_text
from lrcompress.reporting.task_groups import Place, places

# conditions that may differ between two metrics that are still comparable
MAY_DIFFER = {"dtype", "device"}
QUESTIONS = "questions"
# conditions that identify the text or the questions: they decide what is comparable, and tables do
# not show them
HASHES = {"sha256", QUESTIONS}
# a smaller absolute value is a rounding error of 0
ROUNDING_ERROR = 1e-15


@dataclass(frozen=True)
class MetricRow:
    """One metric of all models: a cell for each, and the ratio of each later one to the first."""

    name: str
    """The name of the metric and its text, as comparisons have it."""
    title: str
    """The name with its unit."""
    better: str
    cells: tuple[str, ...]
    ratios: tuple[str, ...]
    conditions: str
    place: Place


@dataclass(frozen=True)
class MetricTable:
    labels: tuple[str, ...]
    """The models: titles of the columns."""
    rows: tuple[MetricRow, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """The outermost groups of tasks that rows are parts of."""
        return tuple(dict.fromkeys(row.place.group for row in self.rows if row.place.group))

    def rows_in(self, group: str = "") -> tuple[MetricRow, ...]:
        """The parts of an outermost group, however deep; of "" the rows that are no part."""
        return tuple(row for row in self.rows if row.place.group == group)

    def names_in(self, group: str = "") -> tuple[str, ...]:
        """The names of `rows_in`."""
        return tuple(row.name for row in self.rows_in(group))


def table(metrics: Sequence[Summary]) -> MetricTable:
    """A column for each model, a row for each metric and text, in the order of `places`."""
    labels = tuple(dict.fromkeys(m.model for m in metrics))
    place_of = places(metrics)
    rows: dict[str, dict[str, Summary]] = {name: {} for name in place_of}
    for metric in metrics:
        rows[title(metric)][metric.model] = metric
    return MetricTable(
        labels, tuple(_row(labels, rows[name], place) for name, place in place_of.items())
    )


def labels(kinds: Sequence[str], sources: Sequence[str]) -> list[str]:
    """A distinct column title for each model.

    A title is the kind of the model if no other model has it. Otherwise all models of the kind add
    the name of their folder or file; if that is not distinct, the whole source; else also a number.
    """
    names = [f"{kind} {PurePath(source).name}" for kind, source in zip(kinds, sources, strict=True)]
    paths = [f"{kind} {source}" for kind, source in zip(kinds, sources, strict=True)]
    numbered = [f"{path} {number}" for number, path in enumerate(paths, 1)]
    titles = list(kinds)
    for longer_titles in (names, paths, numbered):
        counts = Counter(titles)
        ambiguous = {kind for kind, text in zip(kinds, titles, strict=True) if counts[text] > 1}
        titles = [
            longer if kind in ambiguous else text
            for kind, text, longer in zip(kinds, titles, longer_titles, strict=True)
        ]
    return titles


def comparable(base: Summary, metric: Summary) -> bool:
    """Whether both were measured under the same conditions; dtype and device may differ."""
    differing = {*base.conditions.items()} ^ {*metric.conditions.items()}
    return not {name for name, _ in differing} - MAY_DIFFER


def _row(labels: Sequence[str], by_model: Mapping[str, Summary], place: Place) -> MetricRow:
    first = next(iter(by_model.values()))
    base = by_model.get(labels[0])
    unit = f" ({first.unit})" if first.unit else ""
    return MetricRow(
        name=title(first),
        title=title(first) + unit,
        better="higher is better" if first.higher_is_better else "lower is better",
        cells=tuple(cell(by_model.get(label)) for label in labels),
        ratios=tuple(_ratio(base, by_model.get(label)) for label in labels[1:]),
        conditions=conditions(by_model),
        place=place,
    )


def conditions(by_model: Mapping[str, Summary]) -> str:
    """The conditions of one metric as text: once if all models share them, else for each model.

    Hashes are not shown.
    """
    texts = {
        label: ", ".join(
            f"{k.replace('_', ' ')} {v}" for k, v in metric.conditions.items() if k not in HASHES
        )
        for label, metric in by_model.items()
    }
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{label}: {text}" for label, text in texts.items())


def cell(metric: Summary | None) -> str:
    """The value as text, with its range in brackets where it has one; – for None."""
    if metric is None:
        return "–"
    spread = ""
    if metric.low is not None and metric.high is not None and isfinite(metric.value):
        spread = f" ({number(metric.low)}–{number(metric.high)})"
    return number(metric.value) + spread


def number(value: float) -> str:
    """Four significant digits below 10,000, no decimals above; whole numbers in full from 1000.

    NaN, Infinity and -Infinity are written as in JSON.
    """
    if not isfinite(value):
        return str(nonfinite_to_text(float(value)))
    value = 0.0 if abs(value) < ROUNDING_ERROR else value
    if value == int(value) and abs(value) >= 1000:
        return f"{int(value):,}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _ratio(base: Summary | None, metric: Summary | None) -> str:
    if base is None or metric is None or base.value == 0:
        return "–"
    if not (isfinite(base.value) and isfinite(metric.value)):
        return "–"
    if not comparable(base, metric):
        return "not comparable"
    if base.rounds and metric.rounds and len(base.rounds) == len(metric.rounds):
        return _ratio_of_rounds(base.rounds, metric.rounds)
    return f"{metric.value / base.value:.3g}x"


def _ratio_of_rounds(base: Sequence[float], values: Sequence[float]) -> str:
    """The median ratio of a round, with the lowest and the highest."""
    ratios = sorted(value / each for each, value in zip(base, values, strict=True))
    return f"{median(ratios):.3g}x ({ratios[0]:.3g}–{ratios[-1]:.3g})"
