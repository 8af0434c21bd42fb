"""The command line: parse, call one function, print. torch is imported only inside commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrcompress import __version__
from lrcompress.cli.bench import bench
from lrcompress.cli.checkpoint import export_command, quantize_command, verify_command
from lrcompress.cli.error_group import BEYOND_MAX_LOSS, ErrorReportingGroup, resumes
from lrcompress.cli.options import (
    FOLDERS,
    JSON,
    MAX_LOSS,
    NEW_OUT,
    OUT,
    RECIPE,
    SET,
    WRITE_CARD,
    SettingsCommand,
    build_recipe,
    check_max_loss,
    sweep_overrides,
)
from lrcompress.cli.train import finetune_command, pretrain_command, scaling_command
from lrcompress.runtime import distributed
from lrcompress.runtime.errors import InputError

if TYPE_CHECKING:
    from lrcompress.reporting.report import Report


@click.group(cls=ErrorReportingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lrcompress")
def main() -> None:
    """Low-rank compression of the feed-forward layers of causal language models."""


COMMANDS = (
    bench, export_command, finetune_command, pretrain_command, quantize_command, scaling_command,
    verify_command,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)

FACTORIZE = ("factorize", "calibration", "refine", "model")


@main.command("factorize", cls=SettingsCommand, sections=FACTORIZE)
@click.argument("source", metavar="MODEL")
@NEW_OUT
def factorize_command(source: str, out: Path, **options: Any) -> None:
    """Factorize the FFN weights of MODEL and write a low-rank checkpoint.

    MODEL is a folder, a .gguf file or a hub id. Give --rank or --keep-ratio.
    """
    recipe = build_recipe(FACTORIZE, source, options)
    from lrcompress.cli import display, progress_bars
    from lrcompress.compression import factorize_folder

    resumes(recipe.refine.enabled or recipe.factorize.streaming)
    record = factorize_folder.factorize_to(
        recipe, out, progress_bars.progress, say=progress_bars.say
    )
    if distributed.is_main():
        display.show_factorization(record, out)


def _show(found: Report, out: Path | None, max_loss: float | None, as_json: bool) -> None:
    from lrcompress.cli import display
    from lrcompress.reporting import significance

    display.show_report(found, out, as_json)
    if max_loss is None:
        return
    failed = significance.non_inferiority_failures(found.metrics, max_loss)
    display.show_verdict(failed, max_loss, err=as_json)
    if failed:
        click.get_current_context().exit(BEYOND_MAX_LOSS)


EVALUATE = ("evaluate", "model")


@main.command("eval", cls=SettingsCommand, sections=EVALUATE)
@click.argument("source", metavar="MODEL")
@OUT
@WRITE_CARD
@MAX_LOSS
@JSON
def eval_command(
    source: str,
    out: Path | None,
    write_card: bool,
    max_loss: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure MODEL: perplexity, tasks, size and speed, beside --baseline if given."""
    recipe = build_recipe(EVALUATE, source, options)
    check_max_loss(recipe.evaluate, bool(recipe.evaluate.baseline), max_loss)
    from lrcompress.cli import progress_bars
    from lrcompress.evaluation import evaluate

    found = evaluate.evaluate_to(recipe, out, progress_bars.progress, write_card)
    if write_card and not as_json:
        click.echo(f"Wrote lrcompress.json and README.md of {source}.")
    _show(found, out, max_loss, as_json)


@main.command("report")
@FOLDERS
@OUT
@MAX_LOSS
@JSON
def report_command(
    folders: tuple[Path, ...], out: Path | None, max_loss: float | None, as_json: bool
) -> None:
    """Show the report of an eval, run or sweep again; several are joined into one comparison."""
    from lrcompress.cli import display
    from lrcompress.reporting import merge
    from lrcompress.workflows.scaling import folder as scaling_folder
    from lrcompress.workflows.sweep import folder
    from lrcompress.workflows.sweep import folder as sweep_folder

    scaling_folder.refuse_studies(folders)
    if not any(map(sweep_folder.is_sweep, folders)):
        _show(merge.report_to(folders, out), out, max_loss, as_json)
        return
    if max_loss is not None:
        raise InputError("--max-loss decides on the report of an eval or a run, not of a sweep")
    display.show_sweep(folder.sweep_report_to(folders, out), out, as_json)


