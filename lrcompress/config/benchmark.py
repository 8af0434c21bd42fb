"""Settings of `bench`: the speed of one FFN, of a whole model, or of a model where it is served."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from lrcompress.config.base import Section
from lrcompress.config.field_types import CountList, NameList, RatioList, all_of, not_empty

FORMS = ("factored", "pivoted", "narrowed")
PATHS = ("plain", "optimized", "compiled")
PRECISIONS = ("float32", "bfloat16", "float16")

# preset -> its settings; a setting that the user gives replaces that of the preset
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
    """`bench ffn`: one FFN with random weights, dense and compressed."""

    preset: Literal["paper"] | None = Field(
        None,
        description="The settings of a published figure: width 5120, ffn-width 20480, no gate, "
        "keep 0.32, 30,000 tokens, bfloat16.",
    )
    width: int = Field(2048, ge=32, description="Size of the FFN's input and output.")
    ffn_width: int | None = Field(
        None, ge=32, description="Intermediate channels; default is 4 times the width."
    )
    gated: bool = Field(True, description="FFN with gate, up and down; else with up and down only.")
    keep_ratios: Annotated[RatioList, AfterValidator(not_empty)] = Field(
        (0.32, 0.6, 0.8),
        description="Shares of the FFN's parameters to keep.",
        json_schema_extra={"flag": "keep_ratio"},
    )
    tokens: Annotated[CountList, AfterValidator(not_empty)] = Field(
        (1, 1024), description="Tokens in a forward pass."
    )
    dtypes: Annotated[NameList, AfterValidator(all_of(PRECISIONS)), AfterValidator(not_empty)] = (
        Field(
            ("float32", "bfloat16"),
            description="Precisions: float32, bfloat16, float16.",
            json_schema_extra={"flag": "dtype"},
        )
    )
    forms: Annotated[NameList, AfterValidator(all_of(FORMS)), AfterValidator(not_empty)] = Field(
        FORMS,
        description="Compressed forms: factored, pivoted, narrowed.",
        json_schema_extra={"flag": "form"},
    )
    rank_multiple: int = Field(
        16,
        ge=1,
        description="Ranks and widths are multiples of this; matrix kernels prefer such sizes.",
    )
    paths: Annotated[NameList, AfterValidator(all_of(PATHS)), AfterValidator(not_empty)] = Field(
        ("optimized",),
        description="How low-rank layers run. plain: as loaded; optimized: after "
        "lrcompress.optimize; compiled: after lrcompress.optimize and torch.compile, compared with "
        "the compiled dense FFN.",
        json_schema_extra={"flag": "path"},
    )
    backward: bool = Field(
        False, description="Also measure the time of a forward and backward pass."
    )
    device: str = Field(
        "auto", description="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one."
    )
    repeats: int = Field(7, ge=3, description="Measurements of each FFN; the FFNs take turns.")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        preset = PRESETS.get(values.get("preset") or "", {}) if isinstance(values, dict) else {}
        return {**preset, **values} if preset else values

    @property
    def channels(self) -> int:
        """Intermediate channels of the dense FFN."""
        return 4 * self.width if self.ffn_width is None else self.ffn_width


class ModelBenchSettings(Section):
    """`bench model`: a whole model and its dense baseline."""

    baseline: str | None = Field(
        None,
        description="Dense model to compare with; default is the one that MODEL was made from.",
    )
    batch_sizes: Annotated[CountList, AfterValidator(not_empty)] = Field(
        (1, 8),
        description="Sequences in a batch in prefill and decode.",
        json_schema_extra={"flag": "batch_size"},
    )
    prompt_length: int = Field(256, ge=1, description="Tokens in a prompt.")
    new_tokens: int = Field(16, ge=1, description="Tokens that decode adds to each sequence.")
    training: bool = Field(
        True, description="Measure a forward and backward pass with gradients of all parameters."
    )
    training_batch_size: int = Field(1, ge=1, description="Sequences in the training pass.")
    training_length: int = Field(
        256, ge=2, description="Tokens in each sequence of the training pass."
    )
    optimize: bool = Field(True, description="Measure MODEL after lrcompress.optimize.")
    repeats: int = Field(5, ge=3, description="Measurements of each model; the models take turns.")


def _split_arguments(value: object) -> object:
    """'--dtype "bfloat16"' -> ['--dtype', 'bfloat16'], as a shell splits it."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    try:
        return [part for text in texts for part in shlex.split(str(text))]
    except ValueError as error:
        raise ValueError(f"{value!r} cannot be split into arguments ({error})") from None


class ServeBenchSettings(Section):
    """`bench serve`: a model and its dense baseline, each served by vLLM or llama.cpp."""

    engine: Literal["vllm", "llama.cpp"] | None = Field(
        None, description="What serves: vllm or llama.cpp; default is llama.cpp for a .gguf file."
    )
    baseline: str | None = Field(
        None,
        description="Dense model to serve beside MODEL; default is the one that MODEL was made "
        "from, where the engine can serve it.",
    )
    checkpoint: str | None = Field(
        None,
        description="Checkpoint of lrcompress that a .gguf file was exported from: for the report "
        "and --write-card.",
    )
    python: str | None = Field(
        None, description="Python of the environment that has vllm, or xllamacpp for llama.cpp."
    )
    server: str | None = Field(
        None,
        description="The engine's own program; default is vllm or llama-server on the PATH.",
    )
    url: str | None = Field(
        None, description="Where MODEL is already served, such as http://127.0.0.1:8000."
    )
    baseline_url: str | None = Field(None, description="Where the dense model is already served.")
    arguments: Annotated[tuple[str, ...], BeforeValidator(_split_arguments)] = Field(
        (), description='More arguments of each server, such as "--dtype bfloat16".'
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of each server; default is the engine's choice."
    )
    batch_sizes: Annotated[CountList, AfterValidator(not_empty)] = Field(
        (1, 8, 32),
        description="Requests at the same time.",
        json_schema_extra={"flag": "batch_size"},
    )
    prompt_length: int = Field(128, ge=1, description="Tokens in a prompt.")
    new_tokens: int = Field(64, ge=2, description="Tokens in an answer.")
    repeats: int = Field(5, ge=3, description="Measurements of each model; the models take turns.")
    timeout: float = Field(
        600, gt=0, description="Seconds that a server may take to load its model, or to go on."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.python is not None and self.server is not None:
            raise ValueError("python and server both say how to start a server: give one of them")
        if self.url is None:
            if self.baseline_url is not None:
                raise ValueError("baseline_url needs url: give both, or --baseline")
            return self
        unused = ("baseline", "python", "server", "arguments", "threads")
        if given := [name for name in unused if getattr(self, name)]:
            raise ValueError(f"{given[0]} is for servers that are started: leave it out with url")
        return self
