"""The ladder of a scaling study: which models are trained from scratch, and how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lrcompress.config.base import Section
from lrcompress.config.field_types import Names, size_name, variant_name


class SizeSettings(Section):
    """One size of the ladder: what is not set is the recipe's `pretrain` section's."""

    seeds: int = Field(1, ge=1, description="Models of each variant, with seeds from 0.")
    learning_rate: float | None = Field(None, gt=0, description="Peak rate at this size.")


class ScalingSettings(Section):
    """Every size with every variant and seed, at equal tokens per parameter."""

    sizes: dict[Annotated[str, AfterValidator(size_name)], SizeSettings] = Field(
        min_length=3, description="Preset, or folder with a config.json -> seeds, learning_rate."
    )
    variants: dict[Annotated[str, AfterValidator(variant_name)], dict[str, Any]] = Field(
        description="Name -> keys of pretrain that differ; the dense models are there anyway.",
        min_length=1,
    )
    tokens_per_parameter: float = Field(
        20.0, gt=0, description="Training tokens for each non-embedding parameter."
    )
    counted: Literal["own", "dense"] = Field(
        "own",
        description="Whose parameters these are: each model's own, or those of the dense model.",
    )
    equal_flops: dict[str, str] = Field(
        {}, description="Variant -> variant whose training FLOPs at each size it is held to."
    )
    test: Names = Field(
        (),
        description="Texts to measure on; default is the part for testing of the training texts.",
    )
    test_sequences: int = Field(64, ge=1, description="Sequences of text to measure on.")
    measurements: int = Field(8, ge=1, description="Measurements and checkpoints in each training.")
    resamples: int = Field(1000, ge=50, description="Of the bootstrap intervals.")
    speed_repeats: int = Field(
        5, ge=0, description="Measurements of training speed at the largest size; 0 for none."
    )

    @model_validator(mode="after")
    def _names(self) -> Self:
        for pair in self.equal_flops.items():
            for name in pair:
                if name not in self.variants:
                    raise ValueError(f"equal_flops: {name!r} is none of the variants")
        return self
