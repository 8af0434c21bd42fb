"""Loads a compressed checkpoint and writes it in one of the formats of the registry."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.export.registry import FORMATS, ExportFormat
from lrcompress.checkpoint.record import record_of
from lrcompress.config import ModelSettings
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.model_info import model_kind, refuse_quantized
from lrcompress.layers.nonfinite import check_weights_finite
from lrcompress.models.loading import load_model
from lrcompress.runtime import locks
from lrcompress.runtime.errors import InputError


def export_to(
    settings: ModelSettings, out: Path, format_name: str, options: Mapping[str, str]
) -> None:
    """Writes a compressed model to the new folder or file `out` in a format of FORMATS.

    `options` are keyword arguments of the format's writer. Raises InputError where the format does
    not take one of them, where the model is quantized or a weight is not finite, and where it has
    no compressed layers, unless the format takes dense models.
    """
    form = FORMATS[format_name]
    _check(form, format_name, out, options)
    with locks.beside(out):
        record = record_of(settings) or _record_of_dense(settings)
        model, tokenizer = load_model(settings)
        refuse_quantized(model, "export it before it is quantized")
        check_weights_finite(model_kind(model), model)
        if not (form.takes_dense or any(compressed_layers(model))):
            raise InputError(
                f"{settings.source!r} has no low-rank layers: there is nothing to export"
            )
        write_export = pkgutil.resolve_name(form.writer)
        write_export(model, tokenizer, out, record, **options)


def _record_of_dense(settings: ModelSettings) -> dict[str, Any]:
    """What a record says of the origin of a model that has none: the model itself."""
    return {
        "source": settings.source,
        "recipe": {"model": settings.model_dump(mode="json", include={"gguf_file"})},
    }


def _check(form: ExportFormat, name: str, out: Path, options: Mapping[str, str]) -> None:
    """Raises InputError where the format cannot be written as the user asked."""
    for option in options:
        if option not in form.options:
            raise InputError(f"--{option} is not an option of --to {name}: leave it out")
    if form.suffix and out.suffix != form.suffix:
        raise InputError(
            f"--to {name} writes one file: name it so that it ends in {form.suffix}, "
            f"not {str(out)!r}"
        )
    if form.extra is not None and find_spec(form.extra) is None:
        raise InputError(f"--to {name} needs {form.extra}: pip install 'lrcompress[{form.extra}]'")
