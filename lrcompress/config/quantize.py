"""Settings of `quantize`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lrcompress.config.base import Section

WEIGHTS = ("int8", "int4")


class QuantizeSettings(Section):
    """Weight-only quantization by torchao of all linears except the output layer."""

    weights: Literal["int8", "int4"] = Field(
        "int8",
        description="int8: one scale for each row; int4: one scale for 32 weights, if the machine "
        "supports it.",
    )
