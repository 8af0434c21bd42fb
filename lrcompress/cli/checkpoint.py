"""The commands `export`, `quantize` and `verify` of checkpoints: parse, call one, print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrcompress.checkpoint.export.registry import FORMATS
from lrcompress.cli.options import JSON, NEW_OUT, SettingsCommand, build_recipe, build_sections
from lrcompress.runtime.errors import MachineError

if TYPE_CHECKING:
    from lrcompress.checkpoint.verify import Verification

MODEL = ("model",)


@click.command("export", cls=SettingsCommand, sections=MODEL)
@click.argument("source", metavar="DIR")
@NEW_OUT
@click.option(
    "--to",
    "name",
    type=click.Choice(list(FORMATS)),
    required=True,
    help="; ".join(f"{name}: {kind.summary}" for name, kind in FORMATS.items()) + ".",
)
def export_command(source: str, out: Path, name: str, **options: Any) -> None:
    """Write the checkpoint DIR in a form that loads without lrcompress."""
    settings = build_recipe(MODEL, source, options).model
    from lrcompress.checkpoint.export.export_folder import export_to

    export_to(settings, out, name)
    click.echo(f"Wrote {out}.")


QUANTIZE = ("quantize", "model")


@click.command("quantize", cls=SettingsCommand, sections=QUANTIZE)
@click.argument("source", metavar="MODEL")
@NEW_OUT
def quantize_command(source: str, out: Path, **options: Any) -> None:
    """Quantize the weights of MODEL, dense or compressed, and write it to a new folder.

    The linears of attention and FFN get int8 or int4 weights by torchao; of a low-rank layer that
    is each of its two matrices. Embeddings and the output layer stay as they are.
    """
    given = build_sections(QUANTIZE, options, source=source)
    from lrcompress.checkpoint import quantize_folder
    from lrcompress.cli import display

    display.show_quantization(
        quantize_folder.quantize_to(given["model"], given["quantize"], out), out
    )


@click.command("verify")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@JSON
def verify_command(folder: Path, as_json: bool) -> None:
    """Compare the checkpoint DIR, or those of the run DIR, with what was saved.

    Every file by its checksum, and the tensors by the config. The exit code is 1 where a file is
    wrong, missing or extra, or where they do not agree.
    """
    from lrcompress.checkpoint.verify import verify

    found = verify(folder)
    if as_json:
        click.echo(json.dumps([one.to_dict() for one in found], indent=2))
    else:
        _show(found)
    for one in found:
        if one.faults:
            raise MachineError(f"{one.folder!r} is not what was saved: {one.faults[0].message}")


def _show(found: Sequence[Verification]) -> None:
    for one in found:
        state = "not as they were saved" if one.faults else "as they were saved"
        click.echo(f"{one.folder}: {one.files} files, {one.bytes / 1e6:,.1f} MB, {state}.")
        for fault in one.faults:
            click.echo(f"  {fault.message}")