MODEL = ("model",)


@main.command("inspect", cls=SettingsCommand, sections=MODEL)
@click.argument("source", metavar="MODEL")
@click.option("--energy", is_flag=True, help="Ranks that keep 90 % and 99 % of each weight.")
@JSON
def inspect_command(source: str, energy: bool, as_json: bool, **options: Any) -> None:
    """List the FFN linears of MODEL, their size and their break-even rank."""
    settings = build_recipe(MODEL, source, options).model
    from lrcompress.cli import display, progress_bars
    from lrcompress.models import loading
    from lrcompress.models.inspection import inspect

    if energy:
        model, _ = loading.load_model(settings)
    else:
        model = loading.skeleton(settings.source, settings.gguf_file, settings.trust_remote_code)
    found = inspect(model, energy, progress_bars.progress)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        display.show_inspection(found)


@main.command("run")
@RECIPE
@click.argument("out", type=click.Path(path_type=Path))
@SET
@click.option("--overwrite", is_flag=True, help="Redo changed stages of another recipe's run.")
@MAX_LOSS
@JSON
def run_command(
    recipe_file: Path,
    out: Path,
    overrides: tuple[str, ...],
    overwrite: bool,
    max_loss: float | None,
    as_json: bool,
) -> None:
    """Factorize, finetune, evaluate and report as RECIPE says, in the folder OUT; resumes."""
    from lrcompress.config.recipe import read_recipe

    recipe = read_recipe(recipe_file, overrides)
    check_max_loss(recipe.evaluate, True, max_loss)  # without a baseline: its own dense model
    from lrcompress.checkpoint.record import read_record
    from lrcompress.cli import display, progress_bars
    from lrcompress.workflows.run import folder as run_folder
    from lrcompress.workflows.run import pipeline

    resumes()
    found = pipeline.Run(recipe, out, progress_bars.progress, progress_bars.say).all(overwrite)
    model, tuned = out / run_folder.MODEL, out / run_folder.FINETUNED
    if not as_json:
        display.show_factorization(read_record(model) or {}, model)
        if recipe.finetune.data:
            display.show_recovery((read_record(tuned) or {})["finetuned"], tuned)
    _show(found, out, max_loss, as_json)


@main.command("sweep")
@RECIPE
@click.argument("out", type=click.Path(path_type=Path))
@SET
@click.option("--keep-ratio", metavar="X,...", help="Shares of the FFN parameters kept.")
@click.option("--method", metavar="NAME,...", help="Methods, instead of the recipe's variants.")
@JSON
def sweep_command(
    recipe_file: Path,
    out: Path,
    overrides: tuple[str, ...],
    keep_ratio: str | None,
    method: str | None,
    as_json: bool,
) -> None:
    """Measure RECIPE at several keep ratios and by several methods, in the folder OUT; resumes."""
    from lrcompress.config.recipe import read_recipe

    recipe = read_recipe(recipe_file, (*overrides, *sweep_overrides(keep_ratio, method)))
    from lrcompress.cli import display, progress_bars
    from lrcompress.workflows.sweep import sweep

    resumes()
    found = sweep.SweepRunner(recipe, out, progress_bars.progress).all()
    display.show_sweep(found, out, as_json)


@main.command("check")
@RECIPE
@SET
def check_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and print it with every default filled in."""
    from lrcompress.config.recipe import read_any, to_yaml

    click.echo(to_yaml(read_any(recipe_file, overrides)), nl=False)
