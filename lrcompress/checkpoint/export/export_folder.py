"""What the command export does, from folder to folder."""

from __future__ import annotations

import pkgutil
from pathlib import Path

from lrcompress.checkpoint.export.registry import FORMATS
from lrcompress.checkpoint.record import record_of
from lrcompress.config import ModelSettings
from lrcompress.layers.lowrank import compressed_layers
from lrcompress.layers.model_info import refuse_quantized
from lrcompress.models.loading import load_model
from lrcompress.runtime import locks
from lrcompress.runtime.errors import InputError


def export_to(settings: ModelSettings, out: Path, name: str) -> None:
    """Writes a compressed model to the new folder `out` in the format called `name`.

    Raises InputError where the model is quantized, or has no layer that was compressed.
    """
    with locks.beside(out):
        record = record_of(settings) or {}
        model, tokenizer = load_model(settings)
        refuse_quantized(model, "export it before it is quantized")
        if not any(compressed_layers(model)):
            raise InputError(
                f"{settings.source!r} has no low-rank layers: there is nothing to export"
            )
        pkgutil.resolve_name(FORMATS[name].writer)(model, tokenizer, out, record)
