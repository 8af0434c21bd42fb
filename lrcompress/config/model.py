"""Settings of loading a model, and of the text for its calibration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lrcompress.config.base import Section
from lrcompress.config.field_types import CHAT_TEMPLATE_TEXT, LossOn, NameList


class ModelSettings(Section):
    """Which model, and how it is loaded."""

    source: str = Field(description="Folder, .gguf file, hub id or package:NAME/FILE.")
    gguf_file: str | None = Field(None, description="GGUF file inside the folder or hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision to load and save in; auto is that of the file."
    )
    device: str = Field(
        "auto", description="cpu, cuda, cuda:1, ...; auto uses GPUs if there are any."
    )
    trust_remote_code: bool = Field(False, description="Run Python code from the model's folder.")


class CalibrationSettings(Section):
    """The text on which inputs and gradients of FFN layers are measured."""

    data: NameList = Field(
        ("self",),
        min_length=1,
        description="Texts: FILE[:field] (txt, jsonl, csv, parquet, ...), pydoc, package:NAME, "
        "self (the model writes it), or hub name[:config[:split[:field]]]; several texts give "
        "equal shares.",
        json_schema_extra={"flag": "calibration"},
    )
    chat_template: str = Field("auto", description=CHAT_TEMPLATE_TEXT)
    loss_on: LossOn = Field(
        "all",
        description="Tokens whose predictions have gradients: all, or those of the answers in "
        "conversations, as the chat template tells them.",
    )
    num_samples: int | None = Field(
        None,
        ge=1,
        description="Samples of text; a text that has fewer is refused.",
    )
    max_samples: int = Field(
        50, ge=1, description="Without num_samples: samples of text, or all that it has if less."
    )
    max_generated_samples: int = Field(
        20, ge=1, description="The same where the model writes all the text, which takes longer."
    )
    gradient_samples: int = Field(
        8,
        ge=1,
        description="Samples that also get a backward pass, for methods that estimate the loss.",
    )
    seq_len: int | None = Field(
        None, ge=2, description="Tokens in a sample; default 1024, or the model's maximum if less."
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed for the choice of samples and for the text of self."
    )
