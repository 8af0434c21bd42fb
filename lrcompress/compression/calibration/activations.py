"""Memory of activations: which blocks keep them for a backward pass, and which compute them again.

Recomputing (gradient checkpointing; Chen et al. 2016, arXiv 1604.06174) costs a second forward
pass. It saves memory that a small model does not need and a large one does not have.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lrcompress.layers.ffn_layouts import find_blocks
from lrcompress.layers.model_info import config_number

# bytes of activations that are kept
KEPT_BYTES = 2 * 2**30
# tensors kept for each input and output of a linear: 62 MB a block of SmolLM2 with 1,024 tokens
TENSORS_PER_FEATURE = 1.5


def block_activations(model: Any, length: int) -> int:
    """Bytes that a block keeps for the backward pass of one sample of `length` tokens, at most."""
    blocks = find_blocks(model)[1]
    features = max(map(_linear_features, blocks))
    kept = int(TENSORS_PER_FEATURE * features) * length * torch.float32.itemsize
    if getattr(model.config, "_attn_implementation", None) != "eager":
        return kept
    heads = config_number(model, "num_attention_heads")
    return kept + 2 * heads * length**2 * torch.float32.itemsize  # scores and their softmax


def _linear_features(block: nn.Module) -> int:
    """Inputs and outputs of all matrices of a block together."""
    return sum(sum(parameter.shape) for parameter in block.parameters() if parameter.ndim == 2)


def kept_blocks(model: Any, length: int) -> int:
    """How many blocks, from the last on, keep the activations of a sample of `length` tokens."""
    return min(KEPT_BYTES // max(block_activations(model, length), 1), len(find_blocks(model)[1]))
