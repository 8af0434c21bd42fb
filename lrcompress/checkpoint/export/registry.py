"""Registry of export formats: the names that `export --to` accepts.

A new format is a module beside this one with a writer function, and an entry of FORMATS.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportFormat:
    """A form in which a compressed checkpoint can be exported.

    writer: "module:function" that is called with (model, tokenizer, out, record) and writes the new
        folder `out`; a string, so that this module imports no torch.
    summary: a line of the command's help.
    """

    writer: str
    summary: str


FORMATS: dict[str, ExportFormat] = {
    "dense": ExportFormat(
        "lrcompress.checkpoint.export.dense:export_dense",
        "stock layers, for every program that loads the original model",
    ),
    "standalone": ExportFormat(
        "lrcompress.checkpoint.export.standalone:export_standalone",
        "low-rank layers and their code, for loading with trust_remote_code=True",
    ),
}
