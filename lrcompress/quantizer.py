"""Teaches `from_pretrained` to rebuild low-rank layers.

transformers calls a registered quantizer between building a model's skeleton and reading its
weights, which is the moment at which the dense layers have to give way. Of a checkpoint as
`factorize` writes it nothing is quantized: once the weights are in, the quantizer detaches itself,
and what is left is an ordinary model that can be cast, trained and saved. The weights of low-rank
layers can be quantized as well, by torchao; then transformers' own quantizer for it stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, TorchAoConfig

from lrcompress.lowrank import layout, rebuild
from lrcompress.protocols import InputError
from lrcompress.quantized import is_quantized, require_torchao

QUANT_METHOD = "lowrank"
QUANTIZED_METHOD = "lowrank_torchao"
LOW_RANK = (QUANT_METHOD, QUANTIZED_METHOD)
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a low-rank checkpoint: module name -> {form, shape, rank}."""

    def __init__(
        self,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: object,
    ) -> None:
        records = modules.values() if isinstance(modules, Mapping) else [None]
        if unknown or not all(isinstance(record, Mapping) for record in records):
            raise InputError(
                "quantization_config of the checkpoint is damaged: it needs modules, each with "
                f"form, shape and rank, and has no {', '.join(unknown) or 'such'}"
            )
        assert modules is not None
        if format_version != FORMAT_VERSION:
            raise InputError(
                f"the checkpoint has low-rank format version {format_version}, this lrcompress "
                f"reads version {FORMAT_VERSION}: install the version that wrote it"
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.modules = {name: dict(record) for name, record in modules.items()}


@register_quantizer(QUANT_METHOD)
class LowRankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps low-rank layers into the skeleton, then takes itself off the loaded model."""

    def __init__(self, quantization_config: LowRankConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise InputError(
                "a model cannot be factorized while it loads: load it dense, then call "
                "lrcompress.factorize(model, ...)"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        rebuild(model, self.quantization_config.modules)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.__dict__.pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


@register_quantization_config(QUANTIZED_METHOD)
class QuantizedLowRankConfig(TorchAoConfig):  # type: ignore[misc]
    """`quantization_config` of a checkpoint with low-rank layers and quantized weights: what
    torchao's has, and what `LowRankConfig` has."""

    def __init__(
        self,
        quant_type: Any,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        modules_to_not_convert: list[str] | None = None,
        **defaults: object,
    ) -> None:
        super().__init__(quant_type, modules_to_not_convert)
        self.__dict__ |= vars(LowRankConfig(modules, format_version)) | {
            "quant_method": QUANTIZED_METHOD
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> QuantizedLowRankConfig:
        require_torchao()
        return super().from_dict(config_dict, **kwargs)  # type: ignore[no-any-return]


@register_quantizer(QUANTIZED_METHOD)
class QuantizedLowRankQuantizer(TorchAoHfQuantizer):  # type: ignore[misc]
    """Swaps low-rank layers into the skeleton, and lets torchao's loader fill them."""

    quantization_config: QuantizedLowRankConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        rebuild(model, self.quantization_config.modules)
        super()._process_model_before_weight_loading(model, **kwargs)


def record_layout(model: Any) -> None:
    """Writes the low-rank layers of `model` into its config, so that saving keeps them."""
    if is_quantized(model):
        return  # whoever quantized it has recorded both
    modules = layout(model)
    if modules:
        model.config.quantization_config = LowRankConfig(modules)
    else:
        model.config.__dict__.pop("quantization_config", None)
