"""Loads a model, quantizes its weights and saves it to a new folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from lrcompress.checkpoint.folder import save_checkpoint
from lrcompress.checkpoint.record import drop_measured, record_of
from lrcompress.config import ModelSettings, QuantizeSettings
from lrcompress.layers.model_info import model_kind, weight_bytes
from lrcompress.layers.nonfinite import check_weights_finite
from lrcompress.models.loading import load_model
from lrcompress.models.torchao import quantize
from lrcompress.runtime import locks


def quantize_to(source: ModelSettings, settings: QuantizeSettings, out: Path) -> dict[str, Any]:
    """Writes the model with quantized weights to `out`; returns the content of its lrcompress.json.

    Raises InputError where the model cannot be quantized, a weight is not finite, or `out` exists.
    """
    with locks.beside(out):
        record = record_of(source) or {"source": source.source}
        drop_measured(record)
        model, tokenizer = load_model(source)
        check_weights_finite(model_kind(model), model)
        before = weight_bytes(model)
        names = quantize(model, settings.weights)
        record["quantized"] = {
            "from": source.source,
            "weights": settings.weights,
            "linears": len(names),
            "bytes_before": before,
            "bytes": weight_bytes(model),
            "torchao": version("torchao"),
        }
        return save_checkpoint(model, tokenizer, out, record)
