"""What the commands factorize, eval and export do, from folder to folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lrcompress import checkpoint, compare, processes, report, stages, task_logs
from lrcompress.compress import apply
from lrcompress.contamination import refuse_recorded
from lrcompress.factorization import Factorization
from lrcompress.files import check_free, writing
from lrcompress.lowrank import compressed_layers
from lrcompress.models import locate
from lrcompress.offload import OffloadedModel
from lrcompress.processes import agreed, from_main
from lrcompress.protocols import InputError, Progress, Say, silent, unsaid
from lrcompress.recipe import Recipe
from lrcompress.report import Report
from lrcompress.settings import ModelSettings
from lrcompress.sources import Loaded, load_settings, other_source
from lrcompress.streaming import Streaming
from lrcompress.tables import learned


def factorize_to(
    recipe: Recipe,
    out: Path,
    progress: Progress = silent,
    replace: bool = False,
    say: Say = unsaid,
) -> dict[str, Any]:
    """Loads, factorizes and saves to `out`; returns what lrcompress.json holds.

    `say` is told what streaming will need, before it starts.
    Under torchrun every process calls it, and the main one writes. Raises InputError if `out`
    exists, unless an older result there is to be replaced.
    """
    if not processes.is_main():
        progress, say = silent, unsaid
    with processes.group(recipe.model.device):
        if not replace:
            agreed(lambda: check_free(out))
        if recipe.factorize.streaming:
            return _streamed(recipe, out, progress, replace, say)
        return _in_memory(recipe, out, progress, replace)


def _in_memory(recipe: Recipe, out: Path, progress: Progress, replace: bool) -> dict[str, Any]:
    device = agreed(lambda: processes.own_device(recipe.model.device))
    model, tokenizer = agreed(lambda: load_settings(recipe.model, device=device))
    work = out.with_name(f".{out.name}.refine")  # refined blocks, until the whole is saved
    parts = (recipe.calibration, recipe.factorize, recipe.refine, progress, work)
    done = agreed(lambda: apply(model, tokenizer, *parts))
    saved = from_main(lambda: checkpoint.save(model, tokenizer, out, _made(recipe, done), replace))
    from_main(lambda: shutil.rmtree(work, ignore_errors=True))
    return saved


def _streamed(
    recipe: Recipe, out: Path, progress: Progress, replace: bool, say: Say
) -> dict[str, Any]:
    work = out.with_name(f".{out.name}.streaming")  # of this output: blocks of all settings
    own = work / from_main(lambda: stages.digest(stages.factorizing(recipe)))[:16]
    processes.check_shared(own)
    source = agreed(lambda: OffloadedModel.load(recipe.model, own))
    run = agreed(lambda: Streaming(recipe, source, own, progress, say))
    record = _made(recipe, agreed(run.run))
    saved = from_main(
        lambda: checkpoint.save(
            source.model, source.tokenizer, out, record, replace, source.outside(), run.shards
        )
    )
    from_main(lambda: shutil.rmtree(work, ignore_errors=True))
    return saved


def _made(recipe: Recipe, done: Factorization) -> dict[str, Any]:
    """The record of what was done, and of what had been learned before."""
    record = {
        "source": recipe.model.source,
        "recipe": recipe.model_dump(mode="json"),
        **done.to_dict(),
    }
    if before := learned(_record(recipe.model) or {}):
        record["before"] = before
    return record


def evaluate_to(recipe: Recipe, out: Path | None = None, progress: Progress = silent) -> Report:
    """Measures a model, beside its baselines if it has any; writes the report to `out`, if given,
    with what the tasks asked and the models answered.

    Raises InputError where a model was made from a text that it would be measured on.
    """
    settings = recipe.evaluate
    if out is not None:
        check_free(out)
    tasks = compare.resolve_tasks(settings)
    others = [other_source(recipe.model, name) for name in settings.baseline]
    found = [_Column.load(source) for source in (*others, recipe.model)]
    names = [column.source.source for column in found]
    titles = compare.labels([column.kind for column in found], names)
    columns = dict(zip(titles, found, strict=True))
    models = {title: column.loaded for title, column in columns.items()}
    length = compare.common_length(models, settings)
    for title, column in columns.items():
        refuse_recorded(title, column.loaded[1], settings, length, column.record or {})
    details = compare.details(models, settings, progress)  # first: it refuses unfit prompts
    measured = compare.measure(models, settings, tasks, progress)
    title, record = f"{recipe.model.source}: evaluation", found[-1].record or {}
    made = Report(title, tuple(measured.metrics), details, record)
    if out is not None:
        with writing(out) as partial:
            report.write(partial, made)
            for model, place in task_logs.places(models).items():
                task_logs.write(partial / task_logs.FOLDER / place, measured.logs[model])
    return made


@dataclass(frozen=True)
class _Column:
    """A model of an evaluation, with the record (lrcompress.json) of its folder."""

    source: ModelSettings
    record: dict[str, Any] | None
    loaded: Loaded

    @classmethod
    def load(cls, source: ModelSettings) -> Self:
        return cls(source, _record(source), load_settings(source))

    @property
    def kind(self) -> str:
        return compare.kind(self.loaded[0], "finetuned" in (self.record or {}))


def _record(source: ModelSettings) -> dict[str, Any] | None:
    return checkpoint.read_record(Path(locate(source.source, source.gguf_file).path))


def export_to(settings: ModelSettings, out: Path, standalone: bool) -> None:
    """Writes a compressed model as stock layers, or with the code that loads it."""
    check_free(out)
    record = _record(settings) or {}
    model, tokenizer = load_settings(settings)
    if not any(compressed_layers(model)):
        raise InputError(f"{settings.source!r} has no low-rank layers: there is nothing to export")
    write = checkpoint.export_standalone if standalone else checkpoint.export_dense
    write(model, tokenizer, out, record)
