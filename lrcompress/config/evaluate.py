"""Settings of `eval`: what is measured of each model."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from lrcompress.config.base import Section
from lrcompress.config.field_types import (
    CHAT_TEMPLATE_TEXT,
    LOSS_ON_TEXT,
    LossOn,
    NameList,
    PathText,
    TextList,
    none_is_empty,
)

# settings of the comparison with the first model and of continuations: no metric depends on them
DETAIL_FIELDS = frozenset({"compared_windows", "prompts", "continuation_tokens"})


class EvaluateSettings(Section):
    """What is measured, in the same way for every model."""

    perplexity: NameList = Field(("pydoc",), description="Texts to measure token perplexity on.")
    chat_template: str = Field("auto", description=CHAT_TEMPLATE_TEXT)
    loss_on: LossOn = Field("all", description=LOSS_ON_TEXT)
    context_length: int | None = Field(
        None, ge=2, description="Tokens in a window; default 1024, or the model's maximum if less."
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens from the start of one window to the next; default is the "
        "context length: windows do not overlap.",
    )
    tasks: NameList = Field(
        (),
        description="lm-eval tasks: built-in names, FILE.yaml, FILE.jsonl (query, choices, gold), "
        "or a text file, for its rolling word and byte perplexity.",
    )
    limit: int | None = Field(
        None, ge=1, description="Maximum number of windows of each text and documents of each task."
    )
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples before each question of a task."
    )
    apply_chat_template: bool = Field(
        False, description="Ask the questions of tasks as messages, by the chat template."
    )
    system_instruction: str | None = Field(
        None, description="System message, or first text, of every question of a task."
    )
    fewshot_as_multiturn: bool = Field(
        False,
        description="With apply_chat_template, give the examples of tasks as earlier turns.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**32,
        description="Seed of tasks, for few-shot examples and the order of choices; default is "
        "lm-eval's own.",
    )
    data_dir: PathText | None = Field(
        None,
        description="Folder with local copies of the data sets of built-in tasks; with it, nothing "
        "is read from the hub.",
    )
    task_cache: PathText | None = Field(
        None,
        description="Folder that stores the results of tasks, so that no result is computed twice; "
        "default is lrcompress/tasks in the user's cache folder; the text none stores nothing.",
    )
    batch_size: int = Field(
        1, ge=1, description="Sequences in a forward pass, in tasks and in training speed."
    )
    speed: bool = Field(True, description="Measure tokens per second of prefill and decode.")
    prompt_length: int = Field(
        256,
        ge=1,
        description="Tokens in a prompt, and in a training sequence, of speed measurements.",
    )
    new_tokens: int = Field(16, ge=1, description="Tokens that speed measurements generate.")
    repeats: int = Field(
        5, ge=2, description="Speed measurements of each model; the models take turns."
    )
    training_speed: bool = Field(
        False, description="Measure tokens per second of a training step with all parameters."
    )
    compared_windows: int = Field(
        8,
        ge=0,
        description="Windows of each text in which every model is compared with the first model, "
        "token by token and block by block; 0 for no comparison.",
    )
    prompts: TextList = Field(
        (),
        description="Prompts that every model continues; the report shows the texts side by side.",
        json_schema_extra={"flag": "prompt"},
    )
    continuation_tokens: int = Field(
        40, ge=1, description="Tokens that a model adds to each prompt."
    )
    baseline: Annotated[NameList, BeforeValidator(none_is_empty)] = Field(
        (),
        description="Models to compare with; ratios are relative to the first. In a recipe the "
        "default is its own dense model.",
    )

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            raise ValueError("fewshot_as_multiturn needs apply_chat_template: set both")
        if self.apply_chat_template and self.chat_template == "none":
            raise ValueError(
                "apply_chat_template needs a template: set chat_template to auto or a file"
            )
        return self

    def cache_key(self, *, include_baseline: bool = True) -> dict[str, Any]:
        """The settings that metrics depend on, as plain values, for the key of a cached result."""
        excluded = DETAIL_FIELDS | {"task_cache"} | (set() if include_baseline else {"baseline"})
        return self.model_dump(mode="json", exclude=set(excluded))

    def details_cache_key(self) -> dict[str, Any]:
        """The settings that the comparison with the first model and continuations depend on."""
        return self.model_dump(mode="json", include=set(DETAIL_FIELDS))
