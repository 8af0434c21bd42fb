"""The points of a sweep."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from lrcompress.config.base import Section
from lrcompress.config.field_types import Names, Ratios, all_of, variant_name
from lrcompress.config.quantize import WEIGHTS
from lrcompress.methods.registry import METHODS


class SweepSettings(Section):
    """The points of a sweep: every variant at every keep_ratio."""

    keep_ratios: Ratios = Field(
        (0.9, 0.8, 0.6, 0.4),
        min_length=1,
        description="Shares of the parameters kept.",
        json_schema_extra={"flag": "keep_ratio"},
    )
    methods: Annotated[Names, AfterValidator(all_of(METHODS))] = Field(
        (),
        description="Methods, each a variant of the recipe's factorize section.",
        json_schema_extra={"flag": "method"},
    )
    variants: dict[Annotated[str, AfterValidator(variant_name)], dict[str, Any]] = Field(
        {}, description="Name -> keys of factorize and refine that differ from the recipe's."
    )
    quantize: Annotated[Names, AfterValidator(all_of(WEIGHTS))] = Field(
        (),
        description="Measure every point, and the dense model, with such weights too: int8, int4.",
    )
