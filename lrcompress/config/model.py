"""Which model, and the text on which it is calibrated."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lrcompress.config.base import Section
from lrcompress.config.field_types import Names


class ModelSettings(Section):
    """Which model, and how it is loaded."""

    source: str = Field(description="Folder, .gguf file, hub id or package:NAME/FILE.")
    gguf_file: str | None = Field(None, description="GGUF file inside the folder or hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision to load and save in; auto is the file's own."
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes GPUs if any.")
    trust_remote_code: bool = Field(False, description="Run Python code that the model ships.")


class CalibrationSettings(Section):
    """Text on which the inputs of the FFN layers are measured."""

    data: Names = Field(
        ("self",),
        min_length=1,
        description="FILE.txt, FILE.jsonl[:field], pydoc, package:NAME, self (the model writes "
        "it), or hub name[:config[:split[:field]]]; several give equal shares.",
        json_schema_extra={"flag": "calibration"},
    )
    num_samples: int | None = Field(
        None,
        ge=1,
        description="Blocks of text; default 50 or what the text holds, 20 of the model's own.",
    )
    gradient_samples: int = Field(
        8,
        ge=1,
        description="Of these, blocks with a backward pass, for methods that weigh by the loss.",
    )
    seq_len: int | None = Field(
        None, ge=2, description="Tokens in a block; default 1024, or the model's maximum if less."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Chooses the blocks.")
