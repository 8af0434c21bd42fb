"""The command line: parse, call one function, print. torch is imported only inside commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrcompress import __version__, processes
from lrcompress.options import (
    JSON,
    MAX_LOSS,
    SettingsCommand,
    build_recipe,
    build_settings,
    read_shard,
)
from lrcompress.protocols import InputError
from lrcompress.settings import EvaluateSettings
from lrcompress.shell import BEYOND_MAX_LOSS, Group, resumes

if TYPE_CHECKING:
    from lrcompress.report import Report


def _out(required: bool) -> Callable[[Any], Any]:
    return click.option(
        "--out", type=click.Path(path_type=Path), required=required, help="New folder to write."
    )


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lrcompress")
def main() -> None:
    """Low-rank compression of the feed-forward layers of causal language models."""


FACTORIZE = ("factorize", "calibration", "refine", "model")


@main.command("factorize", cls=SettingsCommand, sections=FACTORIZE)
@click.argument("source", metavar="MODEL")
@_out(required=True)
def factorize_command(source: str, out: Path, **options: Any) -> None:
    """Factorize the FFN weights of MODEL and write a low-rank checkpoint.

    MODEL is a folder, a .gguf file or a hub id. Give --rank or --keep-ratio.
    """
    recipe = build_recipe(FACTORIZE, source, options)
    from lrcompress import commands, console

    resumes(recipe.refine.enabled)
    record = commands.factorize_to(recipe, out, console.progress)
    console.show_factorization(record, out)


FINETUNE = ("finetune", "model")


@main.command("finetune", cls=SettingsCommand, sections=FINETUNE)
@click.argument("source", metavar="DIR")
@_out(required=True)
@click.option(
    "--resume/--no-resume", default=True, help="Go on from an interrupted run. [default: on]"
)
def finetune_command(source: str, out: Path, resume: bool, **options: Any) -> None:
    """Train the compressed checkpoint DIR towards its dense teacher.

    An interrupted run goes on from its last checkpoint when the same command is given again.
    """
    recipe = build_recipe(FINETUNE, source, options)
    from lrcompress import console, tune

    resumes()
    record = tune.finetune_to(recipe.model, recipe.finetune, out, console.progress, resume=resume)
    if processes.is_main():
        console.show_recovery(record["finetuned"], out)


PRETRAIN = ("pretrain",)


@main.command("pretrain", cls=SettingsCommand, sections=PRETRAIN)
@click.argument("source", metavar="CONFIG")
@_out(required=True)
@click.option(
    "--resume/--no-resume", default=True, help="Go on from an interrupted run. [default: on]"
)
def pretrain_command(source: str, out: Path, resume: bool, **options: Any) -> None:
    """Train a new model by CONFIG on text, dense or low-rank from the first step.

    CONFIG is a config.json, a folder with one, or a preset. An interrupted run goes on from its
    last checkpoint when the same command is given again.
    """
    settings = build_settings(PRETRAIN, source, options)["pretrain"]
    from lrcompress import console, pretrain

    resumes()
    record = pretrain.pretrain_to(settings, out, console.progress, resume=resume)
    if processes.is_main():
        console.show_recovery(record["pretrained"], out)


def _check_max_loss(measured: EvaluateSettings, compared: bool, max_loss: float | None) -> None:
    """Raises InputError where there will be nothing to decide it by."""
    if max_loss is not None and not (compared and (measured.perplexity or measured.tasks)):
        raise InputError("--max-loss needs a --baseline to compare with, and a text or task")


def _hold(found: Report, max_loss: float | None, as_json: bool) -> None:
    if max_loss is None:
        return
    from lrcompress import console, significance

    failed = significance.not_shown(found.metrics, max_loss)
    console.show_verdict(failed, max_loss, err=as_json)
    if failed:
        click.get_current_context().exit(BEYOND_MAX_LOSS)


EVALUATE = ("evaluate", "model")


@main.command("eval", cls=SettingsCommand, sections=EVALUATE)
@click.argument("source", metavar="MODEL")
@_out(required=False)
@MAX_LOSS
@JSON
def eval_command(
    source: str, out: Path | None, max_loss: float | None, as_json: bool, **options: Any
) -> None:
    """Measure MODEL: perplexity, tasks, size and speed, beside --baseline if given."""
    recipe = build_recipe(EVALUATE, source, options)
    _check_max_loss(recipe.evaluate, bool(recipe.evaluate.baseline), max_loss)
    from lrcompress import commands, console

    found = commands.evaluate_to(recipe, out, console.progress)
    console.show_report(found, out, as_json)
    _hold(found, max_loss, as_json)


INSPECT = ("model",)


@main.command("inspect", cls=SettingsCommand, sections=INSPECT)
@click.argument("source", metavar="MODEL")
@click.option("--energy", is_flag=True, help="Ranks that keep 90 % and 99 % of each weight.")
@JSON
def inspect_command(source: str, energy: bool, as_json: bool, **options: Any) -> None:
    """List the FFN linears of MODEL, their size and their break-even rank."""
    settings = build_recipe(INSPECT, source, options).model
    from lrcompress import console, models, sources
    from lrcompress.inspection import inspect

    if energy:
        model, _ = sources.load_settings(settings)
    else:
        model = models.skeleton(settings.source, settings.gguf_file, settings.trust_remote_code)
    found = inspect(model, energy, console.progress)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        console.show_inspection(found)


EXPORT = ("model",)


@main.command("export", cls=SettingsCommand, sections=EXPORT)
@click.argument("source", metavar="DIR")
@_out(required=True)
@click.option("--dense", "kind", flag_value="dense", help="Merge back into stock layers.")
@click.option(
    "--standalone", "kind", flag_value="standalone", help="Ship the layers' code with the weights."
)
def export_command(source: str, out: Path, kind: str | None, **options: Any) -> None:
    """Write the checkpoint DIR in a form that loads without lrcompress."""
    if kind is None:
        raise InputError("say which form to export: --dense or --standalone")
    settings = build_recipe(EXPORT, source, options).model
    from lrcompress import commands

    commands.export_to(settings, out, standalone=kind == "standalone")
    click.echo(f"Wrote {out}.")


_RECIPE = click.argument("recipe_file", metavar="RECIPE", type=click.Path(path_type=Path))
_SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key."
)


@main.command("run")
@_RECIPE
@click.argument("out", type=click.Path(path_type=Path))
@_SET
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
    from lrcompress.recipe import read_recipe

    recipe = read_recipe(recipe_file, overrides)
    _check_max_loss(recipe.evaluate, True, max_loss)  # without a baseline: its own dense model
    from lrcompress import checkpoint, console, pipeline, runfolder

    resumes()
    found = pipeline.Run(recipe, out, console.progress).all(overwrite)
    model, tuned = out / runfolder.MODEL, out / runfolder.FINETUNED
    if not as_json:
        console.show_factorization(checkpoint.read_record(model) or {}, model)
        if recipe.finetune.data:
            console.show_recovery((checkpoint.read_record(tuned) or {})["finetuned"], tuned)
    console.show_report(found, out, as_json)
    _hold(found, max_loss, as_json)


@main.command("sweep")
@_RECIPE
@click.argument("out", type=click.Path(path_type=Path))
@_SET
@click.option("--keep-ratio", metavar="X,...", help="Shares of the FFN parameters kept.")
@click.option("--method", metavar="NAME,...", help="Methods, instead of the recipe's variants.")
def sweep_command(
    recipe_file: Path,
    out: Path,
    overrides: tuple[str, ...],
    keep_ratio: str | None,
    method: str | None,
) -> None:
    """Measure RECIPE at several keep ratios and by several methods, in the folder OUT; resumes."""
    from lrcompress.recipe import read_recipe

    given = {"keep_ratios": keep_ratio, "methods": method}
    more = [f"sweep.{key}={value}" for key, value in given.items() if value is not None]
    if method is not None:
        more.append("sweep.variants={}")
    recipe = read_recipe(recipe_file, (*overrides, *more))
    from lrcompress import console, sweep, sweepreport

    resumes()
    points = sweep.sweep(recipe, out, console.progress)
    click.echo((out / "sweep.md").read_text("utf-8"))
    click.echo(f"Wrote {out}: {', '.join(sweepreport.FORMATS)}; {len(points)} points.")


@main.command("scaling")
@_RECIPE
@click.argument("out", type=click.Path(path_type=Path))
@_SET
@click.option("--shard", metavar="I/N", help="Train every N-th model only, from the I-th.")
def scaling_command(
    recipe_file: Path, out: Path, overrides: tuple[str, ...], shard: str | None
) -> None:
    """Train the ladder of RECIPE from scratch and fit its scaling laws, in OUT; resumes.

    With --shard I/N, I from 1, the work is shared: by processes on one folder, or by machines whose
    folders' points/ are copied together. The same command without it then writes the report.
    """
    from lrcompress.recipe import read_scaling

    recipe, part = read_scaling(recipe_file, overrides), read_shard(shard)
    from lrcompress import console, scaling, scalingreport

    resumes()
    points = scaling.scaling(recipe, out, console.progress, part)
    click.echo((out / "scaling.md").read_text("utf-8"))
    click.echo(f"Wrote {out}: {', '.join(scalingreport.NAMES)}; {len(points)} models.")


@main.command("check")
@_RECIPE
@_SET
def check_command(recipe_file: Path, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and print it with every default filled in."""
    from lrcompress.recipe import read_any, to_yaml

    click.echo(to_yaml(read_any(recipe_file, overrides)), nl=False)
