"""How llama.cpp stores the weights of each model family that can be exported to GGUF.

What differs from transformers is what llama.cpp's own converter (convert_hf_to_gguf.py) changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrcompress.layers.ffn_layouts import has_experts
from lrcompress.runtime.errors import InputError

# the architecture of DeciLM: that of llama, with a width for each block
DECI = "deci"


@dataclass(frozen=True)
class GgufFamily:
    """The form of a model family in llama.cpp.

    architecture: its name there.
    rotary_pairs: the two features that a rotary embedding turns together are neighbours in the rows
        of q and k, where transformers has them half a head apart.
    norm_offset: is added to the weights of norms, which transformers stores as weight - offset.
    fused_heads: q, k and v are one matrix, with all rows of q first, where transformers has the q,
        k and v of one head after another.
    per_block_width: the architecture that computes the same with a width for each block, if any.
    """

    architecture: str
    rotary_pairs: bool = False
    norm_offset: float = 0.0
    fused_heads: bool = False
    per_block_width: str | None = None

    def with_widths_per_block(self) -> GgufFamily:
        """The form in which the widths of blocks may differ; only where there is one."""
        assert self.per_block_width is not None
        return replace(self, architecture=self.per_block_width, rotary_pairs=True)


# model_type of transformers -> its form in llama.cpp
FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("llama", rotary_pairs=True, per_block_width=DECI),
    "mistral": GgufFamily("llama", rotary_pairs=True, per_block_width=DECI),
    "qwen2": GgufFamily("qwen2", per_block_width=DECI),
    "qwen3": GgufFamily("qwen3"),
    "gemma": GgufFamily("gemma", norm_offset=1.0),
    "gemma2": GgufFamily("gemma2", norm_offset=1.0),
    "gemma3_text": GgufFamily("gemma3", norm_offset=1.0),
    "granite": GgufFamily("granite", rotary_pairs=True),
    "smollm3": GgufFamily("smollm3", rotary_pairs=True),
    "olmo2": GgufFamily("olmo2"),
    "stablelm": GgufFamily("stablelm"),
    "cohere": GgufFamily("command-r"),
    "exaone4": GgufFamily("exaone4"),
    "ernie4_5": GgufFamily("ernie4_5"),
    "phi3": GgufFamily("phi3"),
    "glm4": GgufFamily("glm4"),
    "nemotron": GgufFamily("nemotron", norm_offset=1.0),
    "phi": GgufFamily("phi2"),
    "gpt2": GgufFamily("gpt2"),
    "starcoder2": GgufFamily("starcoder2"),
    "gpt_neox": GgufFamily("gptneox", fused_heads=True),
    "bloom": GgufFamily("bloom", fused_heads=True),
    "mpt": GgufFamily("mpt"),
}


USE = "serve it with transformers, or factorize it --for stock and export it --to dense"


def family_of(model: Any) -> GgufFamily:
    """The family of a causal language model; InputError where llama.cpp's form is not known."""
    name = model.config.model_type
    if has_experts(model):
        raise InputError(f"{name!r} has mixtures of experts, which are not exported to GGUF: {USE}")
    if name not in FAMILIES:
        raise InputError(
            f"{name!r} is not exported to GGUF, but {', '.join(sorted(FAMILIES))}: {USE}"
        )
    return FAMILIES[name]


def to_llama_cpp(family: GgufFamily, config: Any, name: str, tensor: Tensor) -> Tensor:
    """The weight or bias `tensor` as llama.cpp stores it under `name`, in the same shape."""
    part = name.split(".")[-2]
    heads = config.num_attention_heads
    if part == "attn_q" and family.rotary_pairs:
        return _paired(tensor, heads)
    if part == "attn_k" and family.rotary_pairs:
        return _paired(tensor, getattr(config, "num_key_value_heads", None) or heads)
    if part == "attn_qkv" and family.fused_heads:
        return _swapped(tensor, (heads, 3), 0)
    if part.endswith("norm") and name.endswith(".weight") and family.norm_offset:
        return tensor.to(torch.float32) + family.norm_offset
    return tensor


def _paired(tensor: Tensor, heads: int) -> Tensor:
    """The rows of each head in the order 0, d/2, 1, d/2 + 1, ... for a head of d features."""
    return _swapped(tensor, (heads, 2), 1)


def _swapped(tensor: Tensor, leading: tuple[int, int], dimension: int) -> Tensor:
    """`tensor` with its rows counted by `leading` and a rest, and `dimension` of these three
    swapped with the next one."""
    split = tensor.reshape(*leading, -1, *tensor.shape[1:])
    return split.transpose(dimension, dimension + 1).reshape(tensor.shape)
