"""The command line `lrcompress`. torch is imported only when a command runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrcompress import __version__
from lrcompress.cli.bench import bench
from lrcompress.cli.checkpoint import export_command, quantize_command, verify_command
from lrcompress.cli.error_group import MAX_LOSS_EXCEEDED, ErrorReportingGroup, mark_resumable
from lrcompress.cli.options import (
    FOLDERS,
    JSON,
    MAX_LOSS,
    NEW_OUT,
    OUT,
    OUT_FOLDER,
    RECIPE,
    SET,
    WRITE_CARD,
    SettingsCommand,
    build_recipe,
    check_max_loss,
    sweep_overrides,
)
from lrcompress.cli.stdout import print_json
from lrcompress.cli.train import finetune_command, pretrain_command, scaling_command
from lrcompress.runtime import distributed
from lrcompress.runtime.errors import InputError

if TYPE_CHECKING:
    from lrcompress.reporting.report import Report


@click.group(cls=ErrorReportingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lrcompress")
def main() -> None:
    """Low-rank compression of the feed-forward layers (FFNs) of causal language models.

    Typical use: factorize a model, finetune the result, and eval it beside the original. `run` does
    all of it from one recipe file.
    """


COMMANDS = (
    bench, export_command, finetune_command, pretrain_command, quantize_command, scaling_command,
    verify_command,
)  # fmt: skip
for command in COMMANDS:
    main.add_command(command)

FACTORIZE_SECTIONS = ("factorize", "calibration", "refine", "model")


@main.command("factorize", cls=SettingsCommand, sections=FACTORIZE_SECTIONS)
@click.argument("source", metavar="MODEL")
@NEW_OUT
def factorize_command(source: str, out: Path, **options: Any) -> None:
    """Factorize the FFN weights of MODEL into a low-rank checkpoint.

    MODEL is a folder, a .gguf file or a Hugging Face hub id. Give exactly one budget: --rank,
    --keep-ratio, --target-params, --target-size or --max-perplexity-increase.
    """
    recipe = build_recipe(FACTORIZE_SECTIONS, source, options)
    from lrcompress.cli import display, progress_bars
    from lrcompress.compression import factorize_folder

    mark_resumable(recipe.refine.enabled or recipe.factorize.streaming)
    record = factorize_folder.factorize_to(
        recipe, out, progress_bars.progress, say=progress_bars.say
    )
    if distributed.is_main():
        display.show_factorization(record, out)


def _show(report: Report, out: Path | None, max_loss: Mapping[str, float], as_json: bool) -> None:
    """Prints a report, and the verdict of --max-loss, which decides the exit code."""
    from lrcompress.cli import display
    from lrcompress.reporting import non_inferiority

    display.show_report(report, out, as_json)
    if not max_loss:
        return
    failed = non_inferiority.non_inferiority_failures(report.metrics, max_loss)
    display.show_verdict(report.metrics, failed, max_loss, err=as_json)
    if failed:
        click.get_current_context().exit(MAX_LOSS_EXCEEDED)


EVALUATE_SECTIONS = ("evaluate", "model")


@main.command("eval", cls=SettingsCommand, sections=EVALUATE_SECTIONS)
@click.argument("source", metavar="MODEL")
@OUT
@WRITE_CARD
@MAX_LOSS
@JSON
def eval_command(
    source: str,
    out: Path | None,
    write_card: bool,
    max_loss: Mapping[str, float],
    as_json: bool,
    **options: Any,
) -> None:
    """Measure MODEL: perplexity, tasks, size and speed.

    MODEL is a folder, a .gguf file or a Hugging Face hub id. With --baseline other models are
    measured in the same run, and MODEL is compared with them.
    """
    recipe = build_recipe(EVALUATE_SECTIONS, source, options)
    check_max_loss(recipe.evaluate, has_baseline=bool(recipe.evaluate.baseline), max_loss=max_loss)
    from lrcompress.cli import progress_bars
    from lrcompress.evaluation import evaluate

    report = evaluate.evaluate_to(recipe, out, progress_bars.progress, write_card)
    if write_card and not as_json:
        click.echo(f"Wrote lrcompress.json and README.md of {source}.")
    _show(report, out, max_loss, as_json)


@main.command("report")
@FOLDERS
@OUT
@MAX_LOSS
@JSON
def report_command(
    folders: tuple[Path, ...], out: Path | None, max_loss: Mapping[str, float], as_json: bool
) -> None:
    """Show a report again, or join several into one comparison.

    FOLDER is the --out of eval, or the folder of a run or sweep.
    """
    from lrcompress.cli import display
    from lrcompress.reporting import merge
    from lrcompress.workflows.scaling import folder as scaling_folder
    from lrcompress.workflows.sweep import folder as sweep_folder

    scaling_folder.refuse_studies(folders)
    if not any(map(sweep_folder.is_sweep, folders)):
        _show(merge.report_to(folders, out), out, max_loss, as_json)
    elif max_loss:
        raise InputError("--max-loss works with the report of an eval or a run, not of a sweep")
    else:
        display.show_sweep(sweep_folder.sweep_report_to(folders, out), out, as_json)


MODEL_SECTIONS = ("model",)


@main.command("inspect", cls=SettingsCommand, sections=MODEL_SECTIONS)
@click.argument("source", metavar="MODEL")
@click.option(
    "--energy",
    is_flag=True,
    help="Also show the ranks that keep 90 % and 99 % of each weight's squared norm.",
)
@JSON
def inspect_command(source: str, energy: bool, as_json: bool, **options: Any) -> None:
    """List the FFN linears of MODEL with size and break-even rank.

    At its break-even rank a factorized linear has as many parameters as the dense one.
    """
    settings = build_recipe(MODEL_SECTIONS, source, options).model
    from lrcompress.cli import display, progress_bars
    from lrcompress.models import loading
    from lrcompress.models.inspection import inspect

    if energy:
        model, _ = loading.load_model(settings)
    else:
        model = loading.skeleton(settings.source, settings.gguf_file, settings.trust_remote_code)
    inspection = inspect(model, energy, progress_bars.progress)
    if as_json:
        print_json(json.dumps(inspection.to_dict(), indent=2) + "\n")
    else:
        display.show_inspection(inspection)


@main.command("run")
@RECIPE
@OUT_FOLDER
@SET
@click.option(
    "--overwrite",
    is_flag=True,
    help="If OUT holds the run of another recipe, replace the stages that differ.",
)
@MAX_LOSS
@JSON
def run_command(
    recipe_file: Path,
    out: Path,
    overrides: tuple[str, ...],
    overwrite: bool,
    max_loss: Mapping[str, float],
    as_json: bool,
) -> None:
    """Run RECIPE: factorize, finetune, evaluate and report.

    RECIPE is a YAML file. Models and reports are written to the folder OUT. If the command is
    interrupted, the same command resumes it.
    """
    from lrcompress.config.recipe import read_recipe

    recipe = read_recipe(recipe_file, overrides)
    # a run without a baseline compares with its own dense model
    check_max_loss(recipe.evaluate, has_baseline=True, max_loss=max_loss)
    from lrcompress.checkpoint.record import read_record
    from lrcompress.cli import display, progress_bars
    from lrcompress.workflows.run import folder as run_folder
    from lrcompress.workflows.run import pipeline

    mark_resumable()
    report = pipeline.Run(recipe, out, progress_bars.progress, progress_bars.say).all(overwrite)
    if not as_json:
        model = out / run_folder.MODEL
        display.show_factorization(read_record(model) or {}, model)
        if recipe.finetune.data:
            finetuned = out / run_folder.FINETUNED
            display.show_training((read_record(finetuned) or {})["finetuned"], finetuned)
    _show(report, out, max_loss, as_json)


@main.command("sweep")
@RECIPE
@OUT_FOLDER
@SET
@click.option("--keep-ratio", metavar="X,...", help="Shares of the FFN parameters to keep.")
@click.option(
    "--method", metavar="NAME,...", help="Methods to compare, instead of the recipe's variants."
)
@JSON
def sweep_command(
    recipe_file: Path,
    out: Path,
    overrides: tuple[str, ...],
    keep_ratio: str | None,
    method: str | None,
    as_json: bool,
) -> None:
    """Measure RECIPE at several keep ratios and with several methods.

    RECIPE is a YAML file. Reports are written to the folder OUT. If the
    command is interrupted, the same command resumes it.
    """
    from lrcompress.config.recipe import read_recipe

    recipe = read_recipe(recipe_file, (*overrides, *sweep_overrides(keep_ratio, method)))
    from lrcompress.cli import display, progress_bars
    from lrcompress.workflows.sweep import sweep

    mark_resumable()
    report = sweep.SweepRunner(recipe, out, progress_bars.progress).all()
    display.show_sweep(report, out, as_json)


@main.command("check")
@RECIPE
@SET
def check_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and print it with every default filled in."""
    from lrcompress.config.recipe import read_any_recipe, to_yaml

    click.echo(to_yaml(read_any_recipe(recipe_file, overrides)), nl=False)
