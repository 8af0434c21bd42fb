"""Registers two quantizers with which `from_pretrained` rebuilds low-rank layers.

transformers calls a registered quantizer after it has built the model on the meta device and before
it reads the weights: the moment to replace dense layers. A checkpoint of `factorize` has no
quantized weights, so its quantizer removes itself once the weights are loaded, and the model is an
ordinary one that can be cast, trained and saved. Low-rank layers with weights quantized by torchao
have the second quantizer, which stays on the model as transformers' own does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, TorchAoConfig

from lrcompress.layers.lowrank import layout, rebuild
from lrcompress.layers.model_info import is_quantized
from lrcompress.models.loaded_weights import check_loaded, check_pivot_orders
from lrcompress.models.safetensors_headers import check_dtypes, stored_tensors
from lrcompress.runtime.errors import InputError
from lrcompress.runtime.packages import require_extra

QUANT_METHOD = "lowrank"
QUANTIZED_METHOD = "lowrank_torchao"
LOW_RANK_METHODS = (QUANT_METHOD, QUANTIZED_METHOD)
FORMAT_VERSION = 1


@register_quantization_config(QUANT_METHOD)
class LowRankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a low-rank checkpoint: module name -> {form, shape, rank}."""

    def __init__(
        self,
        /,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown_keys: object,
    ) -> None:
        records = modules.values() if isinstance(modules, Mapping) else [None]
        if unknown_keys or not all(isinstance(record, Mapping) for record in records):
            problem = (
                f"it must not have {', '.join(unknown_keys)}"
                if unknown_keys
                else "it must have modules, each with form, shape and rank"
            )
            raise InputError(
                f"quantization_config of the checkpoint is damaged: {problem}: get an intact copy"
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
    """Puts low-rank layers into the model before loading, and removes itself afterwards."""

    def __init__(self, quantization_config: LowRankConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise InputError(
                "a model cannot be factorized while it loads: load it dense, then call "
                "lrcompress.factorize(model, ...)"
            )

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        rebuild(model, self.quantization_config.modules)
        files = [Path(file) for file in checkpoint_files or ()]
        check_dtypes(stored_tensors(file for file in files if file.suffix == ".safetensors"))
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_loaded(model)
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
    """`quantization_config` of a checkpoint with low-rank layers and quantized weights.

    It has the fields of torchao's config and those of `LowRankConfig`.
    """

    def __init__(
        self,
        quant_type: Any,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        format_version: int = FORMAT_VERSION,
        modules_to_not_convert: list[str] | None = None,
        **torchao_defaults: object,
    ) -> None:
        super().__init__(quant_type, modules_to_not_convert)
        self.__dict__ |= vars(LowRankConfig(modules, format_version)) | {
            "quant_method": QUANTIZED_METHOD
        }

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> QuantizedLowRankConfig:
        require_extra("torchao", "quantize")
        return super().from_dict(config_dict, **kwargs)  # type: ignore[no-any-return]


@register_quantizer(QUANTIZED_METHOD)
class QuantizedLowRankQuantizer(TorchAoHfQuantizer):  # type: ignore[misc]
    """Puts low-rank layers into the model; transformers' quantizer for torchao loads them."""

    quantization_config: QuantizedLowRankConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        rebuild(model, self.quantization_config.modules)
        super()._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_pivot_orders(model)
        return super()._process_model_after_weight_loading(model, **kwargs)


def record_layout(model: Any) -> None:
    """Records the low-rank layers of `model` in its config, so that it can be saved and loaded."""
    if is_quantized(model):
        return  # the config of a quantized model already records its low-rank layers
    modules = layout(model)
    if modules:
        model.config.quantization_config = LowRankConfig(modules)
    else:
        model.config.__dict__.pop("quantization_config", None)
