"""Small llamas by name: models to train from scratch where no config is given."""

from __future__ import annotations

from typing import Any

# width, intermediate width, blocks, heads. Non-embedding parameters are about 12 width² a block.
# The last four are near the sizes of Wei et al. 2024 (110M to 1.3B with embeddings).
LLAMAS: dict[str, tuple[int, int, int, int]] = {
    "llama-0.3m": (64, 176, 6, 2),
    "llama-0.9m": (96, 256, 8, 3),
    "llama-2.5m": (160, 432, 8, 5),
    "llama-8m": (256, 688, 10, 8),
    "llama-25m": (384, 1024, 14, 6),
    "llama-85m": (768, 2048, 12, 12),
    "llama-300m": (1024, 2736, 24, 16),
    "llama-700m": (1536, 4096, 24, 16),
    "llama-1.2b": (2048, 5464, 24, 32),
}
POSITIONS = 2048


def preset(name: str) -> dict[str, Any]:
    """Keys of a transformers llama config, but the vocabulary."""
    width, intermediate, blocks, heads = LLAMAS[name]
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
    }
