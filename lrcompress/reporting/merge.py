"""Merges the reports of several evaluations into one comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lrcompress.reporting import metrics_json
from lrcompress.reporting.differences import Change, Continuation, Differences
from lrcompress.reporting.metric import NO_QUALITY, Metric, title
from lrcompress.reporting.render import json_text
from lrcompress.reporting.report import Report, markdown, read, write
from lrcompress.reporting.tables import labels
from lrcompress.runtime.atomic_io import writing
from lrcompress.runtime.paths import check_free

# keys of records that a merged report shows for the model of the last report only
LAST_MODEL_ONLY = {"linears", "finetuned"}


@dataclass
class _Model:
    """A column of the comparison: a label in reports, the folders of these, and the metrics by
    their titles."""

    label: str
    folders: list[str]
    metrics: dict[str, Metric]
    title: str = ""

    def is_same(self, other: _Model) -> bool:
        """Whether both have the same label and the same numbers for every metric that both have,
        at least one of them a metric of quality."""
        shared = self.metrics.keys() & other.metrics.keys()
        is_equal = all(
            _comparable_text(self.metrics[name]) == _comparable_text(other.metrics[name])
            for name in shared
        )
        has_quality = any(self.metrics[name].name not in NO_QUALITY for name in shared)
        return self.label == other.label and has_quality and is_equal


def _comparable_text(metric: Metric) -> str:
    """Equal for equal metrics, also where a value is NaN."""
    return json_text(asdict(metric))


def merge_reports(reports: Mapping[str, Report]) -> Report:
    """One comparison of `reports`, which maps the name of a folder to its report.

    The first model of the first report is the baseline. A model that several reports hold with the
    same numbers appears once; different models of one label get the names of their folders. Speeds
    are left out. A single report, also if it is given several times, stays as it is.
    """
    distinct = dict[str, Report]()
    for folder, report in reports.items():
        if report not in distinct.values():
            distinct[folder] = report
    return _merge_distinct(distinct) if len(distinct) > 1 else next(iter(distinct.values()))


def _merge_distinct(reports: Mapping[str, Report]) -> Report:
    models = _distinct_models(reports)
    titles = {
        folder: {m.label: m.title for m in models if folder in m.folders} for folder in reports
    }
    details = _merge_details(
        [report.details.renamed(titles[folder].__getitem__) for folder, report in reports.items()]
    )
    last_folder, last = list(reports.items())[-1]
    return Report(
        title=f"{', '.join(reports)}: comparison",
        metrics=tuple(
            replace(metric, model=model.title)
            for model in models
            for metric in model.metrics.values()
        ),
        details=details,
        record={key: value for key, value in last.record.items() if key != "notes"},
        record_of=titles[last_folder].get(last.described, last.described),
        notes=tuple(dict.fromkeys(_notes(reports, details))),
        listed=tuple(
            replace(text, model=titles[folder].get(text.model, text.model))
            for folder, report in reports.items()
            for text in report.texts
        ),
    )


def _distinct_models(reports: Mapping[str, Report]) -> list[_Model]:
    """Every model once, with a distinct title."""
    models = list[_Model]()
    for folder, report in reports.items():
        for model in _models_of(folder, report):
            _add_model(models, model)
    titles = labels([model.label for model in models], [model.folders[0] for model in models])
    return [replace(model, title=text) for model, text in zip(models, titles, strict=True)]


def _models_of(folder: str, report: Report) -> Iterator[_Model]:
    for label in dict.fromkeys(metric.model for metric in report.metrics):
        metrics = [m for m in report.metrics if m.model == label and not m.is_speed]
        if metrics:
            yield _Model(label, [folder], {title(metric): metric for metric in metrics})


def _add_model(models: list[_Model], model: _Model) -> None:
    """Adds the metrics of `model` to the same model in `models`, or appends it."""
    for earlier in models:
        if earlier.is_same(model):
            earlier.metrics |= model.metrics
            earlier.folders += model.folders
            return
    models.append(model)


def _merge_details(details: Sequence[Differences]) -> Differences:
    return Differences(
        tokens=_without_duplicates(change for each in details for change in each.tokens),
        blocks=_without_duplicates(change for each in details for change in each.blocks),
        continuations=_merge_continuations(c for each in details for c in each.continuations),
    )


def _without_duplicates(changes: Iterable[Change]) -> tuple[Change, ...]:
    unique = list[Change]()
    for change in changes:
        if change not in unique:
            unique.append(change)
    return tuple(unique)


def _merge_continuations(continuations: Iterable[Continuation]) -> tuple[Continuation, ...]:
    """Continuations of one prompt become one, unless they hold different texts of one model."""
    merged = list[Continuation]()
    for continuation in continuations:
        for index, earlier in enumerate(merged):
            if earlier.prompt == continuation.prompt and _agree(earlier.texts, continuation.texts):
                merged[index] = replace(earlier, texts={**earlier.texts, **continuation.texts})
                break
        else:
            merged.append(continuation)
    return tuple(merged)


def _agree(texts: Mapping[str, str], others: Mapping[str, str]) -> bool:
    return all(texts[model] == others[model] for model in texts.keys() & others.keys())


def _notes(reports: Mapping[str, Report], details: Differences) -> Iterator[str]:
    for folder, report in reports.items():
        yield from report.notes
        yield from (f"{folder}: {note}" for note in report.record.get("notes", ()))
    if any(metric.is_speed for report in reports.values() for metric in report.metrics):
        yield (
            "speeds are left out: a speed is a ratio within one run, and these were measured in "
            "several"
        )
    *earlier, _ = reports
    if omitted := [name for name in earlier if {*reports[name].record} & LAST_MODEL_ONLY]:
        yield f"training and ranks of {', '.join(omitted)} are left out"
    if details.comparable() != details:
        yield (
            "differences from another first model, or on other windows, are in metrics.json alone"
        )


def report_to(folders: Sequence[Path], out: Path | None = None) -> Report:
    """The report of an evaluation or a run, or several of them merged into one comparison.

    Written to the folder `out` where one is given. Raises InputError where a folder has no report
    that can be read, or where `out` exists.
    """
    if out is not None:
        check_free(out)
    with metrics_json.refuse_inconsistent(folders):
        report = merge_reports({_folder_name(folder): read(folder) for folder in folders})
        if out is None:
            markdown(report)  # finds inconsistent values, as `write` does
        else:
            with writing(out) as partial:
                write(partial, report)
    return report


def _folder_name(folder: Path) -> str:
    return str(folder if folder.name not in ("", "..") else folder.resolve())
