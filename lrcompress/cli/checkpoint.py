"""The commands on checkpoints: `export`, `quantize` and `verify`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lrcompress.checkpoint.export.registry import FORMATS, GGUF_TYPES
from lrcompress.cli.options import (
    JSON,
    NEW_OUT,
    OneLineChoice,
    SettingsCommand,
    UserPath,
    build_recipe,
    build_sections,
)
from lrcompress.cli.stdout import print_json
from lrcompress.runtime.errors import MachineError

if TYPE_CHECKING:
    from lrcompress.checkpoint.verify import Verification

MODEL_SECTIONS = ("model",)


@click.command("export", cls=SettingsCommand, sections=MODEL_SECTIONS)
@click.argument("source", metavar="DIR")
@click.option("--out", required=True, type=UserPath(), help="New folder, or new file for gguf.")
@click.option(
    "--to",
    "format_name",
    type=OneLineChoice(list(FORMATS)),
    required=True,
    help="; ".join(f"{name}: {form.summary}" for name, form in FORMATS.items()) + ".",
)
@click.option(
    "--like",
    metavar="FILE",
    help="gguf: a GGUF file of the dense model, for metadata, tokenizer and chat template. "
    "[default: the file from which DIR was compressed]",
)
@click.option(
    "--type",
    type=click.Choice(GGUF_TYPES),
    help="gguf: type of the weights; those that start with q are quantized. [default: f16]",
)
def export_command(
    source: str, out: Path, format_name: str, like: str | None, type: str | None, **options: Any
) -> None:
    """Write the checkpoint DIR in a format that needs no lrcompress.

    gguf also takes a dense model, to compare with.
    """
    settings = build_recipe(MODEL_SECTIONS, source, options).model
    from lrcompress.checkpoint.export.export_folder import export_to

    given = {"like": like, "type": type}
    export_to(settings, out, format_name, {k: v for k, v in given.items() if v is not None})
    click.echo(f"Wrote {out}.")


QUANTIZE_SECTIONS = ("quantize", "model")


@click.command("quantize", cls=SettingsCommand, sections=QUANTIZE_SECTIONS)
@click.argument("source", metavar="MODEL")
@NEW_OUT
def quantize_command(source: str, out: Path, **options: Any) -> None:
    """Quantize the weights of MODEL, which is dense or compressed.

    torchao converts the linears of attention and FFNs to int8 or int4; of a low-rank layer it
    converts both matrices. Embeddings and the output layer are not quantized.
    """
    checked = build_sections(QUANTIZE_SECTIONS, options, source=source)
    from lrcompress.checkpoint import quantize_folder
    from lrcompress.cli import display

    record = quantize_folder.quantize_to(checked["model"], checked["quantize"], out)
    display.show_quantization(record, out)


@click.command("verify")
@click.argument("folder", metavar="DIR", type=UserPath())
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Also load models that ship Python code, such as standalone exports, which runs it.",
)
@JSON
def verify_command(folder: Path, trust_remote_code: bool, as_json: bool) -> None:
    """Check that the checkpoint DIR is as it was saved.

    DIR is a checkpoint, the folder of a run, in which all checkpoints are checked, or a file of
    `export --to gguf`. Every file is compared by checksum, and every tensor of a checkpoint with
    the config. The exit code is 1 if a file has changed, is missing or is extra, or if a tensor
    does not fit the config. A model that was not loaded is named as such.
    """
    from lrcompress.checkpoint.verify import verify

    results = verify(folder, trust_remote_code)
    if as_json:
        print_json(json.dumps([result.to_dict() for result in results], indent=2) + "\n")
    else:
        _show(results)
    for result in results:
        if result.faults:
            message = result.faults[0].message
            raise MachineError(f"{result.folder!r} is not what was saved: {message}")


def _show(results: Sequence[Verification]) -> None:
    for result in results:
        size = f"{result.files} files, {result.bytes / 1e6:,.1f} MB"
        click.echo(f"{result.folder}: {size}, {_state(result)}.")
        for fault in result.faults:
            click.echo(f"  {fault.message}")


def _state(result: Verification) -> str:
    if result.faults:
        return "not as they were saved"
    if result.unchecked:
        return f"checksums are right; the model was not loaded: {result.unchecked}"
    return "as they were saved"
