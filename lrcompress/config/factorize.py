"""How a model is made smaller without training through the whole of it."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from lrcompress.config.base import Section
from lrcompress.config.field_types import Names, Options, Percent, Size, allowed_words, one_of
from lrcompress.methods.plan import Allocator
from lrcompress.methods.registry import ALLOCATORS, ESTIMATE_LOSS, METHODS
from lrcompress.methods.types import Form, Method
from lrcompress.runtime.errors import validation_reason

BUDGETS = ("rank", "keep_ratio", "target_params", "target_size", "max_perplexity_increase")


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
    method: Annotated[str, AfterValidator(one_of(METHODS))] = Field(
        "auto", description=f"One of {', '.join(METHODS)}; with rank the default is whitened."
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
        0.3,
        gt=0,
        le=1,
        description="Pull of anchored fits towards the original weights, relative to each input's "
        "mean square.",
    )
    streaming: bool = Field(
        False,
        description="Hold one block in memory at a time, for models larger than memory; resumes.",
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
        if self.streaming and self.max_perplexity_increase is not None:
            raise ValueError(
                "max_perplexity_increase measures whole models: with streaming use keep_ratio"
            )
        method, policy = self.compressor(), self.allocator()
        if self.rank is not None and (policy.needs_errors or not method.truncates):
            raise ValueError(
                f"rank does not go with {self.method} and {self.ranks}: use keep_ratio"
            )
        return self

    def compressor(self) -> Method:
        return _build(METHODS, self.method, self.method_options, "method_options")  # type: ignore[no-any-return]

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
        0.004,
        gt=0,
        le=1,
        description="Step of Adam, relative to the root mean square of each weight and to the "
        "block's error.",
        json_schema_extra={"flag": "refine_learning_rate"},
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
        raise ValueError(f"{key} {validation_reason(error)}") from None
