"""How weights are quantized."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lrcompress.config.base import Section

WEIGHTS = ("int8", "int4")


class QuantizeSettings(Section):
    """Weight-only quantization of every linear but the output layer, by torchao."""

    weights: Literal["int8", "int4"] = Field(
        "int8",
        description="int8, one scale for each row; or int4, one for 32 entries, where the machine "
        "has it.",
    )
