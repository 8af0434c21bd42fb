"""The commands `export` and `quantize`, which write a model in another form: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lrcompress.options import NEW_OUT, SettingsCommand, build_sections
from lrcompress.protocols import InputError

EXPORT = ("model",)


@click.command("export", cls=SettingsCommand, sections=EXPORT)
@click.argument("source", metavar="DIR")
@NEW_OUT
@click.option("--dense", "kind", flag_value="dense", help="Merge back into stock layers.")
@click.option(
    "--standalone", "kind", flag_value="standalone", help="Ship the layers' code with the weights."
)
def export_command(source: str, out: Path, kind: str | None, **options: Any) -> None:
    """Write the checkpoint DIR in a form that loads without lrcompress."""
    if kind is None:
        raise InputError("say which form to export: --dense or --standalone")
    settings = build_sections(EXPORT, options, source=source)["model"]
    from lrcompress import commands

    commands.export_to(settings, out, standalone=kind == "standalone")
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
    from lrcompress import commands, console

    console.show_quantization(commands.quantize_to(given["model"], given["quantize"], out), out)
