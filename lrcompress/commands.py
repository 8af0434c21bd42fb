"""What the commands eval, report, export, quantize and bench do, from folder to folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from lrcompress.benchmark import report as bench_report
from lrcompress.benchmark.ffn import bench_ffn, device_of
from lrcompress.benchmark.model import bench_models
from lrcompress.benchmark.report import Bench
from lrcompress.benchmark.timer import Timing, machine
from lrcompress.checkpoint import folder as checkpoint_folder
from lrcompress.checkpoint.export.standalone import export_dense, export_standalone
from lrcompress.config import (
    FFNBenchSettings,
    ModelBenchSettings,
    ModelSettings,
    QuantizeSettings,
    Section,
)
from lrcompress.config.recipe import Recipe
from lrcompress.evaluation import evaluate
from lrcompress.evaluation.contamination import refuse_recorded
from lrcompress.evaluation.tasks import sample_logs
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.optimize import optimize
from lrcompress.layers.quantized import refuse_quantized, weight_bytes
from lrcompress.models.sources import Loaded, load_settings, other_source, record_of
from lrcompress.models.torchao import quantize
from lrcompress.reporting import metrics_json, report
from lrcompress.reporting.merge import join
from lrcompress.reporting.report import Report
from lrcompress.reporting.tables import labels
from lrcompress.runtime import locks
from lrcompress.runtime.files import check_free, places, writing
from lrcompress.runtime.protocols import InputError, Progress, silent
from lrcompress.workflows.sweep import report as sweep_report
from lrcompress.workflows.sweep.folder import read_report
from lrcompress.workflows.sweep.report import SweepReport


def evaluate_to(
    recipe: Recipe, out: Path | None = None, progress: Progress = silent, card: bool = False
) -> Report:
    """Measures a model, beside its baselines if it has any; writes the report to `out`, if given,
    with what the tasks asked and the models answered, and with `card` the numbers into the model's
    own lrcompress.json and README.md.

    Raises InputError where a model was made from a text that it would be measured on, and with
    `card` where it is no checkpoint of lrcompress.
    """
    with locks.beside(out):
        if card:
            _check_card(recipe.model.source)
        return _evaluated(recipe, out, progress, card)


def _evaluated(recipe: Recipe, out: Path | None, progress: Progress, card: bool) -> Report:
    settings = recipe.evaluate
    tasks = evaluate.resolve_tasks(settings)
    others = [other_source(recipe.model, name) for name in settings.baseline]
    found = [_Column.load(source) for source in (*others, recipe.model)]
    names = [column.source.source for column in found]
    titles = labels([column.kind for column in found], names)
    columns = dict(zip(titles, found, strict=True))
    models = {title: column.loaded for title, column in columns.items()}
    length = evaluate.common_length(models, settings)
    for title, column in columns.items():
        refuse_recorded(title, column.loaded[1], settings, length, column.record or {})
    details = evaluate.details(models, settings, progress)  # first: it refuses unfit prompts
    measured = evaluate.measure(models, settings, tasks, progress)
    title, record = f"{recipe.model.source}: evaluation", found[-1].record or {}
    made = Report(title, tuple(measured.metrics), details, record)
    if out is not None:
        with writing(out) as partial:
            report.write(partial, made)
            for model, place in places(models).items():
                sample_logs.write(partial / sample_logs.FOLDER / place, measured.logs[model])
    if card:
        checkpoint_folder.write_measured(Path(recipe.model.source), made.metrics, made.comparisons)
    return made


def _check_card(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or checkpoint_folder.read_record(folder) is None:
        raise InputError(
            f"{source!r} is no checkpoint of lrcompress, which could keep the numbers: leave out "
            f"--write-card, or evaluate a folder with a {checkpoint_folder.RECORD}"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{source!r} cannot be written to: leave out --write-card")


def report_to(folders: Sequence[Path], out: Path | None = None) -> Report:
    """The report of an evaluation or a run once more, or those of several as one comparison;
    written to `out`, if given.

    Raises InputError where a folder has no report that can be read.
    """
    if out is not None:
        check_free(out)
    with metrics_json.showing(folders):
        made = join({_name(folder): report.read(folder) for folder in folders})
        if out is None:
            report.markdown(made)
        else:
            with writing(out) as partial:
                report.write(partial, made)
    return made


def _name(folder: Path) -> str:
    return str(folder if folder.name not in ("", "..") else folder.resolve())


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
    with metrics_json.showing(folders):
        found = read_report(folders[0])
        if out is None:
            sweep_report.markdown(found)
        else:
            with writing(out) as partial:
                sweep_report.write(partial, found)
    return found


@dataclass(frozen=True)
class _Column:
    """A model of an evaluation, with the record (lrcompress.json) of its folder."""

    source: ModelSettings
    record: dict[str, Any] | None
    loaded: Loaded

    @classmethod
    def load(cls, source: ModelSettings) -> Self:
        return cls(source, record_of(source), load_settings(source))

    @property
    def kind(self) -> str:
        return evaluate.kind(self.loaded[0], "finetuned" in (self.record or {}))


def export_to(settings: ModelSettings, out: Path, standalone: bool) -> None:
    """Writes a compressed model as stock layers, or with the code that loads it."""
    with locks.beside(out):
        record = record_of(settings) or {}
        model, tokenizer = load_settings(settings)
        refuse_quantized(model, "export it before it is quantized")
        if not any(compressed_layers(model)):
            raise InputError(
                f"{settings.source!r} has no low-rank layers: there is nothing to export"
            )
        write = export_standalone if standalone else export_dense
        write(model, tokenizer, out, record)


def quantize_to(source: ModelSettings, settings: QuantizeSettings, out: Path) -> dict[str, Any]:
    """Writes the model with quantized weights; returns what lrcompress.json of `out` holds."""
    with locks.beside(out):
        record = record_of(source) or {"source": source.source}
        record.pop("metrics", None)  # they are of the model before
        record.pop("comparisons", None)
        model, tokenizer = load_settings(source)
        before = weight_bytes(model)
        names = quantize(model, settings.weights)
        record["quantized"] = {
            "from": source.source,
            "weights": settings.weights,
            "linears": len(names),
            "bytes_before": before,
            "bytes": weight_bytes(model),
            "torchao": version("torchao"),
        }
        return checkpoint_folder.save(model, tokenizer, out, record)


def bench_ffn_to(
    settings: FFNBenchSettings, out: Path | None = None, progress: Progress = silent
) -> Bench:
    """Times an FFN alone; writes the report to `out`, if given."""
    if out is not None:
        check_free(out)
    timings = bench_ffn(settings, progress)
    gate = "gated" if settings.gated else "no gate"
    title = f"FFN of width {settings.width}, {settings.channels} channels, {gate}"
    return _bench(title, settings, device_of(settings.device), timings, out)


def bench_model_to(
    source: ModelSettings,
    settings: ModelBenchSettings,
    out: Path | None = None,
    progress: Progress = silent,
) -> Bench:
    """Times a model beside its dense baseline; writes the report to `out`, if given."""
    if out is not None:
        check_free(out)
    record = record_of(source) or {}
    dense = settings.baseline or record.get("source")
    others = [] if dense is None else [other_source(source, dense)]
    found = [_Column.load(one) for one in (*others, source)]
    names = [column.source.source for column in found]
    titles = labels([column.kind for column in found], names)
    models = {t: column.loaded[0] for t, column in zip(titles, found, strict=True)}
    if settings.optimize:
        optimize(found[-1].loaded[0])
    timings = bench_models(models, settings, progress)
    device = found[-1].loaded[0].device
    return _bench(f"{source.source}: speed", settings, device, timings, out)


def _bench(
    title: str,
    settings: Section,
    device: torch.device,
    timings: Sequence[Timing],
    out: Path | None,
) -> Bench:
    asked = settings.model_dump(mode="json")
    found = Bench(title, asked, machine(device) | checkpoint_folder.versions(), timings)
    if out is not None:
        with writing(out) as partial:
            bench_report.write(partial, found)
    return found
