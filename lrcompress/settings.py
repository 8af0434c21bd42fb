"""What a user can set, section by section: types, ranges, defaults and help in one place.

The command line makes its flags of these fields, recipe files their keys, and the Python functions
their keyword arguments.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from lrcompress.allocators import ALLOCATORS
from lrcompress.factorizers import ESTIMATE_LOSS, FACTORIZERS
from lrcompress.protocols import Allocator, Form, Method
from lrcompress.values import (
    Names,
    Options,
    Percent,
    Ratios,
    Size,
    all_of,
    allowed_words,
    one_of,
    variant_name,
)

BUDGETS = ("rank", "keep_ratio", "target_params", "target_size", "max_perplexity_increase")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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
        description="FILE.txt, FILE.jsonl[:field], pydoc, self (the model writes it), or hub "
        "name[:config[:split[:field]]]; several give equal shares.",
        json_schema_extra={"flag": "calibration"},
    )
    num_samples: int | None = Field(
        None,
        ge=1,
        description="Blocks of text; default 50 or what the text holds, 20 of the model's own.",
    )
    gradient_samples: int = Field(
        12,
        ge=1,
        description="Of these, blocks with a backward pass, for methods that weigh by the loss.",
    )
    seq_len: int | None = Field(
        None, ge=2, description="Tokens in a block; default 1024, or the model's maximum if less."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Chooses the blocks.")


class FactorizeSettings(Section):
    """How the FFN weights are shrunk, and by how much: exactly one budget is set."""

    rank: int | None = Field(None, ge=1, description="One rank for every linear.")
    keep_ratio: float | None = Field(
        None, gt=0, le=1, description="Share of the parameters kept in the selected linears."
    )
    target_params: int | None = Field(
        None, ge=1, description="Parameters of the whole model, such as 100000000."
    )
    target_size: Size | None = Field(
        None, description="Bytes of the whole model's weights, such as 1.5GB."
    )
    max_perplexity_increase: Percent | None = Field(
        None, description="Searches the smallest model that stays within it, such as 10%."
    )
    validation: str = Field(
        "pydoc:validation",
        description="Text on which max_perplexity_increase is held; never the test text.",
    )
    method: Annotated[str, AfterValidator(one_of(FACTORIZERS))] = Field(
        "auto", description=f"One of {', '.join(FACTORIZERS)}; with rank the default is whitened."
    )
    method_options: Options = Field({}, description="KEY=VALUE for the method, such as damping.")
    ranks: Annotated[str, AfterValidator(one_of(ALLOCATORS))] = Field(
        "loss_aware",
        description=f"Policy that shares out the budget: {', '.join(ALLOCATORS)}; uniform is the "
        f"default of methods other than {', '.join(ESTIMATE_LOSS)}.",
    )
    ranks_options: Options = Field({}, description="KEY=VALUE for the policy.")
    form: Form = Field(
        "pivoted",
        description="How a low-rank weight is stored; factored is the default of methods other "
        f"than {', '.join(ESTIMATE_LOSS)}.",
    )
    sequential: Literal["independent", "anchored"] = Field(
        "independent",
        description="anchored fits each linear to the dense outputs, given what the blocks before "
        "it have become.",
    )
    anchor_damping: float = Field(
        1e-3, gt=0, le=1, description="Pull of anchored fits towards the original weights."
    )
    rank_multiple: int = Field(8, ge=1, description="Ranks and widths are multiples of this.")
    include: Names = Field((), description="Only linears whose names match these patterns.")
    exclude: Names = Field((), description="No linears whose names match these patterns.")
    dense_first: int = Field(0, ge=0, description="Leave this many first blocks dense.")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Methods whose errors compare across linears share out the budget by them.

        One rank for every linear is what it says: truncated SVD, whitened.
        """
        if not isinstance(values, dict):
            return values
        ranked = values.get("rank") is not None
        method = values.get("method") or ("whitened" if ranked else "auto")
        modern = method in ESTIMATE_LOSS and not ranked
        ranks, form = ("loss_aware", "pivoted") if modern else ("uniform", "factored")
        return {"method": method, "ranks": ranks, "form": form} | values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(getattr(self, budget) is not None for budget in BUDGETS) != 1:
            raise ValueError(f"set exactly one of {', '.join(BUDGETS)}")
        method, policy = self.compressor(), self.allocator()
        if self.rank is not None and (policy.needs_errors or not method.truncates):
            raise ValueError(
                f"rank does not go with {self.method} and {self.ranks}: use keep_ratio"
            )
        return self

    def compressor(self) -> Method:
        return _build(FACTORIZERS, self.method, self.method_options, "method_options")  # type: ignore[no-any-return]

    def allocator(self) -> Allocator:
        return _build(ALLOCATORS, self.ranks, self.ranks_options, "ranks_options")  # type: ignore[no-any-return]


