"""Settings of `sweep`: which points it measures."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from lrcompress.config.base import Section
from lrcompress.config.field_types import NameList, RatioList, all_of, variant_name
from lrcompress.config.quantize import WEIGHTS
from lrcompress.methods.registry import METHODS


class SweepSettings(Section):
    """A sweep measures every variant at every keep_ratio."""

    keep_ratios: RatioList = Field(
        (0.9, 0.8, 0.6, 0.4),
        min_length=1,
        description="Shares of the parameters to keep.",
        json_schema_extra={"flag": "keep_ratio"},
    )
    methods: Annotated[NameList, AfterValidator(all_of(METHODS))] = Field(
        (),
        description="Methods; each is a variant with the recipe's other settings.",
        json_schema_extra={"flag": "method"},
    )
    variants: dict[Annotated[str, AfterValidator(variant_name)], dict[str, Any]] = Field(
        {}, description="Name -> keys of factorize and refine that differ from the recipe."
    )
    quantize: Annotated[NameList, AfterValidator(all_of(WEIGHTS))] = Field(
        (),
        description="Measure every point and the dense model also with these weights: int8, int4.",
    )
