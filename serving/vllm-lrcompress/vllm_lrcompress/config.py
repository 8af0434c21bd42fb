"""The quantization configs under which vLLM finds the layers of lrcompress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_lrcompress.files import check_folder
from vllm_lrcompress.geometry import Widths
from vllm_lrcompress.layers import LowRankLinearMethod
from vllm_lrcompress.records import CheckpointError, read_records

# models whose 2-D weights vLLM transposes by their names, which a changed linear has not turned
TRANSPOSED = ("gpt2",)
# what vLLM calls fused linears, for model classes that do not say what they fuse, such as stablelm
FUSED = {"gate_up_proj": ["gate_proj", "up_proj"], "qkv_proj": ["q_proj", "k_proj", "v_proj"]}
# models whose log-probabilities in vLLM 0.32 are not those of transformers, dense ones included
DIFFERENT = ("gemma3n", "gemma3n_text")


class LowRankConfig(QuantizationConfig):
    """`quantization_config` of a checkpoint with changed layers."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.records = self.modules = read_records(config)  # by names of the files; by vLLM's
        self.widths = Widths()
        self.transposed = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LowRankConfig:
        return cls(config)

    def get_name(self) -> str:
        return "lowrank"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # of the GPU: the products are vLLM's own

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """vLLM calls this before it builds the model: a folder is checked here.

        Of other places (a hub id) the layers check each tensor as it arrives.
        """
        model_type = getattr(hf_config, "model_type", None)
        if model_type in DIFFERENT:
            raise CheckpointError(
                f"{model_type} is not served, because its log-probabilities in vLLM are not those "
                "in transformers: use the checkpoint with transformers"
            )
        self.transposed = model_type in TRANSPOSED
        if Path(model_name).is_dir():
            check_folder(Path(model_name), self.records)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        names = self._names(prefix)
        records = [self.modules.get(name) for name in names]
        if any(records) or self._is_beside_changed(layer, prefix):
            return LowRankLinearMethod(names, records, self.widths, self.transposed)
        return UnquantizedLinearMethod()

    def _is_beside_changed(self, layer: nn.Module, prefix: str) -> bool:
        """Whether a dense layer belongs to an FFN with changed ones: then it is checked as well."""
        parent = prefix.rpartition(".")[0]
        parents = {name.rpartition(".")[0] for name in self.modules}
        return parent in parents and not isinstance(layer, QKVParallelLinear)

    def _names(self, prefix: str) -> list[str]:
        """The linears of the checkpoint that vLLM's layer `prefix` holds."""
        parent, _, last = prefix.rpartition(".")
        if prefix in self.modules:
            return [prefix]
        packed = self.packed_modules_mapping.get(last, [last])
        if packed == [last] and any(
            f"{parent}.{name}" in self.modules for name in FUSED.get(last, ())
        ):
            packed = FUSED[last]
        return [f"{parent}.{name}" for name in packed]


class QuantizedLowRankConfig(LowRankConfig):
    """`quantization_config` of `lrcompress quantize`, which is refused."""

    def __init__(self, config: dict[str, Any]) -> None:
        raise CheckpointError(
            "the weights of this checkpoint are quantized (lowrank_torchao), which vllm-lrcompress "
            "does not serve: serve the folder that `lrcompress quantize` was given"
        )


def register() -> None:
    register_quantization_config("lowrank")(LowRankConfig)
    register_quantization_config("lowrank_torchao")(QuantizedLowRankConfig)
    ModelRegistry.register_model("Lfm2ForCausalLM", "vllm_lrcompress.lfm2:Lfm2ForCausalLM")