class RefineSettings(Section):
    """Gradient steps on one block at a time, towards the dense block's output."""

    enabled: bool = Field(
        False,
        description="Train each block's compressed layers towards the dense block's output.",
        json_schema_extra={"flag": "refine"},
    )
    epochs: int = Field(
        2,
        ge=1,
        description="Passes over the calibration text.",
        json_schema_extra={"flag": "refine_epochs"},
    )
    learning_rate: float = Field(
        0.02,
        gt=0,
        le=1,
        description="Step of Adam, relative to the root mean square of each weight and to the "
        "block's error.",
        json_schema_extra={"flag": "refine_learning_rate"},
    )


class FinetuneSettings(Section):
    """Training of a compressed model towards its dense teacher."""

    data: Names = Field(
        (),
        description="Texts to train on, as for calibration; never the test text.",
    )
    teacher: str | None = Field(
        None, description="Dense model to learn from; default is the one that was compressed."
    )
    max_steps: int = Field(200, ge=1, description="Optimizer steps.")
    batch_size: int = Field(
        2, ge=1, description="Sequences in an optimizer step, over all processes and passes."
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="Forward passes that a process splits its share of a step into."
    )
    shard: bool = Field(
        False,
        description="Split parameters, gradients and optimizer state over the processes (FSDP2).",
    )
    train_length: int | None = Field(
        None, ge=2, description="Tokens in a sequence; default 512, or the model's maximum if less."
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak rate of AdamW.")
    temperature: float = Field(1.0, gt=0, description="Softens both distributions.")
    cross_entropy: float = Field(
        0.0, ge=0, description="Weight of the language-model loss beside the divergence."
    )
    train: Literal["factors", "norms", "all"] = Field(
        "factors", description="factors: compressed layers; norms: and norms; all: everything."
    )
    held_out: int = Field(8, ge=1, description="Sequences on which the best step is chosen.")
    eval_every: int = Field(20, ge=1, description="Steps between measurements and checkpoints.")
    seed: int = Field(0, ge=0, lt=2**32, description="Chooses the sequences and their order.")


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
    batch_size: int = Field(1, ge=1, description="Sequences per forward pass in tasks.")
    speed: bool = Field(True, description="Measure prefill and decode tokens per second.")
    prompt_length: int = Field(256, ge=1, description="Tokens of prompt in speed measurements.")
    new_tokens: int = Field(16, ge=1, description="Tokens generated in speed measurements.")
    repeats: int = Field(5, ge=2, description="Speed measurements of each model, in alternation.")
    baseline: str | None = Field(
        None, description="Dense model to compare with; a recipe's is its own model."
    )


class SweepSettings(Section):
    """The points of a sweep: every variant at every keep_ratio."""

    keep_ratios: Ratios = Field(
        (0.9, 0.8, 0.6, 0.4),
        min_length=1,
        description="Shares of the parameters kept.",
        json_schema_extra={"flag": "keep_ratio"},
    )
    methods: Annotated[Names, AfterValidator(all_of(FACTORIZERS))] = Field(
        (),
        description="Methods, each a variant of the recipe's factorize section.",
        json_schema_extra={"flag": "method"},
    )
    variants: dict[Annotated[str, AfterValidator(variant_name)], dict[str, Any]] = Field(
        {}, description="Name -> keys of factorize and refine that differ from the recipe's."
    )


def _build(registry: Mapping[str, str], name: str, options: Mapping[str, Any], key: str) -> Any:
    kind = pkgutil.resolve_name(registry[name])
    fields = {field.name for field in dataclasses.fields(kind)}
    for option in options:
        if option not in fields:
            raise ValueError(
                f"{key}: {name!r} has no option {option!r}{allowed_words(option, fields)}"
            )
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or name
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{key} {where}: {message}") from None
