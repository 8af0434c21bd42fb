"""Loads a compressed checkpoint and writes it in one of the formats of the registry."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from lrcompress.checkpoint.export.registry import FORMATS
from lrcompress.checkpoint.record import record_of
from lrcompress.config import ModelSettings
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.model_info import model_kind, refuse_quantized
from lrcompress.layers.nonfinite import check_weights_finite
from lrcompress.models.loading import load_model
from lrcompress.runtime import locks
from lrcompress.runtime.errors import InputError


def export_to(settings: ModelSettings, out: Path, format_name: str) -> None:
    """Writes a compressed model to the new folder `out` in the format `format_name` of FORMATS.

    Raises InputError where the model is quantized, has no compressed layers, or has a weight that
    is not finite.
    """
    with locks.beside(out):
        record = record_of(settings) or {}
        model, tokenizer = load_model(settings)
        refuse_quantized(model, "export it before it is quantized")
        check_weights_finite(model_kind(model), model)
        if not any(compressed_layers(model)):
            raise InputError(
                f"{settings.source!r} has no low-rank layers: there is nothing to export"
            )
        write_export = pkgutil.resolve_name(FORMATS[format_name].writer)
        write_export(model, tokenizer, out, record)
