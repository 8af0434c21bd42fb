"""Export formats by the names that `--to` takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportFormat:
    """`writer` is "module:function" of (model, tokenizer, out, record); a string, so that reading
    the names imports no torch. `summary` is a line of the command's help."""

    writer: str
    summary: str


FORMATS = {
    "dense": ExportFormat(
        "lrcompress.checkpoint.export.dense:export_dense",
        "stock layers, which anything loads that loads the original model",
    ),
    "standalone": ExportFormat(
        "lrcompress.checkpoint.export.standalone:export_standalone",
        "low-rank layers with the code that loads them, by trust_remote_code=True",
    ),
}
