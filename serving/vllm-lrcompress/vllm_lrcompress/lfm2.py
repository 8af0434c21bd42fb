"""lfm2 as vLLM has it, with two mends, in the place of vLLM's own class.

Its attention passes queries and keys with a dimension for heads, which vLLM's rotary kernel for
CPUs misreads (vLLM 0.32): here it gets them flat, which every kernel takes. And vLLM reads
`conv_dim` and `block_dim`, which not every config.json of transformers has: both are the hidden
size there.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models import lfm2


class FlatRotary(nn.Module):
    """`rotary` for queries and keys of shape (tokens, heads, head size)."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        flat_q, flat_k = self.rotary(positions, q.flatten(1), k.flatten(1))
        return flat_q.view_as(q), flat_k.view_as(k)


class Lfm2ForCausalLM(lfm2.Lfm2ForCausalLM):
    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Any:
        _complete(vllm_config.model_config.hf_config)
        return super().get_mamba_state_shape_from_config(vllm_config)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        _complete(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for module in self.modules():
            if isinstance(module, lfm2.Lfm2Attention):
                module.rotary_emb = FlatRotary(module.rotary_emb)


def _complete(config: Any) -> None:
    for key in ("conv_dim", "block_dim"):
        if not hasattr(config, key):
            setattr(config, key, config.hidden_size)
