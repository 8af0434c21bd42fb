"""What a user can set, section by section: types, ranges, defaults and help in one place.

The command line makes its flags of these fields, recipe files their keys, and the Python functions
their keyword arguments.
"""

from __future__ import annotations

import dataclasses
import difflib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from lrcompress.allocators import ALLOCATORS
from lrcompress.factorizers import ESTIMATE_LOSS, FACTORIZERS
from lrcompress.protocols import Allocator, Form, Method


def _split(value: object) -> object:
    """'a,b' or ['a', 'b,c'] -> separate items, so that flags and YAML read alike."""
    items = [value] if isinstance(value, str | int | float) else value
    if not isinstance(items, list | tuple):
        return value
    parts = [i.split(",") if isinstance(i, str) else [i] for i in items]
    return [p.strip() if isinstance(p, str) else p for part in parts for p in part if p != ""]


def _pairs(value: object) -> object:
    """['damping=0.01'] -> {'damping': 0.01}, for flags that set options of a method."""
    if not isinstance(value, list | tuple):
        return value
    pairs = [str(item).partition("=") for item in value]
    try:
        return {key.strip(): yaml.safe_load(text) for key, _, text in pairs}
    except yaml.YAMLError:
        raise ValueError(f"{value!r} cannot be read: write KEY=VALUE") from None


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
    allowed = list(names)

    def check(name: str) -> str:
        if name not in allowed:
            raise ValueError(f"{name!r} is unknown, choose from {', '.join(allowed)}")
        return name

    return check


def _all_of(names: Iterable[str]) -> Callable[[tuple[str, ...]], tuple[str, ...]]:
    check = _one_of(names)

    def check_all(given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check(name) for name in given)

    return check_all


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Ratios = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(_split)]
Options = Annotated[dict[str, Any], BeforeValidator(_pairs)]
BUDGETS = ("rank", "keep_ratio", "target_params", "target_size", "max_perplexity_increase")
UNITS = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(value: object) -> object:
    """'1.5GB' -> 1500000000."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", str(value))
    if found is None or found[2].upper() not in UNITS or found[1].count(".") > 1:
        raise ValueError(f"{value!r} is no size, write it like 1.5GB, 900MB or 1200000000")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _percent(value: object) -> object:
    """'10%' -> 0.1; a bare number is the share itself."""
    text = str(value).strip()
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{value!r} is no share, write it like 10% or 0.1") from None


Size = Annotated[int, BeforeValidator(_bytes), Field(ge=1)]
Percent = Annotated[float, BeforeValidator(_percent), Field(gt=0)]


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
        ("pydoc",),
        min_length=1,
        description="FILE.txt, FILE.jsonl[:field], pydoc, self (the model writes it), or hub "
        "name[:config[:split[:field]]]; several give equal shares.",
        json_schema_extra={"flag": "calibration"},
    )
    num_samples: int = Field(24, ge=1, description="Blocks of text.")
    gradient_samples: int = Field(
        16,
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
    method: Annotated[str, AfterValidator(_one_of(FACTORIZERS))] = Field(
        "whitened", description=f"One of {', '.join(FACTORIZERS)}."
    )
    method_options: Options = Field({}, description="KEY=VALUE for the method, such as damping.")
    ranks: Annotated[str, AfterValidator(_one_of(ALLOCATORS))] = Field(
        "uniform",
        description=f"Policy that shares out the budget: {', '.join(ALLOCATORS)}; loss_aware is "
        f"the default of {', '.join(ESTIMATE_LOSS)}.",
    )
    ranks_options: Options = Field({}, description="KEY=VALUE for the policy.")
    form: Form = Field(
        "factored",
        description="How a low-rank weight is stored; pivoted is the default of "
        f"{', '.join(ESTIMATE_LOSS)}.",
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
        """Methods whose errors compare across linears share out the budget by them."""
        if not isinstance(values, dict):
            return values
        method = values.get("method") or "whitened"
        modern = method in ESTIMATE_LOSS and values.get("rank") is None
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
        4,
        ge=1,
        description="Passes over the calibration text.",
        json_schema_extra={"flag": "refine_epochs"},
    )
    learning_rate: float = Field(
        0.01,
        gt=0,
        le=1,
        description="Step of Adam, relative to the root mean square of each weight.",
        json_schema_extra={"flag": "refine_learning_rate"},
    )


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
        description="Shares of the parameters kept.",
        json_schema_extra={"flag": "keep_ratio"},
    )
    methods: Annotated[Names, AfterValidator(_all_of(FACTORIZERS))] = Field(
        (),
        description="Methods, each a variant of the recipe's factorize section.",
        json_schema_extra={"flag": "method"},
    )
    variants: dict[str, dict[str, Any]] = Field(
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


def allowed_words(name: str, names: Iterable[str]) -> str:
    """The words after "unknown": the nearest name and all that are allowed."""
    close = difflib.get_close_matches(name, names, 1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"{hint} (allowed: {', '.join(sorted(names)) or 'none'})"
