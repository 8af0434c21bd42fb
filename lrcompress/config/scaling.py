"""Settings of a scaling study: which models are trained from scratch, and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lrcompress.config.base import Section
from lrcompress.config.field_types import NameList, size_name, variant_name


class SizeSettings(Section):
    """One model size; other settings come from the recipe's section `pretrain`."""

    seeds: int = Field(
        1, ge=1, description="Number of models of each variant, with seeds 0, 1, ..."
    )
    learning_rate: float | None = Field(None, gt=0, description="Peak learning rate at this size.")


class ScalingSettings(Section):
    """A study of every size with every variant and seed, at equal tokens per parameter."""

    sizes: dict[Annotated[str, AfterValidator(size_name)], SizeSettings] = Field(
        min_length=3,
        description="Preset, or folder with a config.json -> its seeds and learning_rate.",
    )
    variants: dict[Annotated[str, AfterValidator(variant_name)], dict[str, Any]] = Field(
        description="Name -> keys of pretrain that differ; the dense models are always trained.",
        min_length=1,
    )
    tokens_per_parameter: float = Field(
        20.0, gt=0, description="Training tokens for each non-embedding parameter."
    )
    counted: Literal["own", "dense"] = Field(
        "own",
        description="Which parameters count: those of each model (own), or of the dense model.",
    )
    equal_flops: dict[str, str] = Field(
        {}, description="Variant -> variant whose training FLOPs it gets at each size."
    )
    test: NameList = Field(
        (),
        description="Texts to measure on; default is the test part of the training texts.",
    )
    test_sequences: int = Field(64, ge=1, description="Sequences of the test texts to measure on.")
    measurements: int = Field(
        8, ge=1, description="Measurements, each with a checkpoint, in each training."
    )
    resamples: int = Field(1000, ge=50, description="Resamples for the bootstrap intervals.")
    speed_repeats: int = Field(
        5, ge=0, description="Measurements of training speed at the largest size; 0 for none."
    )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for pair in self.equal_flops.items():
            for name in pair:
                if name not in self.variants:
                    raise ValueError(f"equal_flops: {name!r} is not one of the variants")
        return self
