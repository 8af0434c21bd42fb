"""The commands that train, `finetune`, `pretrain` and `scaling`: parse, call one, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrcompress.cli.error_group import resumes
from lrcompress.cli.options import (
    NEW_OUT,
    RECIPE,
    RESUME,
    SET,
    SettingsCommand,
    build_recipe,
    build_sections,
    read_shard,
)
from lrcompress.runtime import distributed

FINETUNE = ("finetune", "model")


@click.command("finetune", cls=SettingsCommand, sections=FINETUNE)
@click.argument("source", metavar="DIR")
@NEW_OUT
@RESUME
def finetune_command(source: str, out: Path, resume: bool, **options: Any) -> None:
    """Train the compressed checkpoint DIR towards its dense teacher.

    An interrupted run goes on from its last checkpoint when the same command is given again.
    """
    recipe = build_recipe(FINETUNE, source, options)
    from lrcompress.cli import display, progress_bars
    from lrcompress.training import finetune

    resumes()
    record = finetune.finetune_to(
        recipe.model, recipe.finetune, out, progress_bars.progress, resume=resume
    )
    if distributed.is_main():
        display.show_recovery(record["finetuned"], out)


PRETRAIN = ("pretrain",)


@click.command("pretrain", cls=SettingsCommand, sections=PRETRAIN)
@click.argument("source", metavar="CONFIG")
@NEW_OUT
@RESUME
def pretrain_command(source: str, out: Path, resume: bool, **options: Any) -> None:
    """Train a new model by CONFIG on text, dense or low-rank from the first step.

    CONFIG is a config.json, a folder with one, or a preset. An interrupted run goes on from its
    last checkpoint when the same command is given again.
    """
    settings = build_sections(PRETRAIN, options, source=source)["pretrain"]
    from lrcompress.cli import display, progress_bars
    from lrcompress.training import pretrain

    resumes()
    record = pretrain.pretrain_to(settings, out, progress_bars.progress, resume=resume)
    if distributed.is_main():
        display.show_recovery(record["pretrained"], out)


@click.command("scaling")
@RECIPE
@click.argument("out", type=click.Path(path_type=Path))
@SET
@click.option("--shard", metavar="I/N", help="Train every N-th model only, from the I-th.")
def scaling_command(
    recipe_file: Path, out: Path, overrides: tuple[str, ...], shard: str | None
) -> None:
    """Train the ladder of RECIPE from scratch and fit its scaling laws, in OUT; resumes.

    With --shard I/N, I from 1, the work is shared: by processes on one folder, or by machines whose
    folders' points/ are copied together. The same command without it then writes the report.
    """
    from lrcompress.config.recipe import read_scaling_recipe

    recipe, part = read_scaling_recipe(recipe_file, overrides), read_shard(shard)
    from lrcompress.cli import progress_bars
    from lrcompress.workflows.scaling import report as scaling_report
    from lrcompress.workflows.scaling import study as scaling_study

    resumes()
    points = scaling_study.scaling(recipe, out, progress_bars.progress, part)
    click.echo((out / "scaling.md").read_text("utf-8"))
    click.echo(f"Wrote {out}: {', '.join(scaling_report.FORMATS)}; {len(points)} models.")
