"""Reports of several evaluations -> one comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from lrcompress.reporting import metrics_json
from lrcompress.reporting.differences import BlockChange, Continuation, Differences, TokenChange
from lrcompress.reporting.metric import NO_QUALITY, SPEEDS, Metric
from lrcompress.reporting.render import json_text
from lrcompress.reporting.report import Report, markdown, read, write
from lrcompress.reporting.tables import labels, title
from lrcompress.runtime.atomic_io import writing
from lrcompress.runtime.paths import check_free

# parts of a record that a report shows of one model only
SHOWN_OF_LAST = {"linears", "finetuned"}

Change = TypeVar("Change", TokenChange, BlockChange)


@dataclass
class _Model:
    """A column of the comparison: how reports call it, which they are, and its metrics."""

    label: str
    places: list[str]
    metrics: dict[str, Metric]
    title: str = ""

    def is_same(self, other: _Model) -> bool:
        """Whether both are called alike and have the same numbers where both have one, at least
        one of quality among them."""
        both = self.metrics.keys() & other.metrics.keys()
        mine, others = ([_text(one.metrics[name]) for name in both] for one in (self, other))
        qualities = [name for name in both if self.metrics[name].name not in NO_QUALITY]
        return self.label == other.label and bool(qualities) and mine == others


def _text(metric: Metric) -> str:
    """Equal where all is equal, also what is no number."""
    return json_text(asdict(metric))


def join(reports: Mapping[str, Report]) -> Report:
    """One comparison of `reports`, which are given by the names of their folders.

    The first model of the first is the baseline. A model that several have with the same numbers is
    there once; others that are called alike get the names of their folders. Speeds are left out.
    One report, also if it is given several times, stays as it is.
    """
    found = dict[str, Report]()
    for place, report in reports.items():
        if report not in found.values():
            found[place] = report
    return _joined(found) if len(found) > 1 else next(iter(found.values()))


def _joined(reports: Mapping[str, Report]) -> Report:
    models, last = _columns(reports), list(reports.values())[-1]
    details = _united(
        [
            _renamed(report.details, {m.label: m.title for m in models if place in m.places})
            for place, report in reports.items()
        ]
    )
    return Report(
        f"{', '.join(reports)}: comparison",
        tuple(replace(one, model=m.title) for m in models for one in m.metrics.values()),
        details,
        {key: part for key, part in last.record.items() if key != "notes"},
        tuple(dict.fromkeys(_notes(reports, details))),
        tuple(text for report in reports.values() for text in report.texts),
    )


def _columns(reports: Mapping[str, Report]) -> list[_Model]:
    """Every model once, with a title of its own."""
    found = list[_Model]()
    for place, report in reports.items():
        for model in _models(place, report):
            _add(found, model)
    titles = labels([model.label for model in found], [model.places[0] for model in found])
    return [replace(model, title=name) for model, name in zip(found, titles, strict=True)]


def _models(place: str, report: Report) -> Iterator[_Model]:
    for label in dict.fromkeys(metric.model for metric in report.metrics):
        own = (m for m in report.metrics if m.model == label and m.name not in SPEEDS)
        yield _Model(label, [place], {title(metric): metric for metric in own})


def _add(models: list[_Model], model: _Model) -> None:
    """To the one that is the same, with what it does not have, or at the end."""
    for known in models:
        if known.is_same(model):
            known.metrics |= model.metrics
            known.places += model.places
            return
    models.append(model)


def _renamed(details: Differences, names: Mapping[str, str]) -> Differences:
    def named(one: Change) -> Change:
        return replace(one, baseline=names[one.baseline], model=names[one.model])

    texts = ({names[label]: text for label, text in c.texts.items()} for c in details.continuations)
    prompts = [continuation.prompt for continuation in details.continuations]
    return Differences(
        tuple(named(change) for change in details.tokens),
        tuple(named(change) for change in details.blocks),
        tuple(map(Continuation, prompts, texts)),
    )


def _united(parts: Sequence[Differences]) -> Differences:
    return Differences(
        _once(change for part in parts for change in part.tokens),
        _once(change for part in parts for change in part.blocks),
        tuple(_beside(text for part in parts for text in part.continuations)),
    )


def _once(changes: Iterable[Change]) -> tuple[Change, ...]:
    found = list[Change]()
    for change in changes:
        if change not in found:
            found.append(change)
    return tuple(found)


def _beside(continuations: Iterable[Continuation]) -> list[Continuation]:
    """Those of one prompt in one, as far as no model goes on in two ways."""
    found = list[Continuation]()
    for one in continuations:
        for index, known in enumerate(found):
            both = known.texts.keys() & one.texts.keys()
            if known.prompt == one.prompt and all(known.texts[m] == one.texts[m] for m in both):
                found[index] = replace(known, texts={**known.texts, **one.texts})
                break
        else:
            found.append(one)
    return found


def _notes(reports: Mapping[str, Report], details: Differences) -> Iterator[str]:
    for place, report in reports.items():
        yield from report.notes
        yield from (f"{place}: {note}" for note in report.record.get("notes", ()))
    if any(metric.name in SPEEDS for report in reports.values() for metric in report.metrics):
        yield (
            "speeds are left out: a speed is a ratio within one run, and these were measured in "
            "several"
        )
    *others, _ = reports
    if elsewhere := [place for place in others if {*reports[place].record} & SHOWN_OF_LAST]:
        yield f"training and ranks of {', '.join(elsewhere)} are left out"
    if details.alike() != details:
        yield (
            "where models differ from another first model, or were compared on other windows, it "
            "is in metrics.json alone"
        )


def report_to(folders: Sequence[Path], out: Path | None = None) -> Report:
    """The report of an evaluation or a run once more, or those of several as one comparison;
    written to `out`, if given.

    Raises InputError where a folder has no report that can be read.
    """
    if out is not None:
        check_free(out)
    with metrics_json.showing(folders):
        made = join({_name(folder): read(folder) for folder in folders})
        if out is None:
            markdown(made)
        else:
            with writing(out) as partial:
                write(partial, made)
    return made


def _name(folder: Path) -> str:
    return str(folder if folder.name not in ("", "..") else folder.resolve())
