"""What `bench` times: an FFN alone, or a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from lrcompress.config.base import Section
from lrcompress.config.field_types import Counts, Names, Ratios, all_of, not_empty

FORMS = ("factored", "pivoted", "narrowed")
PATHS = ("plain", "optimized", "compiled")
PRECISIONS = ("float32", "bfloat16", "float16")

# settings by name; what is given beside one of them counts more
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "width": 5120,
        "ffn_width": 20480,
        "gated": False,
        "keep_ratios": (0.32,),
        "tokens": (30_000,),
        "dtypes": ("bfloat16",),
    }
}


class FFNBenchSettings(Section):
    """One FFN, dense and compressed, with random weights."""

    preset: Literal["paper"] | None = Field(
        None,
        description="The setting of published figures: width 5120, ffn-width 20480, no gate, "
        "keep 0.32, 30,000 tokens, bfloat16.",
    )
    width: int = Field(2048, ge=32, description="Entries of the FFN's input and output.")
    ffn_width: int | None = Field(
        None, ge=32, description="Intermediate channels; default is 4 times the width."
    )
    gated: bool = Field(True, description="With gate, up and down; else with up and down.")
    keep_ratios: Annotated[Ratios, AfterValidator(not_empty)] = Field(
        (0.32, 0.6, 0.8),
        description="Shares of the FFN's parameters kept.",
        json_schema_extra={"flag": "keep_ratio"},
    )
    tokens: Annotated[Counts, AfterValidator(not_empty)] = Field(
        (1, 1024), description="Tokens in a pass."
    )
    dtypes: Annotated[Names, AfterValidator(all_of(PRECISIONS)), AfterValidator(not_empty)] = Field(
        ("float32", "bfloat16"),
        description="Precisions: float32, bfloat16, float16.",
        json_schema_extra={"flag": "dtype"},
    )
    forms: Annotated[Names, AfterValidator(all_of(FORMS)), AfterValidator(not_empty)] = Field(
        FORMS,
        description="Of factored, pivoted, narrowed.",
        json_schema_extra={"flag": "form"},
    )
    rank_multiple: int = Field(
        16, ge=1, description="Ranks and widths are multiples of this, which matrix kernels want."
    )
    paths: Annotated[Names, AfterValidator(all_of(PATHS)), AfterValidator(not_empty)] = Field(
        ("optimized",),
        description="How low-rank layers run: plain, as they load; optimized, as "
        "lrcompress.optimize makes them; compiled, by torch.compile after that, against the "
        "compiled dense FFN.",
        json_schema_extra={"flag": "path"},
    )
    backward: bool = Field(False, description="Also time the forward and backward pass.")
    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU if any.")
    repeats: int = Field(7, ge=3, description="Timings of each, in alternation.")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        known = PRESETS.get(values.get("preset") or "", {}) if isinstance(values, dict) else {}
        return {**known, **values} if known else values

    @property
    def channels(self) -> int:
        return 4 * self.width if self.ffn_width is None else self.ffn_width


class ModelBenchSettings(Section):
    """A whole model beside its dense baseline."""

    baseline: str | None = Field(
        None, description="Dense model; default is the one that MODEL was made of."
    )
    batch_sizes: Annotated[Counts, AfterValidator(not_empty)] = Field(
        (1, 8),
        description="Sequences in prefill and decode.",
        json_schema_extra={"flag": "batch_size"},
    )
    prompt_length: int = Field(256, ge=1, description="Tokens of a prompt.")
    new_tokens: int = Field(16, ge=1, description="Tokens that decode adds to each sequence.")
    training: bool = Field(True, description="Time a forward and backward pass of all parameters.")
    training_batch_size: int = Field(1, ge=1, description="Sequences in that pass.")
    training_length: int = Field(256, ge=2, description="Tokens of each of them.")
    optimize: bool = Field(True, description="Time MODEL as lrcompress.optimize makes it.")
    repeats: int = Field(5, ge=3, description="Timings of each model, in alternation.")
