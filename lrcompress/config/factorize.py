"""Settings of factorization, and of the refinement of single blocks after it."""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from lrcompress.config.base import Section
from lrcompress.config.field_types import (
    NameList,
    Options,
    Percent,
    Share,
    Size,
    allowed_words,
    one_of,
)
from lrcompress.methods.plan import Allocator
from lrcompress.methods.registry import ALLOCATORS, ESTIMATE_LOSS, METHODS
from lrcompress.methods.targets import TARGETS
from lrcompress.methods.types import Form, Method
from lrcompress.runtime.errors import validation_reason

BUDGETS = ("rank", "keep_ratio", "target_params", "target_size", "max_perplexity_increase")


class FactorizeSettings(Section):
    """How FFN weights are compressed, and by how much: exactly one of BUDGETS is set."""

    rank: int | None = Field(None, ge=1, description="The same rank for every linear.")
    keep_ratio: Share | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the parameters of the selected linears to keep, such as 0.6 or 60%.",
    )
    target_params: int | None = Field(
        None, ge=1, description="Parameters of the whole compressed model, such as 100000000."
    )
    target_size: Size | None = Field(
        None, description="Size of the weights of the whole compressed model, such as 1.5GB."
    )
    max_perplexity_increase: Percent | None = Field(
        None,
        description="Find the smallest model whose perplexity on the validation text rises by at "
        "most this share, such as 10%.",
    )
    validation: str = Field(
        "pydoc:validation",
        description="Text on which max_perplexity_increase is measured; never the test text.",
    )
    effort: Literal["quick", "default", "best"] = Field(
        "default",
        description="Defaults of other settings: quick reads less calibration text; best reads "
        "more, and fits anchored.",
    )
    target: Annotated[str, AfterValidator(one_of(TARGETS))] = Field(
        "transformers",
        description=f"Where the model will be served, one of {', '.join(TARGETS)}: forms that it "
        "cannot serve are not chosen.",
    )
    objective: Literal["params", "speed"] = Field(
        "params",
        description="What losses are weighed against: parameters, or the time that each form takes "
        "on this machine; forms slower than dense are then not chosen.",
    )
    method: Annotated[str, AfterValidator(one_of(METHODS))] = Field(
        "auto", description=f"One of {', '.join(METHODS)}; with rank the default is whitened."
    )
    method_options: Options = Field({}, description="Options of the method, such as damping=0.01.")
    ranks: Annotated[str, AfterValidator(one_of(ALLOCATORS))] = Field(
        "loss_aware",
        description=f"Policy that shares out the budget: {', '.join(ALLOCATORS)}; the default is "
        f"uniform with rank and for methods other than {', '.join(ESTIMATE_LOSS)}.",
    )
    ranks_options: Options = Field({}, description="Options of the policy, such as floor=0.1.")
    form: Form = Field(
        "pivoted",
        description="How a low-rank weight is stored; the default is factored with rank and for "
        f"methods other than {', '.join(ESTIMATE_LOSS)}.",
    )
    sequential: Literal["independent", "anchored"] = Field(
        "independent",
        description="anchored fits each linear to its dense outputs, with inputs from the "
        "compressed blocks before it.",
    )
    anchor_damping: float = Field(
        0.3,
        gt=0,
        le=1,
        description="Strength of the pull of anchored fits towards the original weights, relative "
        "to the mean square of each input.",
    )
    streaming: bool = Field(
        False,
        description="Hold only one block and its moments in memory at a time, which takes much "
        "less; an interrupted command resumes.",
    )
    rank_multiple: int = Field(8, ge=1, description="Ranks and widths are multiples of this.")
    include: NameList = Field(
        (), description="Compress only linears whose names match one of these patterns."
    )
    exclude: NameList = Field(
        (), description="Leave linears dense whose names match one of these patterns."
    )
    dense_first: int = Field(0, ge=0, description="Leave this number of first blocks dense.")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Sets `method`, `ranks` and `form`, whose defaults depend on the method and the budget.

        The policy loss_aware needs errors that compare across linears, and a budget other than
        `rank`.
        """
        if not isinstance(values, dict):
            return values
        has_rank = values.get("rank") is not None
        method = values.get("method") or ("whitened" if has_rank else "auto")
        by_loss = method in ESTIMATE_LOSS and not has_rank
        ranks, form = ("loss_aware", "pivoted") if by_loss else ("uniform", "factored")
        return {"method": method, "ranks": ranks, "form": form} | values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(getattr(self, budget) is not None for budget in BUDGETS) != 1:
            raise ValueError(f"set exactly one of {', '.join(BUDGETS)}")
        if self.streaming and self.max_perplexity_increase is not None:
            raise ValueError(
                "max_perplexity_increase measures whole models: with streaming use keep_ratio"
            )
        method, policy = self.build_method(), self.allocator()
        if self.rank is not None and (policy.needs_errors or not method.truncates):
            raise ValueError(
                f"rank does not go with {self.method} and {self.ranks}: use keep_ratio"
            )
        if policy.needs_errors and not method.estimates_errors:
            raise ValueError(
                f"{self.ranks} does not go with {self.method}, which estimates no loss: use uniform"
            )
        if not TARGETS[self.target].low_rank:
            self._check_narrows(method)
        if self.objective == "speed" and not policy.needs_errors:
            raise ValueError(
                f"objective speed does not go with {self.ranks}, which weighs nothing: use "
                "loss_aware, with a method such as auto"
            )
        return self

    def _check_narrows(self, method: Method) -> None:
        """Raises ValueError where low rank is asked for, which the target cannot serve."""
        if self.rank is not None:
            raise ValueError(
                f"rank asks for low-rank layers, which --for {self.target} leaves out: use "
                "keep_ratio"
            )
        if not method.narrows:
            raise ValueError(
                f"{self.method} makes low-rank layers, which --for {self.target} leaves out: use "
                "auto, nystrom or another method that narrows"
            )

    def build_method(self) -> Method:
        """The compression method with its options."""
        return _build(METHODS, self.method, self.method_options, "method_options")  # type: ignore[no-any-return]

    def allocator(self) -> Allocator:
        """The rank policy with its options."""
        return _build(ALLOCATORS, self.ranks, self.ranks_options, "ranks_options")  # type: ignore[no-any-return]


class RefineSettings(Section):
    """Training of one block at a time, towards the output of the dense block."""

    enabled: bool = Field(
        False,
        description="Train each block's compressed layers towards the output of the dense block.",
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
        description="Learning rate of Adam, relative to the root mean square of each weight and to "
        "the error of the block.",
        json_schema_extra={"flag": "refine_learning_rate"},
    )


def _build(registry: Mapping[str, str], name: str, options: Mapping[str, Any], key: str) -> Any:
    """An instance of the class that `registry` has for `name`; ValueError for bad options."""
    cls = pkgutil.resolve_name(registry[name])
    fields = {field.name for field in dataclasses.fields(cls)}
    for option in options:
        if option not in fields:
            raise ValueError(
                f"{key}: {name!r} has no option {option!r}{allowed_words(option, fields)}"
            )
    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        raise ValueError(f"{key} {validation_reason(error)}") from None
