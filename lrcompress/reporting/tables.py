"""What reports and model cards show: metrics as one table, the texts of a model, its history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import PurePath

from lrcompress.reporting.metric import Summary

# conditions that may differ between two models whose numbers are still worth a ratio
COMPARABLE = {"dtype", "device"}
QUESTIONS = "questions"
# conditions that identify what was asked: they decide what is comparable, and nobody reads them
HASHES = {"sha256", QUESTIONS}
# what is left of a difference of equal numbers
ROUNDING = 1e-15


@dataclass(frozen=True)
class Row:
    """One metric across models: cells of text, and the ratio of each later model to the first."""

    title: str
    better: str
    cells: tuple[str, ...]
    ratios: tuple[str, ...]
    conditions: str


@dataclass(frozen=True)
class Table:
    labels: tuple[str, ...]
    rows: tuple[Row, ...]


def table(metrics: Sequence[Summary]) -> Table:
    """Models as columns in the order in which they were measured, metrics as rows."""
    labels = tuple(dict.fromkeys(m.model for m in metrics))
    groups: dict[tuple[str, object], dict[str, Summary]] = {}
    for metric in metrics:
        groups.setdefault((metric.name, metric.conditions.get("data")), {})[metric.model] = metric
    return Table(labels, tuple(_row(labels, by_model) for by_model in groups.values()))


def labels(kinds: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Distinct column titles of a report: the kind of model where it is the only one of its kind,
    else with the name of its folder or file, the whole source, or a number."""
    short = [f"{one} {PurePath(source).name}" for one, source in zip(kinds, sources, strict=True)]
    whole = [f"{one} {source}" for one, source in zip(kinds, sources, strict=True)]
    found = list(kinds)
    for longer in (short, whole, [f"{name} {i}" for i, name in enumerate(whole, 1)]):
        counts = Counter(found)
        clash = {one for one, name in zip(kinds, found, strict=True) if counts[name] > 1}
        found = [
            better if one in clash else name
            for one, name, better in zip(kinds, found, longer, strict=True)
        ]
    return found


def title(metric: Summary) -> str:
    data = metric.conditions.get("data")
    return metric.name + (f", {data}" if data else "")


def comparable(base: Summary, metric: Summary) -> bool:
    both = {*base.conditions.items()} ^ {*metric.conditions.items()}
    return not {name for name, _ in both} - COMPARABLE


def _row(labels: Sequence[str], by_model: Mapping[str, Summary]) -> Row:
    first = next(iter(by_model.values()))
    base = by_model.get(labels[0])
    unit = f" ({first.unit})" if first.unit else ""
    return Row(
        title(first) + unit,
        "higher is better" if first.higher_is_better else "lower is better",
        tuple(cell(by_model.get(label)) for label in labels),
        tuple(_ratio(base, by_model.get(label)) for label in labels[1:]),
        conditions(by_model),
    )


def conditions(by_model: Mapping[str, Summary]) -> str:
    """The conditions of a row, once if all models share them, else model by model.

    The hash of a text is left to `texts`, that of a task's questions is not shown.
    """
    words = {
        label: ", ".join(
            f"{k.replace('_', ' ')} {v}" for k, v in metric.conditions.items() if k not in HASHES
        )
        for label, metric in by_model.items()
    }
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return "; ".join(f"{label}: {text}" for label, text in words.items())


def cell(metric: Summary | None) -> str:
    if metric is None:
        return "–"
    spread = ""
    if metric.low is not None and metric.high is not None:
        spread = f" ({number(metric.low)}–{number(metric.high)})"
    return number(metric.value) + spread


def number(value: float) -> str:
    if not isfinite(value):
        return str(value)
    value = 0.0 if abs(value) < ROUNDING else value
    if value == int(value) and abs(value) >= 1000:
        return f"{int(value):,}"
    if abs(value) >= 1e6:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _ratio(base: Summary | None, metric: Summary | None) -> str:
    if base is None or metric is None or base.value == 0:
        return "–"
    if not (isfinite(base.value) and isfinite(metric.value)):
        return "–"
    if not comparable(base, metric):
        return "not comparable"
    return f"{metric.value / base.value:.3g}x"
