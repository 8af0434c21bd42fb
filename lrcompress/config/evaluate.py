"""What is measured, of one model or of many."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field

from lrcompress.config.base import Section
from lrcompress.config.field_types import Listed, Names, none_is_empty


class EvaluateSettings(Section):
    """What is measured, for every model alike."""

    perplexity: Names = Field(("pydoc",), description="Texts to measure token perplexity on.")
    context_length: int | None = Field(
        None, ge=2, description="Tokens in a window; default 1024, or the model's maximum if less."
    )
    stride: int | None = Field(
        None, ge=1, description="Tokens between windows; default is the context length, no overlap."
    )
    tasks: Names = Field(
        (),
        description="lm-eval tasks: built-in names, FILE.yaml, FILE.jsonl (query, choices, gold), "
        "or a text, which gives rolling word and byte perplexity.",
    )
    limit: int | None = Field(
        None, ge=1, description="At most this many windows of each text and documents of each task."
    )
    num_fewshot: int | None = Field(None, ge=0, description="Examples before each task question.")
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="Of tasks: few-shot examples, order of choices; default is lm-eval's own.",
    )
    data_dir: str | None = Field(
        None,
        description="Folder with local copies of the data sets of built-in tasks; then none is "
        "read from the hub.",
    )
    task_cache: str | None = Field(
        None,
        description="Folder that keeps the results of tasks, so that none is computed twice; "
        "default is lrcompress/tasks in the user's cache, none keeps nothing.",
    )
    batch_size: int = Field(
        1, ge=1, description="Sequences per forward pass in tasks and in training speed."
    )
    speed: bool = Field(True, description="Measure prefill and decode tokens per second.")
    prompt_length: int = Field(
        256, ge=1, description="Tokens of prompt, and of a sequence, in speed measurements."
    )
    new_tokens: int = Field(16, ge=1, description="Tokens generated in speed measurements.")
    repeats: int = Field(5, ge=2, description="Speed measurements of each model, in alternation.")
    training_speed: bool = Field(
        False, description="Measure tokens per second of a training step of every parameter."
    )
    compared_windows: int = Field(
        8,
        ge=0,
        description="Windows of each text in which models are compared with the first token by "
        "token and block by block; 0 for none.",
    )
    prompts: Listed = Field(
        (),
        description="Prompts that every model continues, side by side in the report.",
        json_schema_extra={"flag": "prompt"},
    )
    continuation_tokens: int = Field(40, ge=1, description="Tokens that continue a prompt.")
    baseline: Annotated[Names, BeforeValidator(none_is_empty)] = Field(
        (),
        description="Models to compare with; ratios are over the first. A recipe's is its own "
        "dense model.",
    )
