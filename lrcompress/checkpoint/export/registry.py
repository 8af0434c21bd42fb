"""Registry of export formats: the names that `export --to` accepts.

A new format is a module beside this one with a writer function, and an entry of FORMATS.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportFormat:
    """A form in which a compressed checkpoint can be exported.

    writer: "module:function" that is called with (model, tokenizer, out, record) and writes the new
        `out`; a string, so that this module imports no torch.
    summary: a line of the command's help.
    suffix: ending of the name of `out` where it is a file; empty where it is a folder.
    extra: the extra of this package that the writer needs, named like the package in it, if any.
    options: keyword arguments of the writer that the user may give.
    takes_dense: a model without compressed layers can be exported too.
    """

    writer: str
    summary: str
    suffix: str = ""
    extra: str | None = None
    options: tuple[str, ...] = ()
    takes_dense: bool = False


FORMATS: dict[str, ExportFormat] = {
    "dense": ExportFormat(
        "lrcompress.checkpoint.export.dense:export_dense",
        "stock layers, for every program that loads the original model",
    ),
    "standalone": ExportFormat(
        "lrcompress.checkpoint.export.standalone:export_standalone",
        "low-rank layers and their code, for loading with trust_remote_code=True",
    ),
    "gguf": ExportFormat(
        "lrcompress.checkpoint.export.gguf_file:export_gguf",
        "one file for llama.cpp, Ollama and LM Studio, of a dense or narrowed model",
        suffix=".gguf",
        extra="gguf",
        options=("like", "type"),
        takes_dense=True,
    ),
}
# values of `export --to gguf --type`; those after bf16 are quantized in groups of 32 weights
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q4_0")
