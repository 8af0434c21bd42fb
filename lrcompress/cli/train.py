"""The commands that train: `finetune`, `pretrain` and `scaling`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrcompress.cli.error_group import mark_resumable
from lrcompress.cli.options import (
    NEW_OUT,
    OUT_FOLDER,
    RECIPE,
    RESUME,
    SET,
    SettingsCommand,
    build_recipe,
    build_sections,
    read_shard,
)
from lrcompress.runtime import distributed

FINETUNE_SECTIONS = ("finetune", "model")


@click.command("finetune", cls=SettingsCommand, sections=FINETUNE_SECTIONS)
@click.argument("source", metavar="DIR")
@NEW_OUT
@RESUME
def finetune_command(source: str, out: Path, resume: bool, **options: Any) -> None:
    """Train the compressed checkpoint DIR towards its dense teacher.

    If training is interrupted, the same command resumes it from the last checkpoint.
    """
    recipe = build_recipe(FINETUNE_SECTIONS, source, options)
    from lrcompress.cli import display, progress_bars
    from lrcompress.training import finetune

    mark_resumable()
    record = finetune.finetune_to(
        recipe.model, recipe.finetune, out, progress_bars.progress, resume=resume
    )
    if distributed.is_main():
        display.show_training(record["finetuned"], out)


PRETRAIN_SECTIONS = ("pretrain",)


@click.command("pretrain", cls=SettingsCommand, sections=PRETRAIN_SECTIONS)
@click.argument("source", metavar="CONFIG")
@NEW_OUT
@RESUME
def pretrain_command(source: str, out: Path, resume: bool, **options: Any) -> None:
    """Train a new model, dense or low-rank from the first step.

    CONFIG is a config.json, a folder with one, or the name of a preset. If training is interrupted,
    the same command resumes it from the last checkpoint.
    """
    settings = build_sections(PRETRAIN_SECTIONS, options, source=source)["pretrain"]
    from lrcompress.cli import display, progress_bars
    from lrcompress.training import pretrain

    mark_resumable()
    record = pretrain.pretrain_to(settings, out, progress_bars.progress, resume=resume)
    if distributed.is_main():
        display.show_training(record["pretrained"], out)


@click.command("scaling")
@RECIPE
@OUT_FOLDER
@SET
@click.option("--shard", metavar="I/N", help="Train only every N-th model, from the I-th on.")
def scaling_command(
    recipe_file: Path, out: Path, overrides: tuple[str, ...], shard: str | None
) -> None:
    """Train models of several sizes and fit scaling laws.

    RECIPE is a YAML file that describes the models. Results are written to the folder OUT. If the
    command is interrupted, the same command resumes it.

    Several processes can share the work on one folder: give each --shard I/N with its own I from 1
    to N. Machines without a common folder use one OUT each; then copy the files of all their
    points/ folders into one. At the end the same command without --shard writes the report.
    """
    from lrcompress.config.recipe import read_scaling_recipe

    recipe, shard_numbers = read_scaling_recipe(recipe_file, overrides), read_shard(shard)
    from lrcompress.cli import progress_bars
    from lrcompress.workflows.scaling import report as scaling_report
    from lrcompress.workflows.scaling import study as scaling_study

    mark_resumable()
    points = scaling_study.scaling(recipe, out, progress_bars.progress, shard_numbers)
    click.echo((out / "scaling.md").read_text("utf-8"))
    click.echo(f"Wrote {out}: {', '.join(scaling_report.FORMATS)}; {len(points)} models.")
