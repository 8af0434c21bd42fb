"""What reports and model cards show: metrics as one table, the texts of a model, its history."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import PurePath
from typing import Any

from lrcompress.reporting.metric import PUBLISHED, Summary

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


@dataclass(frozen=True)
class Text:
    """Tokens that a model met, and for what."""

    __pydantic_config__ = PUBLISHED

    use: str
    """calibration, training or evaluation."""
    data: str
    """The text as it was named; several with commas between them."""
    tokens: int
    """Of an evaluation those that were predicted, of a training all that were read."""
    sha256: str
    """Of the tokens: equal hashes mean equal tokens."""


def texts(metrics: Sequence[Summary], record: Mapping[str, Any] | None) -> tuple[Text, ...]:
    """Of calibration and training, as `record` (lrcompress.json) names them, and of evaluation."""
    found = [text for part in history(record or {}) for text in _made_of(part)]
    for metric in metrics:
        if mark := metric.conditions.get("sha256"):
            data, tokens = str(metric.conditions["data"]), int(str(metric.conditions["tokens"]))
            found.append(Text("evaluation", data, tokens, str(mark)))
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class Training:
    """What is shown of a training: its texts, and title -> value of everything else.

    Seconds are of the process that ended it, its measurements and checkpoints included.
    """

    how: str
    text: str
    values: Mapping[str, str]


# part of a record -> how a model was trained that has it; the latest training first
TRAININGS = {"finetuned": "Trained towards the dense model", "pretrained": "Trained from scratch"}


def training(record: Mapping[str, Any]) -> Training | None:
    """Of the latest training in `record`, if there was one."""
    key = next((key for key in TRAININGS if record.get(key)), None)
    if key is None:
        return None
    done = record[key]
    rate, asked = done["tokens_per_second"], done["settings"]
    values = {
        "steps": f"{done['steps']:,}",
        "tokens": f"{done['tokens']:,}",
        "learning rate": f"{asked['learning_rate']:g}",
        "trained": asked.get("train", "all"),
        "parameters trained": f"{done['trained_parameters']:,}",
        f"loss on {asked['held_out']} held-out sequences before": f"{done['before']:.4f}",
        "after": f"{done['after']:.4f}",
        "of step": f"{done['best_step']:,}",
        "seconds": f"{done['seconds']:.1f}",
        "tokens/s in its steps": "–" if rate is None else f"{rate:.4g}",
    }
    return Training(TRAININGS[key], ", ".join(asked["data"]), values)


# what a record keeps of the models that its own was made of, and of the texts of all of them
LEARNED = ("calibration", "pretrained", "finetuned", "before", "factorized_from")


def learned(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of `record` goes, as `before`, into that of a model made of its own."""
    return {key: record[key] for key in LEARNED if record.get(key)}


def history(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """`record`, and those of the models that it was made of."""
    for earlier in (record.get("factorized_from"), record.get("before")):
        if earlier:
            yield from history(earlier)
    yield record


def _made_of(record: Mapping[str, Any]) -> Iterator[Text]:
    if read := record.get("calibration"):
        yield Text("calibration", read["data"], read["tokens"], read["sha256"])
    for key in TRAININGS:
        if not (done := record.get(key)):
            continue
        data, tokens = done["settings"]["data"], done["sequences"] * done["length"]
        yield Text("training", ",".join(data), tokens, done["sha256"])
